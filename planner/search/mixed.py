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
from planner.cost.primitives import Blend, Primitives
from planner.cost.schedules import chunk_moments, in_flight_layers
from planner.cost.task import Bools, Ints, LayoutArray, Task
from planner.search import bounds
from planner.search.bounds import BIG, Group
from planner.search.windows import Windows, positions, windows

_ENTRIES = 1_000_000
"""Entries of a table of (rows, ranks, windows) that are worked on at once."""


def blended(g: Group, counts: Ints) -> Group:
    """The group with the primitives of windows; `counts` of shape (rows or 1, 1 or ranks, windows, chunks, kinds)."""
    assert g.stack is not None
    moments = _moments(g)
    if moments is None:
        return replace(g, blended=g.stack.deep(2).blend(counts[..., 0, :]))
    return replace(g, blended=g.stack.deep(2).blend(counts, moments=moments[:, :, None]))


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
    layouts: LayoutArray
    flight: Ints
    """Shape (rows, pp)."""
    moments: Ints | None
    """See `_moments`."""
    modes: tuple[int, ...]
    pp: int

    def take(self, rows: Ints) -> _Held:
        """Some of the rows."""
        moments = None if self.moments is None else self.moments[rows]
        return replace(
            self, stack=self.stack.take(rows), layouts=self.layouts.take(rows), flight=self.flight[rows], moments=moments
        )

    def fits(self, s: int, counts: Ints) -> Bools:
        """Whether rank s of each row can hold `counts` (rows, chunks, kinds) layers; a byte is forgiven for each rounded
        mean."""
        layers = counts.sum(axis=(1, 2))
        if self.moments is None:
            p = self.stack.blend(counts[:, 0], timed=False)
        else:
            p = self.stack.blend(counts, timed=False, moments=self.moments[:, s])
        first, last = np.array([s == 0], dtype=np.int64), np.array([s == self.pp - 1], dtype=np.int64)
        weight = pairs(self.layouts, np.array([s]), layers)
        rounded = len(self.stack.means) > 1  # of one kind the mean is exact
        return fits(p, first, last, self.flight[:, s], layers, weight, self.modes, forgiving=rounded)


def pairs(x: LayoutArray, index: Ints, layers: Ints) -> Ints:
    """(layer, micro-batch) pairs in flight on ranks with `layers` layers; `index` and `layers` broadcast, rows first."""
    schedule, pp, v, m = (
        a.reshape((-1,) + (1,) * (layers.ndim - 1)) for a in (x.schedule, x.pp, x.virtual_stages, x.microbatches)
    )
    return in_flight_layers(schedule, pp, v, m, index, layers)


def fits(
    p: Primitives,
    first: Ints,
    last: Ints,
    flight: Ints,
    layers: Ints,
    weight: Ints,
    modes: tuple[int, ...],
    forgiving: bool = False,
) -> Bools:
    """Whether ranks with `layers` layers fit under some recompute mode, and the optimizer beside them.

    All arguments broadcast; `weight`: (layer, micro-batch) pairs in flight. `forgiving`: a byte of each rounded mean does not
    count.
    """
    forgiven = layers + weight if forgiving else 0
    best = np.zeros(np.broadcast(flight, layers).shape, dtype=bool)
    for mode in modes:
        best = best | (layers * p.state + weight * p.saved(mode) <= bounds.room(p, first, last, flight, mode) + forgiven)
    return np.asarray(best & (step.stage_update_bytes(p, first, last, layers) <= p.capacity + forgiven))


def memory_feasible(task: Task, g: Group) -> Bools:
    """Which rows have any split and recompute that fits.

    Each rank takes as many layers as it can: a window that fits still fits when it loses layers, but for the rounding of
    means, one byte each, which is forgiven. So a row that is excluded surely does not fit; one within those bytes of the
    limit is decided when it is solved.
    """
    assert g.stack is not None
    v, rows = int(g.layouts.virtual_stages[0]), len(g.layouts)
    held = _Held(g.stack, g.layouts, g.flight, _moments(g), g.modes, g.pp)
    w = windows(task.model.kind_of_layer, v, positions(g.n_layers, v))
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
    # Every later rank holds a position, the last one another one if that lacks layers.
    after = held.pp - 1 - s + int(s < held.pp - 1 and not w.whole.all())
    low, high = np.zeros_like(at), np.maximum(w.positions - at - after, 0)
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
    weight = g.weight(np.broadcast_to(layers, (len(g.layouts), g.pp, layers.shape[2])))
    return fits(g.deep, g.first[:, :, None], g.last[:, :, None], g.flight[:, :, None], layers, weight, g.modes)


def excess(g: Group, counts: Ints, mode: int) -> Ints:
    """Bytes beyond what each row may hold when its ranks hold `counts` (ranks, chunks, kinds) layers, all under one recompute
    mode."""
    g = blended(g, counts[None, :, None])
    p, layers = g.deep, counts.sum(axis=(1, 2))[None, :, None]
    weight = g.weight(np.broadcast_to(layers, (len(g.layouts), g.pp, 1)))
    backward = layers * p.state + weight * p.saved(mode) - g.deep_room(mode)
    update = step.stage_update_bytes(p, g.first[:, :, None], g.last[:, :, None], layers) - p.capacity
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
    order = alive[np.argsort(reach[alive], kind="stable")]
    start = 0
    while start < len(order):
        # Rows of similar reach share a table, so that little of it is padding.
        most = int(reach[order[start]]) * 5 // 4 + 1
        width = len(windows(task.model.kind_of_layer, v, max(min(most // v, positions(g.n_layers, v)), 1)).counts)
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
    none = np.zeros_like(layers)
    again = np.where(_fits(g, layers) & w.whole, bounds.least_recompute(g, layers), BIG)
    linear = step.stage_time(p, first, last, layers, none, none)
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
        sizes = np.unique(w.sizes[usable])
        for n in sizes[sizes <= length].tolist():
            candidate = np.minimum(join(best[:, : length + 1 - n], mine[:, w.at[: length + 1 - n, n]]), BIG)
            np.minimum(following[:, n:], candidate, out=following[:, n:])
        best = following
    return best[:, length]
