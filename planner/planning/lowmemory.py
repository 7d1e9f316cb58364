"""The lowest memory limit under which a job fits a cluster: bisection with the search's exact memory test.

Whatever fits under a limit fits under a higher one, so bisection over the limit is exact up to its resolution (unlike one
over the number of devices, where divisibility comes and goes).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from planner.cost.task import Task
from planner.engines.base import Engine
from planner.planfile import LowestMemory
from planner.search.explain import any_fits
from planner.search.space import Space
from planner.units import GIB

RESOLUTION = 1.0 / 1024
"""The limit that is returned and the highest one proven too low are at most this share of the former apart."""


@dataclass(frozen=True)
class Floor:
    """The task under the lowest limit, and what was proven about it."""

    task: Task
    proof: LowestMemory


def lowest_limit(task: Task, engine: Engine, space: Space) -> Floor | None:
    """The task under the lowest memory limit that some layout of `space` fits under; None when none fits under its own.

    A limit of the risk to run out of memory stays in force beside it.
    """
    if not any_fits(task, engine, space):
        return None
    low, high, tests = 0.0, task.max_memory_fraction, 1
    while high - low > RESOLUTION * high:
        # Between far ends the geometric mean needs fewer steps; the first one has no lower end.
        middle = high / 2 if low == 0 else (low * high) ** 0.5
        tests += 1
        if any_fits(replace(task, max_memory_fraction=middle), engine, space):
            high = middle
        else:
            low = middle
    usable = task.hardware.device.memory.base / GIB
    proof = LowestMemory(
        limit_gib=high * usable, fraction=high, impossible_gib=low * usable, resolution=RESOLUTION, tests=tests
    )
    return Floor(replace(task, max_memory_fraction=high), proof)
