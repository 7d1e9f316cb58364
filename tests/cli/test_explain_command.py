"""`planner explain` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import one_line_error, planner

SMALL = ("llama3-8b", "--hardware", "h100-sxm", "--nodes", "1", "--seq-len", "8192", "--global-batch", "64")


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("explain") / "plan.json"
    assert planner("plan", *SMALL, "-o", str(path)).returncode == 0
    return path


def test_everything_is_said_in_80_columns(plan):
    result = planner("explain", str(plan))
    assert (result.returncode, result.stderr) == (0, "")
    assert max(map(len, result.stdout.splitlines())) <= 80
    for part in (
        "What binds each pipeline rank",
        "runners-up lose",
        "of the declared space",
        "Dense mesh",
        "Where each rank is",
    ):
        assert part in result.stdout
    assert "\033" not in result.stdout


def test_json_and_markdown_hold_the_same(plan):
    data = json.loads(planner("explain", str(plan), "--format", "json", "--why-not", "tp=8").stdout)
    assert len(data["nodes"]) == 1
    assert len(data["nodes"][0]["places"]) == 8
    assert data["why_not"]["verdict"] == "slower"
    assert data["why_not"]["pins"] == {"tp": ["8"]}
    text = planner("explain", str(plan), "--format", "markdown").stdout
    assert text.startswith("### Why ")
    assert "| rank | layers | recompute | binds |" in text


@pytest.mark.parametrize(("question", "said"), [
    (("tp=8",), "slower than the plan"),
    (("tp=8,pp=1", "zero=0,1"), "Why not tp 8, pp 1, zero 0,1"),
    (("tp=7",), "PLN202 tp 7 does not divide the 32 attention heads"),
    (("tp=1,zero=0,pp=1",), "memory of stage 0"),
    (("pp=1,schedule=1f1b",), "PLN206"),
    (("micro_batch=3",), "PLN205"),
])  # fmt: skip
def test_why_not(plan, question, said):
    words = [w for q in question for w in ("--why-not", q)]
    result = planner("explain", str(plan), *words)
    assert (result.returncode, result.stderr) == (0, "")
    assert said in " ".join(result.stdout.split())
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_what_would_fit_does_fit(plan):
    data = json.loads(planner("explain", str(plan), "--format", "json", "--why-not", "tp=1,zero=0,pp=1").stdout)["why_not"]
    assert data["verdict"] == "does not fit"
    change = next(c for c in data["changes"] if c["axis"] == "zero")
    pins = [w for axis in ("tp", "pp", "zero") for w in ("--pin", f"{axis}={change['layout'][axis]}")]
    again = json.loads(planner("plan", *SMALL, *pins, "--top-k", "1", "--format", "json").stdout)
    assert again["estimate"]["step_time_s"] == change["step_time_s"]


@pytest.mark.parametrize(("words", "code"), [
    (("--why-not", "qq=3"), "PLN121"),
    (("--why-not", "tp"), "PLN121"),
    (("--why-not", "tp=4", "--why-not", "tp=8"), "PLN121"),
    (("--why-not", "tp=x"), "PLN122"),
    (("--why-not", "schedule=fast"), "PLN122"),
    (("--format", "csv"), "PLN107"),
    (("--verify", "--why-not", "tp=8"), "PLN107"),
    (("--verify", "--format", "markdown"), "PLN107"),
])  # fmt: skip
def test_bad_input_is_one_clear_error(plan, words, code):
    error = one_line_error(planner("explain", str(plan), *words), code)
    if words[0] == "--why-not":
        assert "--why-not" in error


def test_a_file_that_is_no_plan(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("model: llama3-8b\n")
    one_line_error(planner("explain", str(path)), "PLN114")
    one_line_error(planner("explain", str(tmp_path / "none.json")), "PLN101")


def test_an_infeasible_plan_names_changes_that_work(tmp_path):
    words = (*SMALL, "--pin", "zero=0", "--pin", "tp=1", "--pin", "pp=1")
    error = one_line_error(planner("plan", *words), "PLN301", 3)
    fixes = [line.strip() for line in error.splitlines() if line.strip().startswith(("fix:", "or:"))]
    assert len(fixes) == 2
    assert any("zero" in line for line in fixes)
    assert all("a step" in line for line in fixes)
