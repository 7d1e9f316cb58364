"""Lower bounds on the step time of outer rows, and the exact memory test. All vectorised, all in integers.

Every bound is admissible because it only drops constraints:

* `memory_feasible` is exact for one layer kind: the most layers that each rank can hold, against the layers there are.
* `simple_bound` ignores memory: fractional balance, the pigeonhole rank with ceil(L / pp) layers, the head's rank.
* `target_bound` is for one target G, and valid only below it: the exact smallest bottleneck over all splits, the
  exact smallest recompute sum below the bottleneck that G allows, the smallest optimizer term; all with recompute times
  relaxed to fractions of layers. Callers store min(bound, G).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from planner.cost import peaks, step, unmade
from planner.cost.blending import Stack
from planner.cost.primitives import Primitives
from planner.cost.schedules import ends, in_flight, in_flight_layers, put_off
from planner.cost.task import Bools, Ints, LayoutArray, splits_backward
from planner.specs.layout import SCHEDULES
from planner.specs.model import Model

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
    """Fields as columns, shape (rows, 1); (rows, pp) on several device types, for which `hetero` has the bounds."""
    layouts: LayoutArray
    pp: int
    n_layers: int
    modes: tuple[int, ...]
    first: Ints
    """Shape (1, pp): 1 on the first rank."""
    last: Ints
    flight: Ints
    """In-flight chunk-micro-batches, shape (rows, pp)."""
    waiting: Ints
    """Those among them that wait for their weight gradients, shape (rows, pp)."""
    stack: Stack | None = None
    """Primitives by kind of layers, where places matter (`by_place`); `p` is then that of its last layers."""
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
        return self.p.each(lambda column: column[:, :, None])

    def extra_time(self) -> Ints:
        """Time of a rank without layers (linear form), shape (rows, pp)."""
        zero = np.zeros((1, 1), dtype=np.int64)
        return step.stage_time(self.p, self.first, self.last, zero, zero, zero)

    def left(self, mode: int, layers: Ints) -> Ints:
        """Bytes that ranks with `layers` layers may save for backward when the strongest recompute mode is `mode`, shape (rows,
        pp, 1 or windows)."""
        place = (self.first[:, :, None], self.last[:, :, None], self.flight[:, :, None])
        pairs = None
        if np.any(self.p.headed >= 0) and np.any(layers % self.least[:, :, None]):
            shape = np.broadcast_shapes(layers.shape, self.flight[:, :, None].shape)
            pairs = self.weight(np.broadcast_to(layers, shape))
        return peaks.saved_limit(self.deep, *place, layers, mode, pairs)

    def act(self, mode: int) -> Ints:
        """Saved bytes of one layer and micro-batch under a mode, shape (rows, 1)."""
        return self.p.saved(mode)

    def weight(self, layers: Ints) -> Ints:
        """(layer, micro-batch) pairs in flight for `layers` on each rank; broadcasts over (rows, pp[, n])."""
        x = self.layouts
        extra = (slice(None),) + (None,) * (layers.ndim - 1)
        index = np.arange(self.pp, dtype=np.int64).reshape((1, self.pp) + (1,) * (layers.ndim - 2))
        return in_flight_layers(x.schedule[extra], x.pp[extra], x.virtual_stages[extra], x.microbatches[extra], index, layers)

    def kept(self, p: Primitives, layers: Ints, mode: int) -> Ints:
        """Bytes that micro-batches in flight keep of `layers` on each rank under a mode; broadcasts like `weight`."""
        held = self.weight(layers) * p.saved(mode)
        if not np.any(self.waiting):
            return held
        extra = (slice(None), slice(None)) + (None,) * (layers.ndim - 2)
        return held + self.waiting[extra] * (layers // self.chunks) * p.deferred

    @property
    def chunks(self) -> int:
        """v of rows under a split backward, which share it."""
        return int(self.layouts.virtual_stages[0])


def group_of(p: Primitives, layouts: LayoutArray, n_layers: int, modes: tuple[int, ...]) -> Group:
    """A group from rows that share pp, and a schedule where one of them splits its backward: that recomputes nothing."""
    modes = (0,) if splits_backward(layouts.schedule[:1])[0] else modes
    columns = p.each(lambda column: column[:, None])
    return group_by_rank(columns, layouts, n_layers, modes)


def group_by_rank(columns: Primitives, x: LayoutArray, n_layers: int, modes: tuple[int, ...]) -> Group:
    """The same from primitives with ranks on their second axis, or one column for all of them."""
    pp = int(x.pp[0])
    index = np.arange(pp, dtype=np.int64)[None, :]
    flight = in_flight(x.schedule[:, None], x.pp[:, None], x.virtual_stages[:, None], x.microbatches[:, None], index)
    waiting = put_off(x.schedule[:, None], x.pp[:, None], index)
    first, last = ends(x.schedule[:1, None], pp, index)
    return Group(columns, x, pp, n_layers, modes, first, last, flight, waiting)


# ---- memory --------------------------------------------------------------------------------------------------------


def most_layers(g: Group) -> Ints:
    """The most layers, in whole layers a chunk, that each rank can hold under its best recompute, shape (rows, pp). Exact.

    Chunks are equal, so v layers more, one a chunk, weigh v states, as many activations as chunk-micro-batches in flight, and
    as many output gradients as wait for their weight gradients.
    """
    best, v = np.zeros((len(g.layouts), g.pp), dtype=np.int64), g.least
    place, zero = (g.first, g.last, g.flight), np.zeros((1, 1), dtype=np.int64)
    between, base = (g.p.capacity - held(g.p, *place) for held in (peaks.between_base, peaks.stage_base_bytes))
    left = unmade.left_between(g.p, g.flight)
    late = unmade.applies(g.p, g.flight)
    moments = [unmade.moments(g.p, g.first, g.flight, layers) for layers in (zero, v)] if np.any(late) else []
    for mode in g.modes:
        room, state = base - peaks.stage_transient(g.p, g.first, g.last, mode), v * g.p.state
        most = np.where(room < 0, 0, room // (state + g.flight * g.act(mode) + g.waiting * g.p.deferred))
        if moments:
            most = np.where(late, _most_unmade(g, room, mode, *moments), most)
        # Between two micro-batches fewer are in flight, on the first rank.
        others = np.where(between < 0, 0, between // np.maximum(state + left * g.act(mode), 1))
        best = np.maximum(best, np.where(g.first == 1, np.minimum(most, others), most))
    for ending in peaks.endings(g.p, g.first, g.last).values():
        left = g.p.capacity - ending.of(zero)
        best = np.minimum(best, np.where(left < 0, 0, left // np.maximum(ending.state, 1) // v))
    return np.minimum(best, g.n_layers // v) * v


def _most_unmade(g: Group, room: Ints, mode: int, without: Sequence[unmade.Moment], layered: Sequence[unmade.Moment]) -> Ints:
    """The same of ranks some of whose gradients do not exist yet, v layers at a time: every moment is linear in them, and given
    for none and for v."""
    most = np.full(np.broadcast_shapes(room.shape, g.flight.shape), BIG)
    for end, moment in zip(without, layered, strict=True):
        left = room + end.missing
        one = g.least * g.p.state - (moment.missing - end.missing) + moment.part * g.act(mode)
        most = np.minimum(most, np.where(left < 0, 0, left // np.maximum(one, 1)))
    return most


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
    column = g.p.each(lambda column: column[:, 0])
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
    result = np.full(len(g.layouts), target, dtype=np.int64)
    least, reach = int(g.least.min()), reach_below(g, target)
    alive = np.nonzero(reach >= g.least[:, 0])[0]
    for chunk in of_similar_reach(reach, alive, _TABLE_ENTRIES // g.pp, lambda most: most - least):
        result[chunk] = _table_bound(rows_of(g, chunk), target, int(reach[chunk].max()))
    return result


def of_similar_reach(reach: Ints, rows: Ints, entries: int, width: Callable[[int], int]) -> Iterator[Ints]:
    """`rows` in chunks of similar reach, which share a table so that little of it is padding.

    `entries` bounds the rows of a chunk times its table's `width`, the windows of a rank that holds so many layers at most.
    """
    order = rows[np.argsort(reach[rows], kind="stable")]
    start = 0
    while start < len(order):
        most = int(reach[order[start]]) * 5 // 4 + 1
        stop = start + max(1, entries // width(most))
        stop = min(stop, start + int(np.searchsorted(reach[order[start:]], most, side="right")))
        chunk = order[start : max(stop, start + 1)]
        yield chunk
        start += len(chunk)


def by_place(model: Model, virtual_stages: Ints) -> Bools:
    """Where the cost of a rank depends on which layers it holds, not only on how many: kinds mix, or a round is shorter."""
    return np.asarray((model.n_layers % virtual_stages > 0) | (not model.homogeneous))


def same_pipeline(x: LayoutArray, rows: Ints, model: Model) -> list[Ints]:
    """Rows in chunks that share pp and whether they have virtual stages (`by_place`: how many): what a `Group` needs.

    Those that split their backward share their schedule and v besides.
    """
    split, v = splits_backward(x.schedule[rows]), x.virtual_stages[rows]
    v = np.where(split | by_place(model, v), v, (v > 1).astype(np.int64))
    kind = v * len(SCHEDULES) + np.where(split, x.schedule[rows], 0)
    most = int(kind.max(initial=0)) + 1
    key = x.pp[rows] * most + kind
    chunks = []
    for value in np.unique(key):
        same = rows[key == value]
        size = max(64, _CHUNK_RANKS // int(value // most))
        chunks += [same[i : i + size] for i in range(0, len(same), size)]
    return chunks


def rows_of(g: Group, rows: Ints) -> Group:
    """Some rows of a group, without what is kept by kind of layers."""
    return replace(g, p=g.p.take(rows), layouts=g.layouts.take(rows), flight=g.flight[rows], waiting=g.waiting[rows])


def _allowed_bottleneck(g: Group, target: int) -> Ints:
    """The largest R that a plan below `target` can have, shape (rows,)."""
    return allowed_bottleneck(g, target, _least_once(g), _base_total(g))


def allowed_bottleneck(g: Group, target: int, once: Ints, total: Ints) -> Ints:
    """The same from lower bounds on max d and on sum R."""
    x = g.layouts
    budget = (target - 1 - g.p.constant[:, 0] - once) * x.virtual_stages - total + g.p.credit[:, 0]
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
    sub, again, time = rows_of(g, found), again[found], time[found]
    once = np.maximum(_least_once(sub), _smallest_once(sub, time, layers))
    base = sub.extra_time().sum(axis=1) + g.n_layers * (sub.p.forward + sub.p.backward)[:, 0]
    first = to_step(sub, slowest[found], np.maximum(base, _base_total(sub)), once)
    result[found] = np.minimum(first, target)
    tight = np.nonzero(first < target)[0]
    extra = _smallest_sum(np.where(time[tight] < BIG, again[tight], BIG), least, g.n_layers)
    within = extra < BIG
    close = rows_of(sub, tight)
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
    best = np.full(shape, BIG, dtype=np.int64)
    if np.any(g.layouts.virtual_stages > 1):
        everywhere = np.broadcast_to(layers, shape)
        first, last = g.first[:, :, None], g.last[:, :, None]
        none = np.zeros_like(layers)
        linear = step.stage_time(p, first, last, layers, none, none)
        for mode in g.modes:
            fits = g.kept(p, everywhere, mode) <= g.left(mode, layers)
            time = step.stage_time(p, first, last, layers, layers if mode == 1 else none, layers if mode == 2 else none)
            best = np.where(fits, np.minimum(best, time - linear), best)
        return best
    pairs = g.flight[:, :, None] * layers
    for strongest in g.modes:
        usable = tuple(m for m in g.modes if m <= strongest)
        short = pairs * p.act0 - g.left(strongest, layers)
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
