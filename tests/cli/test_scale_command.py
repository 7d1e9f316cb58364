"""Tokens, objectives and several cluster sizes as a user types them: standard output, files, exit codes."""

from __future__ import annotations

import csv
import functools
import io
import json
from pathlib import Path

import pandas as pd
import pytest
from command import one_line_error, planner

JOB = ["llama3-8b", "--hardware", "h100-sxm", "--seq-len", "4096", "--global-batch", "64"]
PINS = ["--pin", "virtual_stages=1", "--pin", "cp=1", "--pin", "tp=1", "--top-k", "1"]
ONE = ["plan", *JOB, *PINS, "--nodes", "1"]
SIZES = ["plan", *JOB, *PINS, "--nodes", "1,2,3"]
BUDGET = ["--tokens", "15T", "--price", "2.5", "--pue", "1.2"]


@functools.cache
def ok(*words: str) -> str:
    """Standard output of a command that succeeds; the same command runs once."""
    result = planner(*words)
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def paid(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    text = ok(*ONE, *BUDGET, "-o", str(path))
    for word in ("Training 15 T tokens", "optimizer steps", "device-hours", "USD", "MWh", "PUE 1.2", "upper estimate"):
        assert word in text
    assert "tokens a parameter" not in text
    return path


def test_the_plan_file_holds_what_training_takes(paid):
    data = json.loads(paid.read_text())
    e = data["economy"]
    assert e["tokens"] == 15 * 10**12
    assert e["steps"] == -(-15 * 10**12 // (4096 * 64))
    assert e["days"]["value"] == pytest.approx(e["steps"] * data["estimate"]["step_time_s"] / 86400)
    assert e["cost_usd"]["value"] == pytest.approx(2.5 * e["device_hours"]["value"])
    assert e["energy_mwh"]["value"] == pytest.approx(e["device_hours"]["value"] * 700 * 1.2 / 1e6)
    assert data["compute_optimal"] is None
    assert data["objective"] == "throughput"


def test_an_estimate_of_the_file_keeps_its_budget_and_takes_another(paid):
    data = json.loads(paid.read_text())
    again = json.loads(ok("estimate", str(paid), "--format", "json"))
    assert again["economy"] == data["economy"]
    other = json.loads(ok("estimate", str(paid), "--tokens", "30T", "--format", "json"))
    assert other["economy"]["steps"] == pytest.approx(2 * data["economy"]["steps"], abs=1)
    assert other["economy"]["cost_usd"] is None
    assert planner("check", str(paid)).returncode == 0


def test_estimate_of_flags_and_of_a_configuration():
    words = ["--hw", "h100-sxm", "--nodes", "1", "--seq-len", "4096", "--global-batch", "64", "--zero", "1"]
    assert "Training 1 B tokens" in ok("estimate", "llama3-8b", *words, "--tokens", "1B")
    assert "about 20 tokens a parameter (Hoffmann 2022) would be 161 B tokens" in ok("estimate", "llama3-8b", *words)
    made = ok("estimate", "examples/configurations/llama3-8b.yaml", "--tokens", "1B", "--format", "json")
    assert json.loads(made)["economy"]["tokens"] == 10**9


def test_without_a_budget_there_is_a_hint():
    text = ok(*ONE)
    assert "about 20 tokens a parameter (Hoffmann 2022) would be 161 B tokens: " in text
    assert "(full attention; causal " in text
    assert ", HFU " in text


def test_a_plan_as_csv_has_columns_of_money():
    rows = list(csv.DictReader(io.StringIO(ok(*ONE, *BUDGET, "--format", "csv"))))
    assert float(rows[0]["cost_usd"]) == pytest.approx(2.5 * float(rows[0]["device_hours"]))


@pytest.mark.parametrize("objective", ["throughput", "time", "cost", "min-gpus"])
def test_each_objective_picks_from_the_whole_table(objective):
    data = json.loads(ok(*SIZES, "--objective", objective, "--tokens", "1T", "--format", "json"))
    planned = [row for row in data["rows"] if row["status"] == "planned"]
    by = {
        "throughput": lambda r: r["step_time_s"], "time": lambda r: r["days"], "cost": lambda r: r["device_hours"],
        "min-gpus": lambda r: r["gpus"],
    }[objective]  # fmt: skip
    assert data["chosen"] == min(planned, key=by)["gpus"]
    assert [row["gpus"] for row in data["rows"]] == [8, 16, 24]
    assert [row["chosen"] for row in data["rows"]].count(True) == 1
    assert f"{data['chosen']} devices" in data["reason"]


def test_the_table():
    text = ok(*SIZES, *BUDGET)
    for word in (
        "devices",
        "dp8",
        "effi-",
        "USD",
        "MWh",
        "chosen for throughput",
        "24 devices: global batch 64 is not divisible",
    ):
        assert word in text
    assert "…" not in text


def test_the_table_is_whole_on_a_narrow_terminal():
    result = planner(*SIZES, *BUDGET, COLUMNS="80")
    assert "…" not in result.stdout
    assert {"100.0%", "effi-", "ciency"} <= set(result.stdout.split())


def test_memory_for_one_cluster():
    text = ok(*ONE, "--objective", "memory")
    assert "the lowest that anything fits under: nothing fits under" in text
    low = json.loads(ok(*ONE, "--objective", "memory", "--format", "json"))
    fast = json.loads(ok(*ONE, "--format", "json"))
    assert low["estimate"]["memory"]["peak_gib"] < fast["estimate"]["memory"]["peak_gib"]
    assert low["certificate"]["lowest_memory"]["limit_gib"] >= low["estimate"]["memory"]["peak_gib"]


def test_csv_and_markdown_on_standard_output():
    frame = pd.read_csv(io.StringIO(ok(*SIZES, "--format", "csv")))
    assert frame["gpus"].tolist() == [8, 16, 24]
    assert frame["scaling_efficiency"][0] == 1.0
    assert ok(*SIZES, "--format", "markdown").startswith("| gpus | nodes | status |")


def test_files_by_suffix(tmp_path):
    table, plan = tmp_path / "scaling.csv", tmp_path / "plan.json"
    ok(*SIZES, "--tokens", "1T", "-o", str(table))
    frame = pd.read_csv(table)
    assert frame["status"].tolist() == ["planned"] * 3
    assert frame.loc[frame["chosen"], "days"].item() == frame["days"].min()
    ok(*SIZES, "--objective", "cost", "-o", str(plan))
    data = json.loads(plan.read_text())
    assert data["objective"] == "cost"
    assert data["count_choice"]["compared"] == [8, 16, 24]
    assert planner("check", str(plan)).returncode == 0


def test_parquet_is_read_back(tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "scaling.parquet"
    ok(*SIZES, *BUDGET, "-o", str(path))
    frame = pd.read_parquet(path)
    printed = pd.read_csv(io.StringIO(ok(*SIZES, *BUDGET, "--format", "csv")))
    assert list(frame.columns) == list(printed.columns)
    assert frame["cost_usd"].tolist() == pytest.approx(printed["cost_usd"].tolist())


def test_parquet_without_its_part(tmp_path, monkeypatch):
    from planner.cli import scale
    from planner.errors import MissingPartError

    monkeypatch.setattr(scale.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPartError, match="PLN555 pyarrow is not installed") as caught:
        scale.checked_output(tmp_path / "scaling.parquet")
    assert caught.value.exit_code == 5
    assert "planner[parquet]" in str(caught.value)


def test_a_time_limit_that_leaves_nothing_is_exit_4():
    one_line_error(planner(*SIZES, "--time-limit", "1e-9"), "time limit", 4)


def test_a_deadline_that_nothing_meets(tmp_path):
    one_line_error(planner(*ONE, "--tokens", "15T", "--deadline-days", "3"), "PLN304", 3)
    path = tmp_path / "plan.json"
    result = planner(*SIZES, "--tokens", "15T", "--deadline-days", "3", "--objective", "min-gpus", "-o", str(path))
    assert result.returncode == 3
    assert "PLN304 no count of 3 meets the deadline" in result.stderr
    assert "even at the peak rate: after the deadline" in result.stdout
    assert not path.exists()


@pytest.mark.parametrize(("words", "code"), [
    (["--tokens", "15X"], "PLN124"),
    (["--tokens", "-5"], "PLN124"),
    (["--price", "2.5"], "PLN125"),
    (["--tokens", "1T", "--pue", "0.5"], "PLN107"),
    (["--tokens", "1T", "--price", "0"], "PLN107"),
    (["--deadline-days", "30"], "PLN125"),
    (["--objective", "speed"], "PLN107"),
])  # fmt: skip
def test_bad_flags(words, code):
    one_line_error(planner(*ONE, *words), code)


@pytest.mark.parametrize(("words", "code"), [
    (["--nodes", "8:4"], "PLN126"),
    (["--nodes", "eight"], "PLN126"),
    (["--nodes", "1,"], "PLN126"),
    (["--nodes", "0,1"], "PLN131"),
    (["--gpus", "9,10"], "PLN131"),
    (["--nodes", "1,2", "--gpus", "8"], "PLN131"),
    (["--nodes", "1,2", "--objective", "memory"], "PLN127"),
    (["--nodes", "1,2", "-o", "table.xlsx"], "PLN128"),
    (["--nodes", "1,2", "-o", "table"], "PLN128"),
])  # fmt: skip
def test_bad_counts(words, code):
    one_line_error(planner("plan", *JOB, *words), code)


def test_the_schema_knows_the_new_parts():
    schema = json.loads(ok("schema", "plan"))
    assert {"economy", "compute_optimal", "objective", "count_choice"} <= schema["properties"].keys()
    assert {"Economy", "ComputeOptimal", "LowestMemory", "CountChoice"} <= schema["$defs"].keys()
