"""Full small grids, every row solved by brute force: what bounds and the memory test are held against."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from machines import llama, mixed, mixture, profile, task

from planner.cost.task import Ints, LayoutArray, Task
from planner.engines.base import Engine
from planner.engines.registry import engine_named
from planner.search import bounds, solve
from planner.search.solve import group_of, price, search
from planner.search.space import Space, declared_space
from search.brute import all_rows

FACTORS = (1.0001, 1.02, 1.3, 4.0)
"""Targets over the least exact value of a group."""


@dataclass(frozen=True)
class Grid:
    """A task with the exact value of every row of its space, ns; -1 where nothing fits."""

    task: Task
    engine: Engine
    space: Space
    layouts: LayoutArray
    exact: Ints


@lru_cache(maxsize=8)
def grid(name: str) -> Grid:
    """One of dense, experts, mixed: some rows fit, some do not."""
    if name == "dense":
        model, memory, engine = llama(5, 2048, 16, 8, 5632, 32000), "5.6 GiB", "megatron"
    elif name == "experts":
        model, memory, engine = mixture(4, 1024, 8, 2, 1024), "4.2 GiB", "megatron"
    else:
        model, memory, engine = mixed("alternating", 4, 1024, random.Random(1)), "3.4 GiB", "megatron"
    t = task(model, 8, 1024, 8, engine, profile(memory=memory, node_size=4))
    return solved(t, engine)


def solved(t: Task, engine: str, space: Space | None = None) -> Grid:
    """A grid from a task."""
    e = engine_named(engine)
    space = space or declared_space(t, e, {"micro_batch": [1, 2]}, ["cp"])
    x, values = all_rows(t, e, space)
    return Grid(t, e, space, x, np.array([-1 if v is None else v for v in values], dtype=np.int64))


@lru_cache(maxsize=8)
def tight(name: str) -> Grid:
    """The grid under the lowest memory limit that anything fits under, to the byte."""
    g = grid(name)
    low, high = 0, g.task.limit
    while high - low > 1:
        middle = (low + high) // 2
        found = search(under(g.task, middle), g.engine, g.space, k=1)
        low, high = (low, middle) if found.candidates else (middle, high)
    return solved(under(g.task, high), g.engine.name)


def under(t: Task, limit: int) -> Task:
    """The task under a limit of so many bytes a device."""
    return replace(t, max_memory_fraction=(limit + 0.5) / t.hardware.device.memory.base)


@lru_cache(maxsize=8)
def on_two_types(seed: int) -> Grid:
    """A grid over two device types."""
    from search.test_hetero import instance, values_of

    t, engine, space = instance(seed)
    x, values = values_of(t, engine, space)
    return Grid(t, engine, space, x, np.array([-1 if v is None else v for v in values], dtype=np.int64))


def violations(g: Grid) -> dict[str, int]:
    """Rows on which the memory test is wrong or a bound exceeds the exact value, by what was tested.

    Targets are factors of the least value of a group, and one nanosecond above every value: there what a plan below the target
    can have is least, and a limit derived from it is no larger than it must be.
    """
    x = g.layouts
    p, stack = price(g.task, x)
    found = {"memory": 0, "simple": 0, "target": 0}
    for rows in bounds.same_pipeline(x, np.arange(len(x)), g.task.model):
        group, exact = group_of(g.task, g.space.modes, x, p, stack, rows), g.exact[rows]
        fits, simple = solve.memory_feasible(g.task, group), solve._simple_bound(g.task, group)
        some = exact >= 0
        # The test of mixed models forgives a few bytes, and the search decides those rows: it may only be too lax.
        found["memory"] += int(np.count_nonzero(~fits & some if group.stack else fits != some))
        found["simple"] += int(np.count_nonzero(simple[some] > exact[some]))
        least = int(exact[some].min()) if some.any() else 0
        for target in [*(int(least * f) for f in FACTORS), *(np.unique(exact[some]) + 1).tolist()] if least else ():
            bound = solve._target_bound(g.task, group, target)
            found["target"] += int(np.count_nonzero(bound[some] > np.minimum(exact[some], target)))
    return found
