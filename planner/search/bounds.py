"""Lower bounds on the step time of outer rows, and the exact memory test. All vectorised, all in integers.

Every bound is admissible because it only drops constraints:

* `memory_feasible` is exact for one layer kind: the most layers that each rank can hold, against the layers there are.
* `simple_bound` ignores memory: fractional balance, the pigeonhole rank with ceil(L / pp) layers, the head's rank.
* `target_bound` is for one target G, and valid only below it: the exact smallest bottleneck over all splits, the
  exact smallest recompute sum below the bottleneck that G allows, the smallest optimizer term; all with recompute times
  relaxed to fractions of layers. Callers store min(bound, G).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from planner.cost import step
from planner.cost.blending import Stack
from planner.cost.primitives import Primitives
from planner.cost.schedules import in_flight, in_flight_layers
from planner.cost.task import Bools, Ints, LayoutArray

BIG = np.int64(1) << 60
"""Stands for infinity; two of them never meet in a sum."""
INFINITE = BIG >> 6
"""The last target, ns (208 days): v times it still fits into int64. `planning` refuses jobs whose step could exceed it."""
_CHUNK_RANKS = 65536
_TABLE_ENTRIES = 1_500_000
"""Entries of a bound's table that are worked on at once, to stay inside the caches and the memory."""


@dataclass(frozen=True)
class Group:
    """Rows with one pipeline degree; ranks are the second axis of every array."""

    p: Primitives
    """Fields as columns, shape (rows, 1)."""
    layouts: LayoutArray
    pp: int
    n_layers: int
    modes: tuple[int, ...]
    first: Ints
    """Shape (1, pp): 1 on the first rank."""
    last: Ints
    flight: Ints
    """In-flight chunk-micro-batches, shape (rows, pp)."""
    stack: Stack | None = None
    """Primitives by kind of layers, where the model mixes several; `p` is then that of its last layers."""
    blended: Primitives | None = None
    """Primitives of windows of layers of several kinds, shape (rows, 1, windows): see `mixed`."""

    @property
    def least(self) -> Ints:
        """Layers that a rank holds at least: one a chunk. Shape (rows, 1)."""
        return self.layouts.virtual_stages[:, None]

    @property
    def index(self) -> Ints:
        """Pipeline ranks, shape (1, pp)."""
        return np.arange(self.pp, dtype=np.int64)[None, :]

    @property
    def deep(self) -> Primitives:
        """The primitives with ranks and windows as more axes, shape (rows, 1, 1 or windows)."""
        if self.blended is not None:
            return self.blended
        return Primitives(**{f.name: getattr(self.p, f.name)[:, :, None] for f in fields(self.p)})

    def extra_time(self) -> Ints:
        """Time of a rank without layers (linear form), shape (rows, pp)."""
        zero = np.zeros((1, 1), dtype=np.int64)
        return step.stage_time(self.p, self.first, self.last, zero, zero, zero)

    def room(self, mode: int) -> Ints:
        """Bytes left for layers when the strongest recompute mode is `mode`, shape (rows, pp)."""
        return room(self.p, self.first, self.last, self.flight, mode)

    def deep_room(self, mode: int) -> Ints:
        """The same for every window, shape (rows, pp, 1 or windows)."""
        if self.blended is None:
            return self.room(mode)[:, :, None]
        return room(self.blended, self.first[:, :, None], self.last[:, :, None], self.flight[:, :, None], mode)

    def ends_within(self, layers: Ints, mode: int) -> Bools:
        """Whether ranks with `layers` layers fit when a backward ends, shape (rows, pp, 1 or windows)."""
        place = (self.first[:, :, None], self.last[:, :, None], layers, self.flight[:, :, None])
        return step.stage_update_bytes(self.deep, *place, mode) <= self.p.capacity[:, :, None]

    def act(self, mode: int) -> Ints:
        """Saved bytes of one layer and micro-batch under a mode, shape (rows, 1)."""
        return self.p.saved(mode)

    def weight(self, layers: Ints) -> Ints:
        """(layer, micro-batch) pairs in flight for `layers` on each rank; broadcasts over (rows, pp[, n])."""
        x = self.layouts
        extra = (slice(None),) + (None,) * (layers.ndim - 1)
        index = np.arange(self.pp, dtype=np.int64).reshape((1, self.pp) + (1,) * (layers.ndim - 2))
        return in_flight_layers(x.schedule[extra], x.pp[extra], x.virtual_stages[extra], x.microbatches[extra], index, layers)


def room(p: Primitives, first: Ints, last: Ints, flight: Ints, mode: int) -> Ints:
    """Bytes left for layers when the strongest recompute mode is `mode`; all arguments broadcast."""
    base = step.stage_base_bytes(p, first, last, flight)
    return p.capacity - base - step.stage_transient(p, first, last, mode)


def group_of(p: Primitives, layouts: LayoutArray, n_layers: int, modes: tuple[int, ...]) -> Group:
    """A group from rows that share pp."""
    pp = int(layouts.pp[0])
    index = np.arange(pp, dtype=np.int64)[None, :]
    columns = Primitives(**{f.name: getattr(p, f.name)[:, None] for f in fields(p)})
    x = layouts
    flight = in_flight(x.schedule[:, None], x.pp[:, None], x.virtual_stages[:, None], x.microbatches[:, None], index)
    first, last = (index == 0).astype(np.int64), (index == pp - 1).astype(np.int64)
    return Group(columns, layouts, pp, n_layers, modes, first, last, flight)


# ---- memory --------------------------------------------------------------------------------------------------------


def most_layers(g: Group) -> Ints:
    """The most layers, in whole layers a chunk, that each rank can hold under its best recompute, shape (rows, pp). Exact."""
    best = np.zeros((len(g.layouts), g.pp), dtype=np.int64)
    for mode in g.modes:
        room = g.room(mode)
        if np.all(g.layouts.virtual_stages == 1):
            most = np.where(room < 0, 0, room // (g.p.state + g.flight * g.act(mode)))
        else:
            most = _most_by_bisection(g, room, mode)
        for ending in step.endings(g.p, g.first, g.last, g.flight, mode).values():
            most = np.minimum(most, ending.most(g.p.capacity, g.p.chunks))
        best = np.maximum(best, most)
    return np.minimum(best, g.n_layers) // g.least * g.least  # chunks are equal: a rank holds whole multiples of them


def _most_by_bisection(g: Group, room: Ints, mode: int) -> Ints:
    """The same where in-flight weight is a step function of the layers (virtual stages); it never decreases."""
    low, high = np.zeros_like(room), np.full_like(room, g.n_layers)
    while np.any(low < high):
        middle = (low + high + 1) // 2
        fits = middle * g.p.state + g.weight(middle) * g.act(mode) <= room
        low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
    return low


def memory_feasible(g: Group) -> Bools:
    """Which rows have any split and recompute that fits. Exact, so that a row left over has a finite value."""
    most = most_layers(g)
    return np.all(most >= g.least, axis=1) & (most.sum(axis=1) >= g.n_layers)


# ---- time ----------------------------------------------------------------------------------------------------------


def _base_total(g: Group) -> Ints:
    """Sum of R over ranks without recompute (or with the least that the modes allow), shape (rows,)."""
    return (g.extra_time().sum(axis=1, keepdims=True) + g.n_layers * _least_layer(g))[:, 0]


def _least_layer(g: Group) -> Ints:
    """Least time of one layer and micro-batch, shape (rows, 1)."""
    return least_layer(g.p, g.modes)


def least_layer(p: Primitives, modes: tuple[int, ...]) -> Ints:
    """Least time of one layer and micro-batch under any of the modes."""
    return p.forward + p.backward + np.minimum.reduce([p.again(mode) for mode in modes])


def _least_once(g: Group) -> Ints:
    """Lower bound on max d: every rank's least d over layer counts, and the pigeonhole rank's. Shape (rows,)."""
    most = np.int64(g.n_layers)
    heavy = np.int64(-(-g.n_layers // g.pp))
    p, zero = g.p, np.zeros((1, 1), dtype=np.int64)
    # d is convex in the layers: max of two lines plus a line. Its least value on a range is at an end or at the kink;
    # the larger of the two lines' own least values bounds it from below without looking for the kink.
    slopes = ((p.comm - p.hide + p.update), (p.floor + p.update))
    starts = (
        g.first * (p.comm_first + p.update_first) + g.last * (p.comm_last + p.update_last),
        g.first * (p.floor_first + p.update_first) + g.last * (p.floor_last + p.update_last),
    )
    each = np.maximum(*[s + np.where(k >= 0, g.least, most) * k for k, s in zip(slopes, starts, strict=True)])
    pigeon = np.maximum(*[np.where(k >= 0, heavy, most) * k for k in slopes])
    return np.maximum(np.maximum(each.max(axis=1), pigeon[:, 0]), zero[0, 0])


def to_step(g: Group, slowest: Ints, total: Ints, once: Ints) -> Ints:
    """T of the rows of a group from max R, sum R and max d, ns."""
    column = Primitives(**{f.name: getattr(g.p, f.name)[:, 0] for f in fields(g.p)})
    return step.combine(column, g.layouts, slowest, total, once)


def simple_bound(g: Group) -> Ints:
    """Lower bound on T without memory, ns, shape (rows,)."""
    total, layer = _base_total(g), _least_layer(g)[:, 0]
    extra = g.extra_time()
    heavy = -(-g.n_layers // g.pp) * layer + extra.min(axis=1)
    lone = (extra + g.least * _least_layer(g)).max(axis=1)
    slowest = np.maximum(np.maximum(-(-total // g.pp), heavy), lone)
    return to_step(g, slowest, total, _least_once(g))


def target_bound(g: Group, target: int) -> Ints:
    """Lower bound on T, valid below `target`: min(bound, target) for each row. ns, shape (rows,)."""
    rows = len(g.layouts)
    result = np.full(rows, target, dtype=np.int64)
    least = int(g.least.min())
    reach = reach_below(g, target)
    alive = np.nonzero(reach >= g.least[:, 0])[0]
    if not len(alive):
        return result
    order = alive[np.argsort(reach[alive], kind="stable")]
    start = 0
    while start < len(order):
        # Rows of similar reach share a table, so that little of it is padding.
        width = max(1, int(reach[order[start]]) * 5 // 4 + 1 - least)
        stop = start + max(1, _TABLE_ENTRIES // (g.pp * width))
        stop = min(stop, start + int(np.searchsorted(reach[order[start:]], least + width, side="right")))
        chunk = order[start : max(stop, start + 1)]
        result[chunk] = _table_bound(_rows_of(g, chunk), target, int(reach[chunk].max()))
        start += len(chunk)
    return result


def same_pipeline(x: LayoutArray, rows: Ints, mixes: bool = False) -> list[Ints]:
    """Rows in chunks that share pp and whether they have virtual stages (`mixes`: how many): what a `Group` needs."""
    v = x.virtual_stages[rows] if mixes else (x.virtual_stages[rows] > 1).astype(np.int64)
    most = int(v.max(initial=0)) + 1
    key = x.pp[rows] * most + v
    chunks = []
    for value in np.unique(key):
        same = rows[key == value]
        size = max(64, _CHUNK_RANKS // int(value // most))
        chunks += [same[i : i + size] for i in range(0, len(same), size)]
    return chunks


def _rows_of(g: Group, rows: Ints) -> Group:
    return Group(g.p.take(rows), g.layouts.take(rows), g.pp, g.n_layers, g.modes, g.first, g.last, g.flight[rows])


def _allowed_bottleneck(g: Group, target: int) -> Ints:
    """The largest R that a plan below `target` can have, shape (rows,)."""
    return allowed_bottleneck(g, target, _least_once(g), _base_total(g))


def allowed_bottleneck(g: Group, target: int, once: Ints, total: Ints) -> Ints:
    """The same from lower bounds on max d and on sum R."""
    x = g.layouts
    budget = (target - 1 - g.p.constant[:, 0] - once) * x.virtual_stages - total
    factor = x.virtual_stages * x.microbatches - 1
    return np.where(budget < 0, -1, np.where(factor > 0, budget // np.maximum(factor, 1), BIG // 2))


def reach_below(g: Group, target: int) -> Ints:
    """The most layers that one rank can hold in a plan below `target`, shape (rows,)."""
    room = _allowed_bottleneck(g, target) - g.extra_time().min(axis=1)
    by_time = np.where(room < 0, 0, room // np.maximum(_least_layer(g)[:, 0], 1))
    return np.minimum(by_time, g.n_layers - (g.pp - 1) * g.least[:, 0])


def _table_bound(g: Group, target: int, reach: int) -> Ints:
    """`target_bound` for rows whose ranks hold at most `reach` layers."""
    least = int(g.least.min())
    layers = np.arange(least, reach + 1, dtype=np.int64)[None, None, :]
    again = least_recompute(g, layers)
    again = np.where((layers < g.least[:, :, None]) | (layers > most_layers(g)[:, :, None]), BIG, again)
    layer = (g.p.forward + g.p.backward)[:, :, None]
    time = np.where(again >= BIG, BIG, again + layers * layer + g.extra_time()[:, :, None])
    time = np.where(time > _allowed_bottleneck(g, target)[:, None, None], BIG, time)
    slowest = _smallest_maximum(g, time, layers)
    found = np.nonzero(slowest < BIG)[0]
    result = np.full(len(g.layouts), target, dtype=np.int64)
    if not len(found):
        return result
    sub, again, time = _rows_of(g, found), again[found], time[found]
    once = np.maximum(_least_once(sub), _smallest_once(sub, time, layers))
    base = sub.extra_time().sum(axis=1) + g.n_layers * (sub.p.forward + sub.p.backward)[:, 0]
    first = to_step(sub, slowest[found], np.maximum(base, _base_total(sub)), once)
    result[found] = np.minimum(first, target)
    tight = np.nonzero(first < target)[0]
    extra = _smallest_sum(np.where(time[tight] < BIG, again[tight], BIG), least, g.n_layers)
    within = extra < BIG
    close = _rows_of(sub, tight)
    value = to_step(close, slowest[found][tight], base[tight] + np.where(within, extra, 0), once[tight])
    result[found[tight]] = np.where(within, np.minimum(value, target), target)
    return result


def least_recompute(g: Group, layers: Ints) -> Ints:
    """Lower bound on the time beyond the linear one of ranks with `layers` layers, ns, shape (rows, pp, n).

    Without chunks that is recompute, fractions of layers allowed: the linear program over (selective, full) has its optimum
    at a vertex. With chunks modes are uniform, and the value is exact. BIG when none fits.
    """
    shape = np.broadcast(g.flight[:, :, None], layers).shape
    p = g.deep
    held = layers * p.state
    best = np.full(shape, BIG, dtype=np.int64)
    if np.any(g.layouts.virtual_stages > 1):
        weight = g.weight(np.broadcast_to(layers, shape))
        first, last = g.first[:, :, None], g.last[:, :, None]
        none = np.zeros_like(layers)
        linear = step.stage_time(p, first, last, layers, none, none)
        for mode in g.modes:
            fits = held + weight * p.saved(mode) <= g.deep_room(mode)
            time = step.stage_time(p, first, last, layers, layers if mode == 1 else none, layers if mode == 2 else none)
            best = np.where(fits, np.minimum(best, time - linear), best)
        return best
    pairs = g.flight[:, :, None] * layers
    for strongest in g.modes:
        usable = tuple(m for m in g.modes if m <= strongest)
        short = held + pairs * p.act0 - g.deep_room(strongest)
        best = np.minimum(best, _relaxed(g, layers, short, usable))
    return best


def _relaxed(g: Group, layers: Ints, short: Ints, modes: tuple[int, ...]) -> Ints:
    """Least fractional recompute time that saves `short` bytes with the given modes; BIG when impossible."""
    flight = g.flight[:, :, None].astype(float)
    need = np.maximum(short, 0) / flight  # bytes a micro-batch in flight
    n, p = layers.astype(float), g.deep
    saves = [np.maximum((p.act0 - p.saved(m)).astype(float), 0.0) for m in modes]
    costs = [p.again(m).astype(float) for m in modes]
    best = np.full(short.shape, np.inf)
    for a in range(len(modes)):
        # all layers under one mode, or one mode and no recompute
        best = np.where(n * saves[a] >= need - 0.5, np.minimum(best, n * costs[a]), best)
        for b in range(a + 1, len(modes)):
            gain = saves[b] - saves[a]
            part = np.maximum((need - n * saves[a]) / np.maximum(gain, 1e-9), 0.0)
            possible = (gain > 0) & (part <= n)
            part = np.where(possible, part, 0.0)
            best = np.where(possible, np.minimum(best, (n - part) * costs[a] + part * costs[b]), best)
    return np.where(np.isfinite(best), np.floor(np.where(np.isfinite(best), best, 0) * (1 - 1e-12)), float(BIG)).astype(
        np.int64
    )


def _smallest_maximum(g: Group, values: Ints, layers: Ints) -> Ints:
    """The least possible maximum of values[s, n_s] over splits with sum n_s = L, shape (rows,); BIG when none.

    values grow with n on every rank, so a threshold admits a prefix on each rank, and L layers fit exactly when as
    many entries lie below it: the threshold is an order statistic.
    """
    least = g.least[:, :, None]
    must = np.where(layers == least, values, 0).max(axis=(1, 2))
    more = np.where(layers > least, values, BIG).reshape(len(values), -1)
    rank = g.n_layers - g.pp * g.least[:, 0] - 1
    result = must.copy()
    for r in np.unique(rank):
        rows = np.nonzero(rank == r)[0]
        if r < 0:
            continue
        if r >= more.shape[1]:
            result[rows] = BIG
            continue
        result[rows] = np.maximum(must[rows], np.partition(more[rows], int(r), axis=1)[:, r])
    return np.minimum(result, BIG)


def _smallest_once(g: Group, time: Ints, layers: Ints) -> Ints:
    """The least possible max d over splits whose entries are allowed; 0 where d does not grow with the layers."""
    grows = ((g.p.comm - g.p.hide + g.p.update) >= 0)[:, 0]
    once = step.stage_once(g.deep, g.first[:, :, None], g.last[:, :, None], layers)
    once = np.where(time < BIG, once, BIG)
    least = _smallest_maximum(g, once, layers)
    return np.where(grows & (least < BIG), least, 0)


def _smallest_sum(again: Ints, least: int, n_layers: int) -> Ints:
    """The least sum of again[s, n_s] over splits with sum n_s = L, shape (rows,); BIG when none. Min-plus recursion."""
    rows, pp, width = again.shape
    result = np.zeros(rows, dtype=np.int64)
    # Rows that need no recompute wherever they are allowed need no recursion: any split costs nothing.
    busy = np.nonzero(np.any((again > 0) & (again < BIG), axis=(1, 2)))[0]
    for start in range(0, len(busy), 512):
        chunk = busy[start : start + 512]
        best = np.full((len(chunk), n_layers + 1), BIG, dtype=np.int64)
        best[:, 0] = 0
        for s in range(pp):
            following = np.full_like(best, BIG)
            for i in range(width):
                n = least + i
                if n > n_layers:
                    break
                value = again[chunk, s, i][:, None]
                candidate = np.minimum(best[:, : n_layers + 1 - n] + value, BIG)
                np.minimum(following[:, n:], candidate, out=following[:, n:])
            best = following
        result[chunk] = best[:, n_layers]
    return result
