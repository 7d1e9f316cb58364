"""How much more memory a device would need: the least with which something fits, exact to one MiB.

The memory test of the search decides every row at once; the amount is bisected, and only rows that fit at the best amount
so far stay in the running.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from planner.cost.blending import Stack
from planner.cost.primitives import Primitives
from planner.cost.task import Ints, LayoutArray, Task
from planner.engines.base import Engine
from planner.search import bounds
from planner.search.solve import group_of, memory_feasible, price, with_limit
from planner.search.space import Space, enumerate_rows
from planner.specs.hardware import HardwareProfile
from planner.units import MIB

MOST_MIB = 1 << 24
"""Extra memory that is looked at: 16 TiB."""


def with_memory(task: Task, extra: int) -> Task:
    """The task on devices with `extra` more bytes; the policy's limits hold of the larger memory."""
    types = tuple(replace(t, hardware=_larger(t.hardware, extra)) for t in task.types)
    return replace(task, hardware=_larger(task.hardware, extra), types=types)


def _larger(hardware: HardwareProfile, extra: int) -> HardwareProfile:
    """The profile with `extra` more bytes on every device."""
    device = hardware.device
    memory = device.memory.model_copy(update={"value": f"{int(device.memory.base) + extra} B"})
    memory.__dict__.pop("base", None)
    return hardware.model_copy(update={"device": device.model_copy(update={"memory": memory})})


def least_extra_memory(task: Task, engine: Engine, space: Space) -> int | None:
    """The least bytes, in whole MiB, by which every device's memory must grow for some layout of the space to fit.

    0 when one fits as it is, None when no layout obeys the rules, or 16 TiB are not enough.
    """
    x = enumerate_rows(task, engine, space).layouts
    if not len(x):
        return None
    p, stack = price(task, x)
    rows = np.arange(len(x))

    def fitting(extra_mib: int) -> Ints:
        return _fitting(with_memory(task, extra_mib * MIB), space.modes, x, p, stack, rows)

    if len(fitting(0)):
        return 0
    low, high = 0, 1024
    while not len(found := fitting(high)):
        low, high = high, 4 * high
        if high > MOST_MIB:
            return None
    rows = found
    while high - low > 1:
        middle = (low + high) // 2
        if len(found := fitting(middle)):
            rows, high = found, middle
        else:
            low = middle
    return high * MIB


def _fitting(task: Task, modes: tuple[int, ...], x: LayoutArray, p: Primitives, stack: Stack | None, rows: Ints) -> Ints:
    """Those of `rows` that fit the task's memory."""
    p, stack = with_limit(task, p, stack)
    found = []
    for chunk in bounds.same_pipeline(x, rows, task.model):
        g = group_of(task, modes, x, p, stack, chunk)
        found.append(chunk[memory_feasible(task, g)])
    return np.concatenate([np.zeros(0, dtype=np.int64), *found])
