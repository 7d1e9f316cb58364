"""Step time against the memory limit: the optimum under each of several limits (epsilon-constraint), each one proved.

The rows are enumerated once. What was proven under a limit goes on to hold under lower ones: a row that does not fit never
fits again, and no row becomes faster, so the bounds and values of one limit are the first bounds of the next.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from planner import stopping
from planner.cost.task import Bools, Ints, LayoutArray, Task
from planner.engines.base import Engine
from planner.search import bounds, solve
from planner.search.solve import Outcome, Progress
from planner.search.space import Space, enumerate_rows

RESOLUTION = 1.0 / 1024
"""The lowest limit and the highest one that nothing fits under are at most this share of the former apart."""


@dataclass(frozen=True)
class Settled:
    """The optimum under one memory limit."""

    task: Task
    """With that limit as `max_memory_fraction`."""
    outcome: Outcome


def memory_front(task: Task, engine: Engine, space: Space, points: int, progress: Progress | None = None) -> Iterator[Settled]:
    """The optimum under `points` memory limits, from the task's own one down to the lowest that anything fits under.

    Limits under which the optimum of a higher one still fits have that same optimum, and are left out. The first outcome is
    `infeasible` when nothing fits at all. Raises KeyboardInterrupt or TimeoutError when stopped; an outcome that was cut short
    says so itself, and is the last.
    """
    started = time.perf_counter()
    rows = enumerate_rows(task, engine, space)
    state = solve._prepare(task, space, rows)
    outcome = solve.settle(state, rows, 1, progress, started)
    yield Settled(task, outcome)
    if outcome.status != "optimal" or outcome.stopped_by or points < 2:
        return
    low = _lowest(state)
    for fraction in np.linspace(task.max_memory_fraction, low, points).tolist()[1:]:
        stopping.check()
        started, lower = time.perf_counter(), replace(task, max_memory_fraction=fraction)
        state = _under(state, lower)
        if _fits_still(state, outcome):
            continue
        outcome = solve.settle(state, rows, 1, progress, started)
        if not outcome.candidates:
            return  # the lowest limit was found fitting, so only an interruption ends here
        yield Settled(lower, outcome)
        if outcome.stopped_by:
            return


def _under(state: solve._State, task: Task) -> solve._State:
    """The state of a search under a lower limit: bounds are kept, and memory tested anew where rows still fitted."""
    p, stack = solve.with_limit(task, state.p, state.stack)
    fits = _fitting(state, task, state.fits)
    nothing = np.zeros(len(state.layouts), dtype=bool)
    bound = np.where(fits, state.bound, bounds.BIG)
    return replace(
        state, task=task, p=p, stack=stack, fits=fits, bound=bound, examined=nothing, known=nothing.copy(), values={}, best={}
    )


def _fitting(state: solve._State, task: Task, candidates: Bools) -> Bools:
    """Which of the candidate rows fit under the task's limit. Exact."""
    x, (p, stack) = state.layouts, solve.with_limit(task, state.p, state.stack)
    fits, rows = np.zeros(len(x), dtype=bool), np.nonzero(candidates)[0]
    for chunk in bounds.same_pipeline(x, rows, task.model):
        stopping.check()
        g = solve.group_of(task, state.space.modes, x, p, stack, chunk)
        fits[chunk] = solve.memory_feasible(task, g)
    return fits


def _lowest(state: solve._State) -> float:
    """The lowest limit, as a share of usable memory, that some row fits under; the state says which fit under its task's."""
    low, high, fits = 0.0, state.task.max_memory_fraction, state.fits
    while high - low > RESOLUTION * high:
        middle = high / 2 if low == 0 else (low * high) ** 0.5
        found = _fitting(state, replace(state.task, max_memory_fraction=middle), fits)
        if found.any():
            high, fits = middle, found
        else:
            low = middle
    return high


def _fits_still(state: solve._State, outcome: Outcome) -> bool:
    """Whether the optimum under a higher limit fits under the state's: then nothing is faster here either."""
    best = outcome.candidates[0]
    x = LayoutArray.of([best.layout], state.task.job)
    return bool(solve._evaluate(state, best.row, best.layout, x).fits[0])


def nondominated(first: Sequence[float], second: Sequence[float]) -> Ints:
    """Indices of the points that no other one beats: not more in both and less in one. Of equal points the first."""
    order = np.lexsort((np.arange(len(first)), np.asarray(second), np.asarray(first)))
    kept, best = [], float("inf")
    for i in order.tolist():
        if second[i] < best:
            kept.append(i)
            best = second[i]
    return np.array(sorted(kept), dtype=np.int64)
