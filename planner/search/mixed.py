"""Bounds and the memory test for models that mix kinds of layers: the counterpart of `bounds` over windows of layers.

A rank holds a window of the layer sequence (`windows`), priced by the blend of its kinds (`blending.blend`), and the ranks'
windows join end to end: every recursion here runs over the positions where they meet. That makes the least bottleneck, the
least sum and the least step-wise term each exact on the table of windows; recompute is relaxed to fractions of layers.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from planner.cost import peaks, step
from planner.cost.blending import Stack
from planner.cost.primitives import Blend
from planner.cost.schedules import chunk_moments
from planner.cost.task import Bools, Ints, LayoutArray, Task
from planner.search import bounds, filling
from planner.search.alike import distinct
from planner.search.bounds import BIG, Group
from planner.search.windows import Windows, positions, windows

ENTRIES = 1_000_000
"""Entries of a table of (rows, ranks, windows) that are worked on at once."""
_PIECE = 200_000
"""Windows of one rank that are joined at once, of all rows: no more than caches hold."""


def blended(g: Group, counts: Ints) -> Group:
    """The group with the primitives of windows; `counts` of shape (rows or 1, 1 or ranks, windows, chunks, kinds)."""
    assert g.stack is not None
    moments, deep = _moments(g), g.stack.deep(5 - g.stack.means.ndim)  # a stack by rank has the axis of ranks already
    if moments is None:
        return replace(g, blended=deep.blend(counts[..., 0, :]))
    return replace(g, blended=deep.blend(counts, moments=moments[:, :, None]))


def blend_rank(stack: Stack, x: LayoutArray, s: int, counts: Ints) -> Blend:
    """Primitives of rank s of rows with one v, with `counts` (rows, chunks, kinds) layers."""
    v = int(x.virtual_stages[0])
    return (
        stack.blend(counts[:, 0])
        if v == 1
        else stack.blend(counts, moments=chunk_moments(int(x.pp[0]), v, x.microbatches)[:, s])
    )


def _moments(g: Group) -> Ints | None:
    """Micro-batches of each chunk in flight (`chunk_moments`), shape (rows, ranks, moments, chunks); None without chunks."""
    v = int(g.layouts.virtual_stages[0])
    return chunk_moments(g.pp, v, g.layouts.microbatches) if v > 1 else None


def rows_of(g: Group, rows: Ints) -> Group:
    """Some rows of a group."""
    assert g.stack is not None
    return replace(bounds.rows_of(g, rows), stack=g.stack.take(rows))


# ---- memory --------------------------------------------------------------------------------------------------------


def memory_feasible(task: Task, g: Group) -> Bools:
    """Which rows have any split and recompute that fits: surely not the others (`filling`)."""
    assert g.stack is not None
    v, x = int(g.layouts.virtual_stages[0]), g.layouts
    # With chunks the moments of a rank follow from full rounds of micro-batches, of which no more than three matter.
    some, kind = distinct(np.concatenate([g.stack.bytes, g.flight.T, np.minimum(x.microbatches // x.pp, 3)[None]]))
    w = windows(task.model.kind_of_layer, v, positions(g.n_layers, v))
    return filling.hold_all(g.stack.take(some), g.flight[some], x.microbatches[some], w, g.modes)[kind]


def excess(g: Group, counts: Ints, mode: int) -> Ints:
    """Bytes beyond what each row may hold when its ranks hold `counts` (ranks, chunks, kinds) layers, all under one recompute
    mode."""
    g = blended(g, counts[None, :, None])
    p, layers = g.deep, counts.sum(axis=(1, 2))[None, :, None]
    weight = g.weight(np.broadcast_to(layers, (len(g.layouts), g.pp, 1)))
    update = peaks.stage_update_bytes(p, g.first[:, :, None], g.last[:, :, None], layers) - p.capacity
    return np.asarray(np.maximum(weight * p.saved(mode) - g.left(mode, layers), update).max(axis=(1, 2)))


# ---- time ----------------------------------------------------------------------------------------------------------


def _least_layers(g: Group) -> Ints:
    """Least time of one layer of each kind, shape (kinds, rows)."""
    assert g.stack is not None
    return g.stack.least_layers(g.modes)


def _work(task: Task, g: Group) -> Ints:
    """Least time of all layers for one micro-batch, ns, shape (rows,)."""
    counts = np.array([count for _, count in task.model.kinds], dtype=np.int64)
    return np.asarray((counts[:, None] * _least_layers(g)).sum(axis=0))


def _least_layer(g: Group) -> Ints:
    """Least time of the cheapest kind's layer, shape (rows,)."""
    return np.asarray(_least_layers(g).min(axis=0))


def _base_total(task: Task, g: Group) -> Ints:
    """Least sum of R over ranks, shape (rows,)."""
    return np.asarray(g.extra_time().sum(axis=1) + _work(task, g))


def _least_once(g: Group) -> Ints:
    """Lower bound on max d: what the ends have to do whatever layers they hold, shape (rows,)."""
    p = g.p
    first, last = p.floor_first + p.update_first, p.floor_last + p.update_last
    ends = first + last if g.pp == 1 else np.maximum(first, last)
    return np.maximum(ends[:, 0], 0)


def simple_bound(task: Task, g: Group) -> Ints:
    """Lower bound on T without memory, ns, shape (rows,)."""
    total, extra = _base_total(task, g), g.extra_time().min(axis=1)
    heaviest = _least_layers(g).max(axis=0)
    most = -(-g.n_layers // g.pp) * _least_layer(g)
    slowest = np.maximum(-(-total // g.pp), extra + np.maximum(heaviest, most))
    return bounds.to_step(g, slowest, total, _least_once(g))


def reach_below(task: Task, g: Group, target: int) -> Ints:
    """The most layers that one rank can hold in a plan below `target`, shape (rows,)."""
    room = _allowed_bottleneck(task, g, target) - g.extra_time().min(axis=1)
    by_time = np.where(room < 0, 0, room // np.maximum(_least_layer(g), 1))
    v = g.layouts.virtual_stages
    lacking = -g.n_layers % v  # the last rank's, which count as positions
    return np.minimum(by_time + lacking, (-(-g.n_layers // v) - (g.pp - 1)) * v)


def _allowed_bottleneck(task: Task, g: Group, target: int) -> Ints:
    """The largest R that a plan below `target` can have, shape (rows,)."""
    return bounds.allowed_bottleneck(g, target, _least_once(g), _base_total(task, g))


def target_bound(task: Task, g: Group, target: int) -> Ints:
    """Lower bound on T, valid below `target`: min(bound, target) for each row. ns, shape (rows,)."""
    result = np.full(len(g.layouts), target, dtype=np.int64)
    reach, v = reach_below(task, g, target), int(g.layouts.virtual_stages[0])
    alive = np.nonzero(reach >= v)[0]

    def width(most: int) -> int:
        return len(windows(task.model.kind_of_layer, v, max(min(most // v, positions(g.n_layers, v)), 1)).counts)

    for chunk in bounds.of_similar_reach(reach, alive, ENTRIES // g.pp, width):
        result[chunk] = _table_bound(task, rows_of(g, chunk), target, int(reach[chunk].max()))
    return result


def _table_bound(task: Task, g: Group, target: int, reach: int) -> Ints:
    """`target_bound` for rows whose ranks hold at most `reach` layers."""
    allowed = _allowed_bottleneck(task, g, target)
    w = useful(task, g, reach, target)
    if not len(w.counts):
        return np.full(len(g.layouts), target, dtype=np.int64)
    least = (_base_total(task, g), _least_once(g))
    return chain_bound(g, w, _least_layers(g)[:, :, None], allowed, least, target)


def chain_bound(g: Group, w: Windows, layer: Ints, allowed: Ints, least: tuple[Ints, Ints], target: int) -> Ints:
    """min(bound, target) for each row of a group, from the least max R, sum R and max D over chains of windows.

    No R is above `allowed`, sum R and max D are at least the `least` of them, shape (rows,); a layer of each kind takes `layer`
    at least, shape (kinds, rows, 1 or ranks).
    """
    result, (least_total, least_once) = np.full(len(g.layouts), target, dtype=np.int64), least
    floor = np.einsum("krs,nk->rsn", layer, w.kinds) + g.extra_time()[:, :, None]
    floor = np.where(w.whole & (floor <= allowed[:, None, None]), floor, BIG)
    # What is dearer is worked out for rows that the cheaper leaves below the target: memory, then sums and step-wise terms.
    rows = np.nonzero(_step_of(g, least_maximum(floor, w), least_total, least_once) < target)[0]
    if not len(rows):
        return result
    g = bounds.rows_of(g, rows) if g.stack is None else blended(rows_of(g, rows), w.counts[None, None])
    layers, first, last = w.layers[None, None, :], g.first[:, :, None], g.last[:, :, None]
    linear = layers * (g.deep.forward + g.deep.backward) + step.end_time(g.deep, first, last)
    beside = w.whole & (peaks.stage_update_bytes(g.deep, first, last, layers) <= g.deep.capacity)
    time = np.where(beside, bounds.least_recompute(g, layers), BIG) + linear
    time = np.where(time > allowed[rows, None, None], BIG, time)
    slowest = least_maximum(time, w)
    close = np.nonzero(_step_of(g, slowest, least_total[rows], least_once[rows]) < target)[0]
    if not len(close):
        return result
    once, time = np.broadcast_to(step.stage_once(g.deep, first, last, layers), time.shape)[close], time[close]
    total, step_wise = least_sum(time, w), least_maximum(np.where(time < BIG, once, BIG), w)
    rows, g = rows[close], bounds.rows_of(g, close)
    value = _step_of(g, slowest[close], np.maximum(total, least_total[rows]), np.maximum(step_wise, least_once[rows]))
    result[rows] = np.minimum(value, target)
    return result


def _step_of(g: Group, slowest: Ints, total: Ints, once: Ints) -> Ints:
    """T of rows from max R, sum R and max d, ns; BIG where one of them is."""
    found = (slowest < BIG) & (total < BIG) & (once < BIG)
    return np.where(found, bounds.to_step(g, *(np.where(found, term, 0) for term in (slowest, total, once))), BIG)


def useful(task: Task, g: Group, reach: int, target: int) -> Windows:
    """The windows that a plan below `target` of some row can have, of up to `reach` layers: work of no more than one rank and
    no less than what the other ranks leave. Nothing else need be priced."""
    v = int(g.layouts.virtual_stages[0])
    w = windows(task.model.kind_of_layer, v, max(reach // v, 1))
    room = _allowed_bottleneck(task, g, target) - g.extra_time().min(axis=1)
    work, least = w.kinds @ _least_layers(g), _work(task, g) - (g.pp - 1) * np.maximum(room, 0)
    return w.only(((work <= room) & (work >= least)).any(axis=1))


def least_maximum(values: Ints, w: Windows) -> Ints:
    """The least possible maximum of values[row, s, window of rank s] over chains of windows, shape (rows,); BIG for none."""
    return _chain(values, w, np.maximum)


def least_sum(values: Ints, w: Windows) -> Ints:
    """The least sum of the same, shape (rows,); BIG for none."""
    return _chain(values, w, np.add)


def _chain(values: Ints, w: Windows, join: np.ufunc) -> Ints:
    rows = len(values)
    held = np.zeros((len(w.counts), w.reach + 1), dtype=bool)
    held[np.arange(len(held)), w.sizes] = True
    usable = [np.nonzero(sizes)[0] for sizes in (values < BIG).any(axis=0) @ held]
    if not all(map(len, usable)):
        return np.full(rows, BIG, dtype=np.int64)
    low, high = _meetings(usable, w.positions)
    if any(a > b for a, b in zip(low, high, strict=True)):
        return np.full(rows, BIG, dtype=np.int64)
    piece = max(1, _PIECE // (w.positions * max(map(len, usable))))
    return np.concatenate([_joined(values[i : i + piece], w, join, usable, low, high) for i in range(0, rows, piece)])


def _joined(values: Ints, w: Windows, join: np.ufunc, usable: list[Ints], low: list[int], high: list[int]) -> Ints:
    """`_chain` of a few rows, whose ranks hold windows of `usable` sizes and begin between `low` and `high`."""
    best = np.zeros((len(values), 1), dtype=np.int64)
    for s, sizes in enumerate(usable):
        start = np.arange(low[s + 1], high[s + 1] + 1)[:, None] - sizes
        entry = w.at[np.maximum(start, 0), sizes]
        there = (start >= low[s]) & (start <= high[s]) & (entry >= 0)
        before = best.take(np.where(there, start - low[s], 0), axis=1)
        reached = join(before, values[:, s].take(np.where(there, entry, 0), axis=1))
        best = np.where(there, reached, BIG).min(axis=2, initial=BIG)
    return best[:, 0]


def _meetings(sizes: list[Ints], end: int) -> tuple[list[int], list[int]]:
    """The first and the last position at which each rank, and the end, can begin when ranks hold windows of these sizes."""
    least, most = (np.concatenate([[0], np.cumsum([pick(s) for s in sizes])]) for pick in (np.min, np.max))
    low = np.maximum(least, end - (most[-1] - most))
    high = np.minimum(most, end - (least[-1] - least))
    return low.tolist(), high.tolist()
