"""The command line as a user types it: results on standard output, messages on standard error, stable exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command import one_line_error, planner
from machines import profile_data
from ruamel.yaml import YAML

PLAN = ["plan", "llama3-8b", "--hardware", "h100-sxm", "--nodes", "1", "--seq-len", "8192", "--global-batch", "64"]


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    result = planner(*PLAN, "-o", str(path), "--format", "json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == json.loads(path.read_text())
    return path


def test_plan_json_has_what_is_promised(plan_file):
    data = json.loads(plan_file.read_text())
    layout = {"tp", "cp", "pp", "dp", "ep", "etp", "zero", "micro_batch", "schedule", "virtual_stages",
              "sequence_parallel", "offload", "stages"}  # fmt: skip
    assert layout <= data["layout"].keys()
    assert {"layers", "recompute"} <= data["layout"]["stages"][0].keys()
    estimate = data["estimate"]
    assert {"step_time_s", "tokens_per_s_per_gpu", "mfu", "breakdown", "memory"} <= estimate.keys()
    memory = {"limit_gib", "peak_gib", "peak_allocated_gib", "peak_stage", "peak_cause", "stages"}
    assert memory <= estimate["memory"].keys()
    certificate = data["certificate"]
    assert certificate["status"] == "optimal"
    assert certificate["objective"] == certificate["bound"]
    space = certificate["space"]
    assert space["by_rule"] + space["by_memory"] + space["by_bound"] + space["exact"] == space["enumerated"]
    assert space["open"] == 0
    assert {"solver", "gap"} <= certificate.keys()
    keys = [tuple(a["layout"][k] for k in ("tp", "cp", "pp", "ep")) for a in [data, *data["alternatives"]]]
    assert len(set(keys)) == len(keys) > 1
    assert data["inputs"]["digests"].keys() == {"model", "hardware", "job"}


def test_plan_file_is_the_same_twice(plan_file):
    assert planner(*PLAN, "--format", "json").stdout == plan_file.read_text()


@pytest.mark.parametrize(("name", "check"), [
    ("table", lambda t: "Proven optimal" in t and "…" not in t and "\x1b" not in t),
    ("yaml", lambda t: YAML(typ="safe").load(t)["format"] == "planner.plan"),
    ("csv", lambda t: t.splitlines()[0].startswith("rank,tp,cp,pp,dp")),
    ("markdown", lambda t: t.startswith("| rank | tp |") and t.splitlines()[1].startswith("| ---")),
])  # fmt: skip
def test_formats(name, check):
    result = planner(*PLAN, "--format", name)
    assert result.returncode == 0, result.stderr
    assert check(result.stdout), result.stdout
    assert result.stderr == ""


def test_estimate_of_a_plan_equals_the_plan(plan_file):
    data = json.loads(planner("estimate", str(plan_file), "--format", "json").stdout)
    assert data["estimate"] == json.loads(plan_file.read_text())["estimate"]
    assert data["certificate"] is None


def test_estimate_of_a_named_layout():
    result = planner("estimate", "llama3-70b", "--hw", "h100-sxm", "--nodes", "8", "--seq-len", "8192", "--global-batch", "512",
                     "--tp", "8", "--pp", "4", "--recompute", "full", "--format", "json")  # fmt: skip
    data = json.loads(result.stdout)
    assert (data["layout"]["dp"], len(data["layout"]["stages"])) == (2, 4)
    assert data["estimate"]["memory"]["peak_stage"] in range(4)


def test_pins_and_forbids_restrict_the_space():
    result = planner(
        *PLAN, "--pin", "tp=4", "--pin", "zero=1,2", "--forbid", "interleaved", "--forbid", "recompute", "--format", "json"
    )
    data = json.loads(result.stdout)
    assert data["layout"]["tp"] == 4
    assert data["layout"]["zero"] in (1, 2)
    assert all(s["recompute"] == "none" for s in data["layout"]["stages"])
    assert data["inputs"]["pins"] == {"tp": [4], "zero": [1, 2]}


def test_nothing_fits():
    words = ["plan", "llama3-405b", "--hardware", "h100-sxm", "--nodes", "2", "--seq-len", "8192", "--global-batch", "64"]
    result = planner(*words)
    message = one_line_error(result, "PLN301", 3)
    assert "GiB" in message
    smallest = int(message.split("use ")[1].split(" nodes")[0])
    as_json = json.loads(planner(*words, "--format", "json").stdout)
    assert (as_json["certificate"]["status"], as_json["smallest_nodes"]) == ("infeasible", smallest)
    words[5] = str(smallest)
    assert planner(*words).returncode == 0
    words[5] = str(smallest - 1)
    assert planner(*words).returncode == 3


def test_recipes_that_run(tmp_path):
    """Every recipe of the bundled engine's own runs; the others only price a run of somebody else."""
    tiny = ["plan", "tiny", "--hardware", "local-cpu", "--gpus", "2", "--seq-len", "64", "--global-batch", "4", "--engine"]
    for engine in ("bundled+compile+bf16-states", "bundled+selective-products", "bundled+2021"):
        plan = str(tmp_path / f"{engine}.json")
        assert planner(*tiny, engine, "--out", plan).returncode == 0
        emitted = planner("emit", plan, "--launcher", "torchrun", "--out", str(tmp_path / engine))
        if engine.endswith("2021"):
            assert "+bf16-states" in one_line_error(emitted, "PLN502")
        else:
            assert emitted.returncode == 0, emitted.stderr


def test_emit_and_check(plan_file, tmp_path):
    for launcher, name in (("torchrun", "launch.sh"), ("slurm", "job.sbatch")):
        out = tmp_path / launcher
        result = planner("emit", str(plan_file), "--launcher", launcher, "--out", str(out))
        assert result.returncode == 0, result.stderr
        assert sorted(p.name for p in out.iterdir()) == sorted([name, "plan.json"])
        assert (out / "plan.json").read_text() == plan_file.read_text()
    (tmp_path / "slurm" / "job.sbatch").write_text("changed")
    again = planner("emit", str(plan_file), "--launcher", "slurm", "--out", str(tmp_path / "slurm"))
    one_line_error(again, "PLN504")
    forced = planner("emit", str(plan_file), "--launcher", "slurm", "--out", str(tmp_path / "slurm"), "--force")
    assert forced.returncode == 0
    checked = planner("check", str(plan_file))
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "feasible" in checked.stdout


def test_a_changed_plan_is_refused(plan_file, tmp_path):
    data = json.loads(plan_file.read_text())
    data["layout"]["micro_batch"] = 2
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    one_line_error(planner("check", str(path)), "PLN116")


def test_run_refuses_a_plan_for_other_hardware(plan_file, tmp_path):
    if _has_accelerators():
        pytest.skip("this machine has accelerators")
    result = planner("run", str(plan_file), "--out", str(tmp_path))
    assert "local-cpu" in one_line_error(result, "PLN503")


def _has_accelerators() -> bool:
    torch = pytest.importorskip("torch")
    return torch.cuda.is_available()


@pytest.mark.parametrize(("words", "code"), [
    (["plan", "llama3-9b", *PLAN[2:]], "PLN110"),
    (["plan", "missing.yaml", *PLAN[2:]], "PLN101"),
    ([*PLAN[:3], "h100", *PLAN[4:]], "PLN110"),
    ([*PLAN[:5], "0", *PLAN[6:]], "PLN131"),
    ([*PLAN[:4], *PLAN[6:]], "PLN131"),
    ([*PLAN[:7], "0", *PLAN[8:]], "PLN107"),
    ([*PLAN, "--precision", "fp7"], "PLN107"),
    ([*PLAN, "--engine", "megatrom"], "PLN501"),
    ([*PLAN, "--pin", "tq=8"], "PLN121"),
    ([*PLAN, "--pin", "tp"], "PLN121"),
    ([*PLAN, "--pin", "tp=x"], "PLN122"),
    ([*PLAN, "--forbid", "speed"], "PLN121"),
    ([*PLAN, "--format", "xml"], "PLN107"),
    ([*PLAN, "-o", "/nowhere/plan.json"], "PLN113"),
    ([*PLAN, "--max-memory-fraction", "1.5"], "PLN107"),
    (["estimate", *PLAN[1:], "--tp", "3"], "PLN201"),
    (["estimate", *PLAN[1:9], "7"], "PLN205"),
    (["estimate", *PLAN[1:6]], "PLN105"),
    (["check", "missing.json"], "PLN101"),
    (["emit", "missing.json", "--launcher", "slurm", "--out", "x"], "PLN101"),
    (["schema", "plans"], "PLN107"),
    (["hardware", "show", "h300"], "PLN110"),
    (["model", "inspect", "gpt5"], "PLN110"),
])  # fmt: skip
def test_bad_input_is_one_clear_message(words, code, tmp_path):
    result = planner(*words, cwd=tmp_path)
    first, *rest = one_line_error(result, code).splitlines()
    assert not first.startswith(" ")
    assert all(line.startswith("  ") or code in line or "PLN" in line for line in rest)


def test_usage_errors_exit_2():
    for words in (["plan"], ["nonsense"], ["plan", "x", "--nonsense"]):
        result = planner(*words)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr


def test_wrong_files_name_line_and_column(tmp_path):
    model = tmp_path / "model.yaml"
    model.write_text(
        "name: broken\nhidden: -8\nvocab: 100\nlayer:\n  - count: 2\nlayers:\n  - count: two\n"
        "    attention: {heads: 4}\n    mlp: {kind: relu, width: 32}\n"
    )
    result = planner("model", "inspect", str(model))
    message = one_line_error(result, "PLN")
    places = [line for line in message.splitlines() if not line.startswith(" ")]
    assert [p.split(": ")[0].removeprefix(str(model)) for p in places] == [":2:1", ":7:5", ":9:11", ":4:1"]
    assert "did you mean 'layers'?" in message


def test_hardware_validate_reports_all_problems(tmp_path):
    data = profile_data(memory="-4 GiB")
    del data["device"]["memory_bandwidth"]
    data["network"][0]["bandwidth"]["value"] = "450 GB"
    path = tmp_path / "machine.yaml"
    with path.open("w") as stream:
        YAML(typ="safe", pure=True).dump(data, stream)
    message = one_line_error(planner("hardware", "validate", str(path)), "PLN")
    assert sum("machine.yaml:" in line for line in message.splitlines()) == 3
    good = tmp_path / "good.yaml"
    with good.open("w") as stream:
        YAML(typ="safe", pure=True).dump(profile_data(), stream)
    assert planner("hardware", "validate", str(good)).returncode == 0
    assert planner("plan", "llama3-8b", "--hw", str(good), *PLAN[4:]).returncode == 0


def test_version_help_lists_and_schemas():
    assert planner("--version").stdout.startswith("planner 0.")
    text = planner("--help").stdout
    assert all(name in text for name in ("plan", "estimate", "check", "emit", "run", "model", "hardware", "schema"))
    assert "h100-sxm" in planner("hardware", "list").stdout
    assert "datasheet" in planner("hardware", "show", "h100-sxm").stdout
    assert "8,030,261,248" in planner("model", "inspect", "llama3-8b").stdout
    for kind in ("plan", "model", "hardware", "configuration"):
        assert json.loads(planner("schema", kind).stdout)["type"] == "object"


def test_inspect_says_what_every_kind_of_layer_is():
    text = planner("model", "inspect", "llama4-maverick", COLUMNS="200").stdout
    for words in (
        "400,711,848,960 parameters (401 B), 17,184,691,200 active",
        "16,295,536,640 each, 315,238,400 active: attention in chunks of 8,192, 40 heads, 8 kv, width 128",
        "1 of 128 gated experts 8,192 and shared 8,192",
        "full attention, 40 heads, 8 kv, width 128, no positions",
        "(1 x A, 1 x B, 1 x A, 1 x C) x 12",
        "(full attention)",
        "(causal)",
        "(full recompute)",
    ):
        assert words in text, words
    assert "1 multi-token module" in planner("model", "inspect", "deepseek-v3", COLUMNS="200").stdout
    assert "vision: bidirectional attention in chunks of 64" in planner("model", "inspect", "vit-llm-72b", COLUMNS="200").stdout


def test_inspect_counts_under_stable_names():
    facts = json.loads(planner("model", "inspect", "gpt-oss-120b", "--seq-len", "4096", "--format", "json").stdout)
    params, flops = facts["params"], facts["flops_per_token"]
    names = {"total", "active", "embedding", "positions", "front_ends", "layers", "final_norm", "head", "multi_token"}
    assert set(params) == names
    layers = sum(g["count"] * g["params"] for g in params["layers"])
    assert params["total"] == params["embedding"] + layers + params["final_norm"] + params["head"]
    first, second = params["layers"][:2]
    assert (first["span"], first["span_tokens"], second["span"]) == ("window", 128, "full")
    assert (first["experts"], first["top_k"], first["attention"]) == (128, 4, "softmax")
    assert set(flops) == {"seq_len", "full_attention", "causal", "full_recompute"}
    assert flops["causal"] < flops["full_attention"] < flops["full_recompute"] < 4 / 3 * flops["full_attention"]


def test_a_model_survives_the_trip_through_yaml(tmp_path):
    path = tmp_path / "again.yaml"
    path.write_text(planner("model", "inspect", "gpt3-175b", "--format", "yaml").stdout)
    first, second = (json.loads(planner("model", "inspect", m, "--format", "json").stdout) for m in ("gpt3-175b", str(path)))
    assert first == second


def test_a_closed_pipe_is_not_an_error():
    command = f"{sys.executable} -m planner hardware show h100-sxm --format json | head -1"
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.stderr == ""
    assert result.stdout == "{\n"


def test_colour_only_where_it_is_wanted():
    assert "\x1b" not in planner(*PLAN).stdout
    assert "\x1b" in planner(*PLAN, FORCE_COLOR="1").stdout
    assert "\x1b[3" not in planner(*PLAN, FORCE_COLOR="1", NO_COLOR="1").stdout
