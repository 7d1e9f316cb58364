"""The best even split: a plan for a search that is stopped before it solved a row exactly.

Comes in: the rows of a space with their bounds. Goes out: the fastest layout that spreads the layers evenly and recomputes
all of them in one way. Only an interrupted search asks: the rising target finds the optimum first, and needs no incumbent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.cost import devicetypes, step
from planner.cost.blending import Stack
from planner.cost.primitives import Primitives
from planner.cost.task import Ints, LayoutArray, StageArray, Task, even_runs, splits_backward
from planner.specs.layout import RECOMPUTE_MODES, Layout, even_stages

_PIECE = 1024
"""Rows that are priced at once, the lowest bounds first."""


@dataclass(frozen=True)
class Even:
    """A row split evenly."""

    row: int
    step_ns: int
    layout: Layout


def best_even(
    task: Task,
    x: LayoutArray,
    priced: tuple[Primitives, Stack | None],
    modes: tuple[int, ...],
    order: Ints,
    bound: Ints,
) -> Even | None:
    """The fastest even split under one recompute mode that fits, None when none does.

    `priced`: primitives of the rows, and by kind of layers where the model mixes several (`solve.price`). `order`: rows by
    ascending `bound` (ns), which ends the scan: a row whose bound is not below the best value found cannot be better.
    """
    best: tuple[int, int, int] | None = None
    usable, split = order[_divides(task, x)[order]], splits_backward(x.schedule)
    for start in range(0, len(usable), _PIECE):
        rows = usable[start : start + _PIECE]
        if best is not None and int(bound[rows[0]]) >= best[0]:
            break
        for mode in modes:
            p, stack = priced
            cost = _cost(task, x.take(rows), p.take(rows), None if stack is None else stack.take(rows), mode)
            allowed = cost.fits & ~(split[rows] & (mode > 0))
            times = np.where(allowed, cost.step, np.iinfo(np.int64).max)
            at = int(np.argmin(times))
            if bool(allowed[at]) and (best is None or int(times[at]) < best[0]):
                best = int(times[at]), int(rows[at]), mode
    if best is None:
        return None
    stages = even_stages(task.model.n_layers, int(x.pp[best[1]]), RECOMPUTE_MODES[best[2]])
    return Even(best[1], best[0], x.layout(best[1], stages))


_TRIES = 500
"""Rows whose even split is priced on two device types, the lowest bounds first."""


def first_even(task: Task, x: LayoutArray, modes: tuple[int, ...], order: Ints, bound: Ints) -> Even | None:
    """The same on two device types: layers spread evenly over the stages of both, among the rows with the lowest bounds."""
    best: Even | None = None
    for row in order[:_TRIES].tolist():
        if best is not None and int(bound[row]) >= best.step_ns:
            break
        for mode in modes:
            layout = x.layout(row, even_stages(task.model.n_layers, int(x.pp[row]), RECOMPUTE_MODES[mode]))
            cost = devicetypes.layout_cost(task, layout).total
            if bool(cost.fits[0]) and (best is None or int(cost.step[0]) < best.step_ns):
                best = Even(row, int(cost.step[0]), layout)
    return best


def _divides(task: Task, x: LayoutArray) -> np.ndarray:
    """Rows whose even split is a layout of the space: with chunks, equal ones."""
    return (x.virtual_stages == 1) | (task.model.n_layers % (x.pp * x.virtual_stages) == 0)


def _cost(task: Task, x: LayoutArray, p: Primitives, stack: Stack | None, mode: int) -> step.StepCost:
    """Time and memory of even splits under one recompute mode."""
    if stack is None:
        return step.step_cost(p, x, even_runs(x, task.model.n_layers, mode))
    stages = _every_rank(task, x, mode)
    layouts = [x.layout(row, even_stages(task.model.n_layers, int(x.pp[row]))) for row in range(len(x))]
    return step.step_cost(p, x, stages, step.blended_ranks(task, stack.take(stages.row), layouts, x.microbatches))


def _every_rank(task: Task, x: LayoutArray, mode: int) -> StageArray:
    """One entry a rank: ranks of a model that mixes kinds of layers differ although they hold as many layers."""
    layers = {pp: [s.layers for s in even_stages(task.model.n_layers, pp)] for pp in np.unique(x.pp).tolist()}
    row = np.repeat(np.arange(len(x)), x.pp)
    held = np.concatenate([np.array(layers[pp], dtype=np.int64) for pp in x.pp.tolist()])
    index = np.concatenate([np.arange(pp, dtype=np.int64) for pp in x.pp.tolist()])
    none = np.zeros_like(held)
    return StageArray(row, index, np.ones_like(held), held, held if mode == 1 else none, held if mode == 2 else none)
