"""Why nothing fits: the binding constraint of the closest layout, and the smallest cluster that works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from planner import stopping
from planner.cost import step
from planner.cost.even import even_step_cost
from planner.cost.task import MAX_DEVICES, Ints, LayoutArray, Task, splits_backward
from planner.engines.base import Engine
from planner.search import bounds, hetero, mixed
from planner.search.solve import group_of, memory_feasible, price
from planner.search.space import Rows, Space, enumerate_rows
from planner.specs.layout import RECOMPUTE_MODES, Layout, Stage, even_stages

MAX_TRIES = 400
"""Cluster sizes that are tried before the search for the smallest one gives up."""


@dataclass(frozen=True)
class Nearest:
    """The layout that comes closest to fitting, with an even split and one recompute mode."""

    layout: Layout
    excess_bytes: int
    """Allocated bytes beyond what the device may hold."""


def nearest_layout(task: Task, space: Space, rows: Rows) -> Nearest | None:
    """The row that needs the least extra memory when split evenly, under its best uniform recompute; None without rows."""
    x = rows.layouts
    best: tuple[int, int, int] | None = None
    for mode in space.modes if len(x) else ():
        excess = _even_excess(task, x, mode)
        excess = np.where(splits_backward(x.schedule) & (mode > 0), np.iinfo(np.int64).max, excess)  # nothing is recomputed
        row = int(np.argmin(excess))
        if best is None or int(excess[row]) < best[0]:
            best = (int(excess[row]), row, mode)
    if best is None:
        return None
    return Nearest(x.layout(best[1], _even(task, x, best[1], best[2])), best[0])


def _even(task: Task, x: LayoutArray, row: int, mode: int) -> list[Stage]:
    """The even split of a row under one recompute mode."""
    return even_stages(task.model.n_layers, int(x.pp[row]), RECOMPUTE_MODES[mode], int(x.virtual_stages[row]))


def any_fits(task: Task, engine: Engine, space: Space) -> bool:
    """Whether some layout of the space fits: the exact memory test of every row, without looking for the best.

    Raises KeyboardInterrupt or TimeoutError when stopped (`planner.stopping`).
    """
    x = enumerate_rows(task, engine, space).layouts
    if not len(x):
        return False
    p, stack = price(task, x)
    for chunk in bounds.same_pipeline(x, np.arange(len(x)), task.model):
        stopping.check()
        g = group_of(task, space.modes, x, p, stack, chunk)
        if memory_feasible(task, g).any():
            return True
    return False


def _even_excess(task: Task, x: LayoutArray, mode: int) -> Ints:
    """Bytes beyond what each layout may hold when split evenly under one recompute mode."""
    if task.model.homogeneous and not task.types:
        return even_step_cost(task, x, mode).excess
    p, stack = price(task, x)
    excess = np.full(len(x), np.iinfo(np.int64).max)
    for chunk in bounds.same_pipeline(x, np.arange(len(x)), task.model):
        even = x.layout(int(chunk[0]), _even(task, x, int(chunk[0]), mode))
        g = group_of(task, (mode,), x, p, stack, chunk)
        counts = step.chunks_by_kind(task, even)
        excess[chunk] = mixed.excess(g, counts, mode) if g.stack else hetero.excess(g, counts.sum(axis=(1, 2)), mode)
    return excess


def smallest_cluster(task: Task, engine: Engine, space_of: Callable[[Task], Space], unit: int) -> int | None:
    """The least device count, in whole units (nodes), for which something fits; None when none was found.

    Counts are tried in ascending order, because feasibility is not monotone: divisibility comes and goes.
    """
    limit = task.hardware.max_devices
    a, e = task.accounting, task.job.compute_bytes
    # Of frozen weights only their stored bytes are left; the count starts at the smallest cluster then.
    states = 0.0 if task.job.adapter else min(sum(a.size(h.size, e) for h in rule.update) for rule in a.zero.values())
    least = int(states * task.model.total_params / max(task.limit, 1)) // unit * unit
    if least > MAX_DEVICES:
        return None
    for count in range(max(unit, least), max(unit, least) + MAX_TRIES * unit, unit):
        if limit is not None and count > limit:
            return None
        candidate = replace(task, gpus=count)
        if any_fits(candidate, engine, space_of(candidate)):
            return count
    return None
