"""The planner's memory formulas against the storage meter on real runs, every rank of every case.

Predictions may exceed the measurement (a wrong "fits" costs more than a refused layout), most where every micro-batch is
in flight at once, because gradients that do not exist yet are counted.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from launching import HERE, launch
from machines import figure, profile
from metering import CASES

from planner.cost.task import Task
from planner.engines.registry import engine_named
from planner.planfile import Plan
from planner.planning.estimate import estimate_layout

NO_WORKSPACE = profile(workspace=figure("0 GiB"))


def errors(plan: Plan, measured: list[int]) -> list[float]:
    """Predicted over measured, minus one, for each pipeline rank (the worst of its processes)."""
    accounting = engine_named("bundled").accounting
    task = Task(plan.model, plan.job, NO_WORKSPACE, plan.cluster.gpus, accounting)
    share = plan.cluster.gpus // plan.layout.pp
    worst = [max(measured[i * share : (i + 1) * share]) for i in range(plan.layout.pp)]
    stages = estimate_layout(task, plan.layout).memory.stages
    return [s.allocated * 2**30 / m - 1 for s, m in zip(stages, worst, strict=True)]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_predicted_memory(tmp_path: Path, processes: int) -> None:
    path = tmp_path / "peaks.json"
    done = launch([str(HERE / "metering.py"), str(processes), str(path)], 800)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {name: errors(CASES[processes][name], peaks) for name, peaks in json.loads(path.read_text()).items()}
    assert found.keys() == CASES[processes].keys()
    every = np.array([e for row in found.values() for e in row])
    assert every.min() > -0.05, found
    assert every.max() < 0.16, found
    assert np.abs(every).mean() < 0.05, found
