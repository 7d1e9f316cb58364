"""Intervals, the risk to run out of memory and near ties, as a user meets them on the command line."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from command import one_line_error, planner
from ruamel.yaml import YAML

import planner as api
from planner.errors import InputError

WORDS = ["llama3-8b", "--hardware", "h100-sxm", "--nodes", "1", "--seq-len", "4096", "--global-batch", "64"]
SMALL = ["plan", *WORDS, "--pin", "tp=1", "--pin", "virtual_stages=1"]


@pytest.fixture(scope="module")
def limited(tmp_path_factory) -> Path:
    """A plan under a limit of 5 %."""
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    result = planner(*SMALL, "--max-oom-probability", "0.05", "-o", str(path))
    assert result.returncode == 0, result.stderr
    assert "what max_oom_probability 0.05 leaves of" in result.stdout
    return path


def test_the_plan_file_records_the_limit_and_keeps_to_it(limited):
    data = json.loads(limited.read_text())
    assert data["version"] == "2.1"
    assert data["policy"] == {"max_memory_fraction": 0.92, "max_oom_probability": 0.05}
    memory = data["estimate"]["memory"]
    assert memory["limit_by"] == "max_oom_probability"
    assert 0 < memory["oom_probability"] <= 0.05
    assert all(0 <= a["oom_probability"] <= 0.05 for a in data["alternatives"])
    again = json.loads(planner("estimate", str(limited), "--format", "json").stdout)
    assert again["estimate"] == data["estimate"]


def test_json_has_intervals_and_the_choice(limited):
    data = json.loads(limited.read_text())
    e, chosen = data["estimate"], data["choice"]
    assert e["interval"]["low_s"] < e["step_time_s"] < e["interval"]["high_s"]
    assert e["memory"]["interval"]["low_gib"] < e["memory"]["peak_gib"] < e["memory"]["interval"]["high_gib"]
    assert e["interval"]["provenance"] in ("fitted", "assumed")
    assert chosen["fastest_step_time_s"] == data["certificate"]["objective"]
    times = [e["step_time_s"], *(a["step_time_s"] for a in data["alternatives"])]
    assert min(times) == data["certificate"]["objective"]
    inside = [a for a in data["alternatives"] if a["step_time_s"] <= e["interval"]["high_s"]]
    assert chosen["inside_interval"] == len(inside)


def test_check_names_the_limit_that_binds(limited):
    result = planner("check", str(limited))
    assert result.returncode == 0
    assert "(limit: max_oom_probability), OOM probability " in result.stdout
    strict = planner("check", str(limited), "--max-oom-probability", "0.001")
    assert strict.returncode == 1
    assert "PLN301" in strict.stdout
    assert "the limit is what max_oom_probability 0.001 leaves of " in strict.stdout
    loose = planner("check", str(limited), "--max-oom-probability", "0.9")
    assert loose.stdout == result.stdout  # the file's own limit is stricter
    (found,) = json.loads(planner("check", str(limited), "--output-format", "json").stdout)["files"]
    assert found["limit_by"] == "max_oom_probability"
    assert found["step_time_interval"]["low_s"] < found["step_time_s"] < found["step_time_interval"]["high_s"]
    assert 0 < found["oom_probability"] <= 0.05


CONFIGURATION = """\
model: llama3-8b
hardware: h100-sxm
nodes: 1
job: {seq_len: 8192, global_batch: 64}
layout: {tp: 2, dp: 4, zero: 1, sequence_parallel: true, stages: [{layers: 32, recompute: selective}]}
policy: {max_oom_probability: 0.0001}
"""


def test_a_configurations_policy_limits_the_risk(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(CONFIGURATION)
    result = planner("check", "job.yaml", cwd=tmp_path)
    assert result.returncode == 1
    assert "max_oom_probability 0.0001 leaves of" in result.stdout
    path.write_text(CONFIGURATION.replace("0.0001", "0.99"))
    assert "(limit: max_memory_fraction)" in planner("check", "job.yaml", cwd=tmp_path).stdout
    assert api.check(str(path)) == []
    assert [p.code for p in api.check(str(path), max_oom_probability=0.0001)] == ["PLN301"]
    path.write_text(CONFIGURATION.replace("0.0001", "1.5"))
    assert one_line_error(planner("check", "job.yaml", cwd=tmp_path), "PLN107").startswith("job.yaml:6:")


def test_estimate_takes_the_limit():
    words = ["estimate", *WORDS, "--tp", "2", "--zero", "1", "--recompute", "full", "--format", "json"]
    free = json.loads(planner(*words).stdout)
    risk = free["estimate"]["memory"]["oom_probability"]
    strict = json.loads(planner(*words, "--max-oom-probability", str(risk / 2)).stdout)
    assert (free["estimate"]["memory"]["fits"], strict["estimate"]["memory"]["fits"]) == (True, False)
    assert free["choice"] is None


@pytest.mark.parametrize("command", [SMALL, ["estimate", *WORDS], ["check", "missing.json"]])
@pytest.mark.parametrize("value", ["0", "1", "-0.1", "1.5", "nan", "inf"])
def test_bad_limits_are_one_line(command, value):
    message = one_line_error(planner(*command, "--max-oom-probability", value), "PLN107")
    assert message.startswith("PLN107 --max-oom-probability ")
    assert len(message.splitlines()) == 1


def test_bad_limits_from_python():
    with pytest.raises(InputError, match="PLN107"):
        api.check("missing.json", max_oom_probability=1.0)
    with pytest.raises(InputError, match="PLN107"):
        api.plan("tiny", "local-cpu", gpus=4, seq_len=256, global_batch=16, precision="fp32", max_oom_probability=0.0)


def test_nothing_fits_under_a_tiny_risk_and_says_why():
    words = ["plan", "tiny", "--hw", "local-cpu", "--gpus", "1", "--seq-len", "256", "--global-batch", "16",
             "--precision", "fp32", "--pin", "micro_batch=16", "--max-oom-probability", "1e-8"]  # fmt: skip
    message = one_line_error(planner(*words), "PLN301", 3)
    assert "is what max_oom_probability 1e-08 leaves of" in message


def test_the_table_shows_intervals_and_near_runners_up():
    text = planner(*SMALL).stdout
    assert "; least certain figure: " in text
    assert "OOM probability" in text
    assert "P(OOM)" in text
    assert "inside this estimate's interval" in text
    step = next(line for line in text.splitlines() if line.startswith("step "))
    assert " to " in step.split("(")[1].split(")")[0]


def test_csv_has_an_interval_and_a_risk_a_row():
    rows = list(csv.DictReader(io.StringIO(planner(*SMALL, "--format", "csv").stdout)))
    assert len(rows) > 1
    for row in rows:
        assert float(row["step_time_low_s"]) < float(row["step_time_s"]) < float(row["step_time_high_s"])
        assert float(row["peak_low_gib"]) < float(row["peak_gib"]) < float(row["peak_high_gib"])
        assert row["step_time_interval"] in ("fitted", "assumed")
        assert 0 <= float(row["oom_probability"]) <= 1


def test_a_calibrated_profile_says_so(tmp_path):
    own = {"value": 0.07, "provenance": "fitted", "source": "12 runs of ours"}
    data = {"name": "mine", "extends": "h100-sxm", "engines": {"bundled": {"time_error": own, "memory_error": own}}}
    with (tmp_path / "mine.yaml").open("w") as stream:
        YAML(typ="safe", pure=True).dump(data, stream)
    words = ["estimate", WORDS[0], "--hw", "mine.yaml", *WORDS[3:], "--tp", "2", "--recompute", "full"]
    text = planner(*words, cwd=tmp_path).stdout
    assert text.count(", calibrated)") == 2
    interval = json.loads(planner(*words, "--format", "json", cwd=tmp_path).stdout)["estimate"]["interval"]
    assert (interval["relative"], interval["provenance"], interval["source"]) == (0.07, "fitted", "12 runs of ours")
