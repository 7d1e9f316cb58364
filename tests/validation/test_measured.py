"""What `planner run --measure` writes is read by validate and calibrate, and makes the next plan's prediction nearer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import planner
from planner.errors import InputError
from planner.validation import calibrate, measured
from planner.validation.predict import predict_file


@pytest.fixture(scope="module")
def plan():
    return planner.plan(
        "tiny", "local-cpu", gpus=4, seq_len=256, global_batch=16, precision="fp32", pin={"pp": 2}, alternatives=1
    )


def summary(plan, slower: float) -> dict:
    """A run that took `slower` times the prediction and allocated 100 MiB on the worst rank."""
    seconds = plan.estimate.step_time_s * slower
    rate = plan.job.tokens_per_step / seconds / plan.cluster.gpus
    return {
        "step_time_s": seconds, "tokens_per_s_per_gpu": rate, "peak_allocated_gib": [0.05, 100 / 1024, None, 0.05],
        "torch_version": "2.13", "device": "cpu",
    }  # fmt: skip


def write(path: Path, plan, slower: float) -> str:
    path.write_text(json.dumps({"predicted": {}} | measured.measurement(plan, summary(plan, slower))))
    return str(path)


def test_validate_predicts_what_the_plan_predicted(plan, tmp_path):
    """Stages of several sizes and modes are in the plan, not in the columns."""
    (row,) = predict_file(write(tmp_path / "m.json", plan, 1.25)).rows
    assert row.predicted_time == pytest.approx(plan.estimate.step_time_s)
    assert row.time_error == pytest.approx(1 / 1.25 - 1)
    assert row.measured_memory == pytest.approx(100 / 1024)
    assert row.predicted_memory == pytest.approx(plan.estimate.memory.peak_allocated_gib)


def test_calibrate_closes_the_loop(plan, tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.json", plan, 1.5)
    (fit,) = calibrate.calibrate(str(tmp_path), "local-cpu")
    assert (fit.engine, fit.rows) == ("bundled", 3)
    assert abs(fit.after).mean() < 0.3 * abs(fit.before).mean()


def test_other_files_are_refused(tmp_path):
    (tmp_path / "m.json").write_text('{"format": "something"}')
    with pytest.raises(InputError, match=r"m.json is no measurement"):
        predict_file(str(tmp_path / "m.json"))
    (tmp_path / "m.json").unlink()
    with pytest.raises(InputError, match="holds no measurement"):
        predict_file(str(tmp_path))
