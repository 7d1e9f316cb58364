"""The real program under torchrun."""

from __future__ import annotations

import json
from pathlib import Path

import plans
import pytest
from launching import free_port, launch

from planner import planfile


def torchrun(tmp_path: Path, plan: planfile.Plan, processes: int, *extra: str) -> tuple[int, str, Path]:
    path, out = tmp_path / "plan.json", tmp_path / "run"
    planfile.write(plan, path)
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(free_port())]
    done = launch([*command, "-m", "planner.runtime.train", str(path), "--out", str(out), *extra], 800)
    return done.returncode, done.stderr, out


@pytest.mark.timeout(150)
def test_run_writes_metrics_and_summary(tmp_path: Path) -> None:
    plan = plans.plan(pp=2, precision="bf16", recompute="selective")
    code, stderr, out = torchrun(tmp_path, plan, 2, "--steps", "6", "--lr", "0.01")
    assert code == 0, stderr
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(6))
    assert [line["metered"] for line in lines] == [False, False, True, False, False, False]
    assert lines[1]["peak_allocated_bytes"] is None
    assert lines[5]["peak_allocated_bytes"] > 16 * plan.model.total_params / 2
    assert lines[5]["loss"] < lines[0]["loss"]
    assert all(line["grad_norm"] > 0 and line["tokens_per_s"] > 0 and line["mfu"] > 0 for line in lines)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["world_size"] == 2
    assert summary["stage_of_rank"] == [0, 1]
    assert summary["peak_reserved_gib"] == [None, None]
    assert all(peak > 0 for peak in summary["peak_allocated_gib"])
    assert summary["first_loss"] == lines[0]["loss"]
    assert summary["last_loss"] == lines[5]["loss"]
    assert "step     5" in stderr


@pytest.mark.timeout(150)
def test_wrong_world_size_stops_at_once(tmp_path: Path) -> None:
    code, stderr, out = torchrun(tmp_path, plans.plan(dp=4), 2)
    assert code != 0
    assert stderr.count("2 processes were started, the plan needs 4") == 1
    assert not out.exists()
