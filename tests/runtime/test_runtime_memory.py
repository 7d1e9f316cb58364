"""The planner's memory formulas against the storage meter on real runs, every rank of every case.

Predictions may exceed the measurement (a wrong "fits" costs more than a refused layout), most where every micro-batch is
in flight at once, because gradients that do not exist yet are counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import metering
import numpy as np
import pytest
import worlds
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


QUICK = {
    1: ("one-fp32-none", "one-fp32-full", "one-bf16-selective", "moe-one"),
    2: (
        "dp2-zero0-fp32-m4-none", "dp2-zero1-fp32-m1-full", "dp2-zero1-fp32-m4-full", "dp2-zero2-fp32-m4-none",
        "dp2-zero3-bf16-m4-full", "tp2-bf16", "tp2-gpt-fp32", "cp2-fp32-selective", "dp2-zero3-local-fp32",
        "pp2-1f1b-bf16", "pp2-interleaved-fp32", "pp2-zbv-fp32", "moe-ep2-zero2", "mla-tp2-ep2",
    ),
}  # fmt: skip
"""For the default tier: products in bf16 are slow on many processors."""
PER_JOB = 12


def jobs() -> Iterator[Any]:
    """(processes, cases of one job)."""
    for n, names in QUICK.items():
        yield pytest.param(n, names, id=f"{n}-quick")
    for n, group in CASES.items():
        names = tuple(name for name in group if name not in QUICK.get(n, ()))
        for i in range(0, len(names), PER_JOB):
            yield pytest.param(n, names[i : i + PER_JOB], id=f"{n}-{i}", marks=pytest.mark.slow)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("processes", "names"), list(jobs()))
def test_predicted_memory(processes: int, names: tuple[str, ...]) -> None:
    found = {
        n: errors(CASES[processes][n], peaks) for n, peaks in worlds.run(processes, metering.peaks, processes, names).items()
    }
    every = np.array([e for row in found.values() for e in row])
    assert every.min() > -0.05, found
    assert every.max() < 0.16, found
    assert np.abs(every).mean() < 0.05, found
