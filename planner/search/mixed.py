"""Bounds and the memory test for models that mix kinds of layers: the counterpart of `bounds` over windows of layers.

A rank holds a window of the layer sequence (`windows`), priced by the blend of its kinds (`blending.blend`), and the ranks'
windows join end to end: every recursion here runs over the positions where they meet. That makes the least bottleneck, the
least sum and the least step-wise term each exact on the table of windows; recompute is relaxed to fractions of layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from planner.cost import step
from planner.cost.blending import Stack
from planner.cost.primitives import Primitives
from planner.cost.task import Bools, Ints, Task
from planner.search import bounds
from planner.search.bounds import BIG, Group
from planner.search.windows import Windows, windows

_ENTRIES = 1_000_000
"""Entries of a table of (rows, ranks, windows) that are worked on at once."""


def blended(g: Group, counts: Ints) -> Group:
    """The group with the primitives of windows; `counts` of shape (rows or 1, 1 or ranks, windows, kinds)."""
    assert g.stack is not None
    return replace(g, blended=g.stack.deep(2).blend(counts))


def rows_of(g: Group, rows: Ints) -> Group:
    """Some rows of a group."""
    assert g.stack is not None
    return replace(g, p=g.p.take(rows), layouts=g.layouts.take(rows), flight=g.flight[rows], stack=g.stack.take(rows))


def _table(task: Task, g: Group, reach: int) -> tuple[Group, Windows]:
    """The group priced for every window of up to `reach` layers."""
    v = int(g.layouts.virtual_stages[0])
    w = windows(task.model.kind_of_layer, v, max(reach // v, 1))
    return blended(g, w.counts[None, None]), w


# ---- memory --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Held:
    """What the memory test needs of some rows: one pipeline degree, one number of chunks."""

    stack: Stack
    flight: Ints
    """Shape (rows, pp)."""
    v: int
    modes: tuple[int, ...]
    pp: int

    def take(self, rows: Ints) -> _Held:
        """Some of the rows."""
        return replace(self, stack=self.stack.take(rows), flight=self.flight[rows])

    def fits(self, s: int, counts: Ints) -> Bools:
        """Whether rank s of each row can hold `counts` (rows, kinds) layers; a byte is forgiven for each rounded mean."""
        p, flight = self.stack.blend(counts, timed=False), self.flight[:, s]
        layers = counts.sum(axis=1)
        first, last = np.array([s == 0], dtype=np.int64), np.array([s == self.pp - 1], dtype=np.int64)
        return fits(p, first, last, flight, layers, self.v, self.modes, forgiving=True)


def fits(
    p: Primitives, first: Ints, last: Ints, flight: Ints, layers: Ints, v: int, modes: tuple[int, ...], forgiving: bool = False
) -> Bools:
    """Whether ranks with `layers` layers in equal chunks fit under some recompute mode, and the optimizer beside them.

    All arguments broadcast. `forgiving`: a byte of each rounded mean does not count.
    """
    weight = flight * (layers // v)
    forgiven = layers + weight if forgiving else 0
    best = np.zeros(np.broadcast(flight, layers).shape, dtype=bool)
    for mode in modes:
        within = step.stage_update_bytes(p, first, last, layers, flight, mode) <= p.capacity + forgiven
        room = bounds.room(p, first, last, flight, mode) + forgiven
        best = best | ((layers * p.state + weight * p.saved(mode) <= room) & within)
    return np.asarray(best)


def memory_feasible(task: Task, g: Group) -> Bools:
    """Which rows have any split and recompute that fits.

    Each rank takes as many layers as it can: a window that fits still fits when it loses layers, but for the rounding of
    means, one byte each, which is forgiven. So a row that is excluded surely does not fit; one within those bytes of the
    limit is decided when it is solved.
    """
    assert g.stack is not None
    v, rows = int(g.layouts.virtual_stages[0]), len(g.layouts)
    held = _Held(g.stack, g.flight, v, g.modes, g.pp)
    w = windows(task.model.kind_of_layer, v, g.n_layers // v)
    at, alive = np.zeros(rows, dtype=np.int64), np.arange(rows)
    size = np.full(rows, w.positions // g.pp, dtype=np.int64)
    for s in range(g.pp):
        size = _longest(held, s, w, at[alive], size)
        found = size > 0
        at[alive] += size
        if not found.all():
            alive, size, held = alive[found], size[found], held.take(np.nonzero(found)[0])
        if not len(alive):
            break
    result = np.zeros(rows, dtype=bool)
    result[alive] = at[alive] == w.positions
    return result


def _longest(held: _Held, s: int, w: Windows, at: Ints, guess: Ints) -> Ints:
    """The longest window from `at` that rank s of each row can hold, in positions; 0 for none. `guess` is tried first."""
    low, high = np.zeros_like(at), np.maximum(w.positions - at - (held.pp - 1 - s), 0)  # every later rank holds a position
    probe, stride = np.clip(guess, 1, np.maximum(high, 1)), 1
    while len(rows := np.nonzero(low < high)[0]):
        size = probe[rows]
        good = held.take(rows).fits(s, w.counts[w.at[at[rows], size]])
        low[rows] = np.where(good, size, low[rows])
        high[rows] = np.where(good, high[rows], size - 1)
        # Gallop away from the guess, then halve what is left between the two ends.
        near = np.where(low == probe, low + stride, high - stride + 1)
        probe = np.where((near > low) & (near <= high), near, (low + high + 1) // 2)
        stride *= 2
    return low


def _fits(g: Group, layers: Ints) -> Bools:
    """Whether windows fit, shape (rows, ranks, windows)."""
    v = int(g.layouts.virtual_stages[0])
    return fits(g.deep, g.first[:, :, None], g.last[:, :, None], g.flight[:, :, None], layers, v, g.modes)


def excess(task: Task, g: Group, counts: Ints, mode: int) -> Ints:
    """Bytes beyond what each row may hold when its ranks hold `counts` (ranks, kinds) layers, all under one recompute mode."""
    g = blended(g, counts[None, :, None, :])
    p, layers, v = g.deep, counts.sum(axis=1)[None, :, None], g.layouts.virtual_stages[:, None, None]
    weight = g.flight[:, :, None] * -(-layers // v)
    backward = layers * p.state + weight * p.saved(mode) - g.deep_room(mode)
    place = (g.first[:, :, None], g.last[:, :, None], layers, g.flight[:, :, None])
    update = step.stage_update_bytes(p, *place, mode) - p.capacity
    return np.asarray(np.maximum(backward, update).max(axis=(1, 2)))


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
    return np.minimum(by_time, g.n_layers - (g.pp - 1) * g.layouts.virtual_stages)


def _allowed_bottleneck(task: Task, g: Group, target: int) -> Ints:
    """The largest R that a plan below `target` can have, shape (rows,)."""
    return bounds.allowed_bottleneck(g, target, _least_once(g), _base_total(task, g))


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
    value = bounds.to_step(
        g, np.where(found, slowest, 0), np.where(found, np.maximum(total, _base_total(task, g)), 0),
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
