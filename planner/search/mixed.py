"""Bounds and the memory test for models that mix kinds of layers: the counterpart of `bounds` over windows of layers.

A rank holds a window of the layer sequence (`windows`), priced by the blend of its kinds (`step.blend`), and the ranks'
windows join end to end: every recursion here runs over the positions where they meet. That makes the least bottleneck, the
least sum and the least step-wise term each exact on the table of windows; recompute is relaxed to fractions of layers.
"""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np

from planner.cost import step
from planner.cost.primitives import Primitives
from planner.cost.task import Bools, Ints, Task
from planner.search import bounds
from planner.search.bounds import BIG, Group
from planner.search.windows import Windows, windows

_ENTRIES = 1_000_000
"""Entries of a table of (rows, ranks, windows) that are worked on at once."""


def with_kinds(g: Group, kinds: tuple[Primitives, ...]) -> Group:
    """The group with the primitives of each kind of layers, as columns."""
    return replace(g, kinds=tuple(Primitives(**{f.name: getattr(k, f.name)[:, None] for f in fields(k)}) for k in kinds))


def blended(g: Group, counts: Ints, text: int, timed: bool = True) -> Group:
    """The group with the primitives of windows; `counts` of shape (rows or 1, 1 or ranks, windows, kinds)."""
    deep = [Primitives(**{f.name: getattr(p, f.name)[:, :, None] for f in fields(p)}) for p in g.kinds]
    return replace(g, blended=step.blend(deep, counts, text, timed))


def rows_of(g: Group, rows: Ints) -> Group:
    """Some rows of a group."""
    return replace(
        g, p=g.p.take(rows), layouts=g.layouts.take(rows), flight=g.flight[rows], kinds=tuple(p.take(rows) for p in g.kinds)
    )


def _table(task: Task, g: Group, reach: int) -> tuple[Group, Windows]:
    """The group priced for every window of up to `reach` layers."""
    v = int(g.layouts.virtual_stages[0])
    w = windows(task.model.kind_of_layer, v, max(reach // v, 1))
    return blended(g, w.counts[None, None], task.model.text_kind), w


# ---- memory --------------------------------------------------------------------------------------------------------


def memory_feasible(task: Task, g: Group) -> Bools:
    """Which rows have any split and recompute that fits.

    Each rank takes as many layers as it can: a window that fits still fits when it loses layers, but for the rounding of
    means, one byte each, which is forgiven. So a row that is excluded surely does not fit; one within those bytes of the
    limit is decided when it is solved.
    """
    return _greedy(task, g)


def _greedy(task: Task, g: Group) -> Bools:
    """Whether windows that are each as long as possible reach the end."""
    v, rows = int(g.layouts.virtual_stages[0]), len(g.layouts)
    w = windows(task.model.kind_of_layer, v, g.n_layers // v)
    end = w.positions
    at, alive = np.zeros(rows, dtype=np.int64), np.ones(rows, dtype=bool)
    size = np.full(rows, end // g.pp, dtype=np.int64)
    for s in range(g.pp):
        size = np.where(alive, _longest(task, g, s, w, at, size), 0)
        alive &= size > 0
        at = at + size
        if not alive.any():
            break
    return alive & (at == end)


def _longest(task: Task, g: Group, s: int, w: Windows, at: Ints, guess: Ints) -> Ints:
    """The longest window from `at` that rank s of each row can hold, in positions; 0 for none. `guess` is tried first."""
    room = np.maximum(w.positions - at - (g.pp - 1 - s), 0)  # every later rank holds a position
    low, high = np.zeros_like(at), room
    probe = np.clip(guess, 1, np.maximum(room, 1))
    step_size = np.ones_like(at)
    while len(open_ := np.nonzero(low < high)[0]):
        fits = _rank_fits(task, rows_of(g, open_), s, w, at[open_], probe[open_])
        low[open_] = np.where(fits, probe[open_], low[open_])
        high[open_] = np.where(fits, high[open_], probe[open_] - 1)
        # Gallop away from the guess, then halve what is left between the two ends.
        up, down = low + step_size, high - step_size + 1
        near = np.where(low == probe, up, down)
        probe = np.where((near > low) & (near <= high), near, (low + high + 1) // 2)
        step_size = 2 * step_size
    return low


def _rank_fits(task: Task, g: Group, s: int, w: Windows, at: Ints, size: Ints) -> Bools:
    """Whether rank s of each row can hold its window of `size` positions from `at`."""
    counts = w.counts[w.at[at, size]]
    one = replace(g, first=g.first[:, s : s + 1], last=g.last[:, s : s + 1], flight=g.flight[:, s : s + 1])
    one = blended(one, counts[:, None, None, :], task.model.text_kind, timed=False)
    layers = counts.sum(axis=1)[:, None, None]
    forgiven = layers + _in_flight(one, layers)
    return np.asarray(_fits(one, layers, forgiven)[:, 0, 0])


def _fits(g: Group, layers: Ints, forgiven: Ints | int = 0) -> Bools:
    """Whether windows fit under some recompute mode, and the optimizer beside them; shape (rows, ranks, windows)."""
    p, first, last = g.deep, g.first[:, :, None], g.last[:, :, None]
    weight = _in_flight(g, layers)
    best = np.zeros(np.broadcast(g.flight[:, :, None], layers).shape, dtype=bool)
    for mode in g.modes:
        best |= layers * p.state + weight * p.saved(mode) <= g.deep_room(mode) + forgiven
    return best & (step.stage_update_bytes(p, first, last, layers) <= p.capacity + forgiven)


def excess(task: Task, g: Group, counts: Ints, mode: int) -> Ints:
    """Bytes beyond what each row may hold when its ranks hold `counts` (ranks, kinds) layers, all under one recompute mode."""
    g = blended(g, counts[None, :, None, :], task.model.text_kind)
    p, layers, v = g.deep, counts.sum(axis=1)[None, :, None], g.layouts.virtual_stages[:, None, None]
    weight = g.flight[:, :, None] * -(-layers // v)
    backward = layers * p.state + weight * p.saved(mode) - g.deep_room(mode)
    update = step.stage_update_bytes(p, g.first[:, :, None], g.last[:, :, None], layers) - p.capacity
    return np.asarray(np.maximum(backward, update).max(axis=(1, 2)))


def _in_flight(g: Group, layers: Ints) -> Ints:
    """(Layer, micro-batch) pairs in flight; chunks are equal."""
    v = g.layouts.virtual_stages[:, None, None]
    return g.flight[:, :, None] * (layers // v)


# ---- time ----------------------------------------------------------------------------------------------------------


def _work(task: Task, g: Group) -> Ints:
    """Least time of all layers for one micro-batch, ns, shape (rows,)."""
    counts = [count for _, count in task.model.kinds]
    layers = [n * bounds.least_layer(p, g.modes)[:, 0] for n, p in zip(counts, g.kinds, strict=True)]
    return np.asarray(sum(layers, np.zeros(len(g.layouts), dtype=np.int64)))


def _least_layer(g: Group) -> Ints:
    """Least time of the cheapest kind's layer, shape (rows,)."""
    return np.minimum.reduce([bounds.least_layer(p, g.modes)[:, 0] for p in g.kinds])


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
    heaviest = np.maximum.reduce([bounds.least_layer(p, g.modes)[:, 0] for p in g.kinds])
    most = -(-g.n_layers // g.pp) * _least_layer(g)
    slowest = np.maximum(-(-total // g.pp), extra + np.maximum(heaviest, most))
    return step.combine(_column(g.p), g.layouts, slowest, total, _least_once(g))


def _column(p: Primitives) -> Primitives:
    return Primitives(**{f.name: getattr(p, f.name)[:, 0] for f in fields(p)})


def reach_below(task: Task, g: Group, target: int) -> Ints:
    """The most layers that one rank can hold in a plan below `target`, shape (rows,)."""
    room = _allowed_bottleneck(task, g, target) - g.extra_time().min(axis=1)
    by_time = np.where(room < 0, 0, room // np.maximum(_least_layer(g), 1))
    return np.minimum(by_time, g.n_layers - (g.pp - 1) * g.layouts.virtual_stages)


def _allowed_bottleneck(task: Task, g: Group, target: int) -> Ints:
    """The largest R that a plan below `target` can have, shape (rows,)."""
    x = g.layouts
    budget = (target - 1 - g.p.constant[:, 0] - _least_once(g)) * x.virtual_stages - _base_total(task, g)
    factor = x.virtual_stages * x.microbatches - 1
    return np.where(budget < 0, -1, np.where(factor > 0, budget // np.maximum(factor, 1), BIG // 2))


def target_bound(task: Task, g: Group, target: int) -> Ints:
    """Lower bound on T, valid below `target`: min(bound, target) for each row. ns, shape (rows,)."""
    result = np.full(len(g.layouts), target, dtype=np.int64)
    reach, v = reach_below(task, g, target), int(g.layouts.virtual_stages[0])
    alive = np.nonzero(reach >= v)[0]
    order = alive[np.argsort(reach[alive], kind="stable")]
    start = 0
    while start < len(order):
        # Rows of similar reach share a table, so that little of it is padding.
        most = int(reach[order[start]]) * 5 // 4 + 1
        width = len(windows(task.model.kind_of_layer, v, max(min(most, g.n_layers) // v, 1)).counts)
        stop = start + max(1, _ENTRIES // (g.pp * width))
        stop = min(stop, start + int(np.searchsorted(reach[order[start:]], most, side="right")))
        chunk = order[start : max(stop, start + 1)]
        result[chunk] = _table_bound(task, rows_of(g, chunk), target, int(reach[chunk].max()))
        start += len(chunk)
    return result


def _table_bound(task: Task, g: Group, target: int, reach: int) -> Ints:
    """`target_bound` for rows whose ranks hold at most `reach` layers."""
    g, w = _table(task, g, reach)
    layers = w.layers[None, None, :]
    first, last, p = g.first[:, :, None], g.last[:, :, None], g.deep
    again = np.where(_fits(g, layers), bounds.least_recompute(g, layers), BIG)
    linear = layers * (p.forward + p.backward) + step.end_time(p, first, last)
    time = np.where(again >= BIG, BIG, again + linear)
    time = np.where(time > _allowed_bottleneck(task, g, target)[:, None, None], BIG, time)
    once = np.where(time < BIG, step.stage_once(p, first, last, layers), BIG)
    slowest, total, step_wise = least_maximum(time, w), least_sum(time, w), least_maximum(once, w)
    found = (slowest < BIG) & (total < BIG)
    column = _column(g.p)
    value = step.combine(
        column, g.layouts, np.where(found, slowest, 0), np.where(found, np.maximum(total, _base_total(task, g)), 0),
        np.maximum(np.where(found, step_wise, 0), _least_once(g)),
    )  # fmt: skip
    return np.where(found, np.minimum(value, target), target)


def least_maximum(values: Ints, w: Windows) -> Ints:
    """The least possible maximum of values[row, s, window of rank s] over chains of windows, shape (rows,); BIG for none."""
    return _chain(values, w, np.maximum)


def least_sum(values: Ints, w: Windows) -> Ints:
    """The least sum of the same, shape (rows,); BIG for none."""
    return _chain(values, w, np.add)


def _chain(values: Ints, w: Windows, join: np.ufunc) -> Ints:
    rows, pp, _ = values.shape
    length = w.positions
    best = np.full((rows, length + 1), BIG, dtype=np.int64)
    best[:, 0] = 0
    for s in range(pp):
        following = np.full_like(best, BIG)
        mine = values[:, s]
        usable = np.nonzero((mine < BIG).any(axis=0))[0]
        sizes = np.unique(w.layers[usable]) // w.chunks
        for n in sizes[sizes <= length].tolist():
            candidate = np.minimum(join(best[:, : length + 1 - n], mine[:, w.at[: length + 1 - n, n]]), BIG)
            np.minimum(following[:, n:], candidate, out=following[:, n:])
        best = following
    return best[:, length]
