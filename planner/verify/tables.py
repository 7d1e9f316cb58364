"""What each run of layers costs each pipeline rank of many outer rows: exact integers, by code of its own.

Arrays have the shape (rows, ranks, runs). A rank's memory with n layers, n1 of them recomputed selectively and n2 fully, is

    n state + K ((n - n1 - n2) act0 + n1 act1 + n2 act2) + what its place needs + temporaries(strongest mode in use)

(under a split backward n1 = n2 = 0, and output gradients that wait for weight gradients count besides)
while micro-batches run, and must leave room for the optimizer besides; the cost model's own functions give the last two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

from planner.cost import devicetypes, peaks, primitives, step
from planner.cost.blending import blend
from planner.cost.primitives import Primitives
from planner.cost.schedules import chunk_moments, in_flight, put_off
from planner.cost.task import Bools, Ints, LayoutArray, Task, splits_backward
from planner.specs.layout import SCHEDULES, last_rank
from planner.verify.windows import Runs, runs

NEVER = np.int64(1) << 60
"""Stands for an impossible entry; never added to another one."""


@dataclass(frozen=True)
class Priced:
    """Rows with the integers of each kind of layers."""

    task: Task
    layouts: LayoutArray
    kinds: tuple[Primitives, ...]

    def take(self, rows: Ints) -> Priced:
        """Some of the rows."""
        return Priced(self.task, self.layouts.take(rows), tuple(k.take(rows) for k in self.kinds))

    def __len__(self) -> int:
        return len(self.layouts)


def price(task: Task, layouts: LayoutArray) -> Priced:
    """The integers of rows; on two device types with the types on the last axis."""
    if task.types:
        return Priced(task, layouts, devicetypes.kinds_of(task, layouts))
    if task.model.homogeneous:
        return Priced(task, layouts, (primitives.price(task, layouts),))
    each = range(len(task.model.kinds))
    return Priced(task, layouts, tuple(primitives.price(task.only(k), layouts) for k in each))


def batches(x: LayoutArray, rows: Ints) -> Iterator[Ints]:
    """Rows that share the pipeline degree, the number of chunks and where the stages sit: what a table needs."""
    if not len(rows):
        return
    key = x.pp[rows] * (int(x.virtual_stages.max()) + 1) + x.virtual_stages[rows]
    key = key * len(SCHEDULES) + np.where(splits_backward(x.schedule[rows]), x.schedule[rows], 0)
    for value in np.unique(key):
        yield rows[key == value]


_TIMES = frozenset((
    "forward", "backward", "weight", "recompute1", "recompute2", "embedding", "head", "p2p", "credit", "comm", "comm_first",
    "comm_last", "hide", "floor", "floor_first", "floor_last", "update", "update_first", "update_last", "constant",
))  # fmt: skip
"""Fields that memory does not depend on."""


def same_memory(rows: Priced, batch: Ints) -> tuple[Ints, Ints]:
    """(one row of each sort, the sort of every row) of a batch, where rows of a sort hold the same bytes on every rank.

    How many micro-batches wait for their weight gradients is the same for all rows of a batch.
    """
    part = rows.take(batch)
    x = part.layouts
    index = np.arange(int(x.pp[0]), dtype=np.int64)[None, :]
    flight = in_flight(x.schedule[:, None], x.pp[:, None], x.virtual_stages[:, None], x.microbatches[:, None], index)
    names = [f.name for f in fields(Primitives) if f.name not in _TIMES]
    columns = [getattr(kind, name)[:, :, 0] for kind in by_rank(part) for name in names]
    rounds = np.minimum(x.microbatches // x.pp, 3)[:, None]  # what the moments of chunks depend on
    table = np.ascontiguousarray(np.concatenate([*columns, flight, rounds], axis=1))
    sorts: dict[bytes, int] = {}
    sort = np.array([sorts.setdefault(row.tobytes(), len(sorts)) for row in table])
    return batch[np.unique(sort, return_index=True)[1]], sort


_ENTRIES = 400_000
"""Entries of a table that are worked on at once."""


def pieces(rows: Priced, batch: Ints, modes: tuple[int, ...], longest: int) -> list[Ints]:
    """A batch in pieces whose tables stay small; none without rows."""
    if not len(batch):
        return []
    _, pp, width = ranks_of(rows.take(batch[:1]), modes, longest).shape()
    size = max(1, _ENTRIES // (pp * width))
    return [batch[i : i + size] for i in range(0, len(batch), size)]


@dataclass(frozen=True)
class Ranks:
    """Rows of one batch over runs of up to some length; every array broadcasts to (rows, ranks, runs)."""

    p: Primitives
    runs: Runs
    layers: Ints
    """Layers of each run."""
    complete: Bools
    """Runs of which every chunk holds a layer."""
    modes: tuple[int, ...]
    first: Ints
    last: Ints
    flight: Ints
    """Micro-batches (of a chunk each) in flight, K."""
    chunks: int
    pairs: Ints
    """(Layer, micro-batch) pairs in flight."""
    m: Ints
    """Micro-batches of a step, shape (rows,)."""
    constant: Ints
    """ns, shape (rows,)."""
    waiting: Ints
    """Micro-batches (of a chunk each) whose weight gradients wait."""
    credit: Ints
    """What splitting the backward takes off, v-ths of ns, shape (rows,)."""

    @property
    def pp(self) -> int:
        """Pipeline ranks."""
        return self.flight.shape[1]

    def shape(self) -> tuple[int, int, int]:
        """(rows, ranks, runs)."""
        return len(self.m), self.pp, self.layers.shape[2]


def ranks_of(batch: Priced, modes: tuple[int, ...], longest: int) -> Ranks:
    """The tables' inputs for a batch, with runs of up to `longest` places (at least one)."""
    x, model = batch.layouts, batch.task.model
    pp, v = int(x.pp[0]), int(x.virtual_stages[0])
    w = runs(model.kind_of_layer, v, max(1, min(longest, -(-model.n_layers // v) - pp + 1)))
    return ranks_with(batch, modes, w, w.counts[None, None])


def ranks_alone(batch: Priced, modes: tuple[int, ...]) -> Ranks:
    """The same with a single run, for what does not depend on the layers that ranks hold."""
    w = runs(batch.task.model.kind_of_layer, int(batch.layouts.virtual_stages[0]), 1)
    return ranks_with(batch, modes, w, w.counts[None, None, :1])


def ranks_with(batch: Priced, modes: tuple[int, ...], w: Runs, held: Ints) -> Ranks:
    """The same where ranks hold `held` layers in place of those of `w`, shape (rows or 1, ranks or 1, runs, chunks, kinds)."""
    x, model = batch.layouts, batch.task.model
    pp, v = int(x.pp[0]), int(x.virtual_stages[0])
    deep, moments = by_rank(batch), chunk_moments(pp, v, x.microbatches)[:, :, None] if v > 1 else None
    p = deep[0] if len(deep) == 1 else blend(deep, held if v > 1 else held[..., 0, :], model.text_kind, moments)
    index = np.arange(pp, dtype=np.int64)[None, :]
    flight = in_flight(x.schedule[:, None], x.pp[:, None], x.virtual_stages[:, None], x.microbatches[:, None], index)
    split, ends = bool(splits_backward(x.schedule[:1])[0]), (0, last_rank(SCHEDULES[int(x.schedule[0])], pp))
    first, last = ((index == place).astype(np.int64)[:, :, None] for place in ends)
    waiting = put_off(x.schedule[:, None], x.pp[:, None], index)[:, :, None]
    base = batch.kinds[model.text_kind if len(deep) > 1 else 0]
    modes = (0,) if split else modes
    # What ranks share; two types run no split backward (a rule), so their credit is 0.
    constant, credit = (c.max(axis=1) if batch.task.types else c for c in (base.constant, base.credit))
    flight = flight[:, :, None]
    each = held.sum(axis=4)
    pairs = _pairs(w, flight, each, moments)
    layers, complete = each.sum(axis=3), np.all(each > 0, axis=3)
    return Ranks(p, w, layers, complete, modes, first, last, flight, v, pairs, x.microbatches, constant, waiting, credit)


def by_rank(batch: Priced) -> list[Primitives]:
    """The integers of each kind of layers, shape (rows, ranks, 1), or with one rank for all."""
    if not batch.task.types:
        return [Primitives(**{f.name: getattr(k, f.name)[:, None, None] for f in fields(Primitives)}) for k in batch.kinds]
    each = [devicetypes.by_rank(batch.task, batch.layouts, k) for k in batch.kinds]
    return [Primitives(**{f.name: getattr(k, f.name)[:, :, None] for f in fields(Primitives)}) for k in each]


def least_layers(batch: Priced, modes: tuple[int, ...]) -> list[Ints]:
    """Least time of one layer of each kind on any device under any of the modes, ns, shape (rows,)."""
    each = [k.forward + k.backward + np.minimum.reduce([k.again(mode) for mode in modes]) for k in batch.kinds]
    return [k.min(axis=1) for k in each] if batch.task.types else each


def _pairs(w: Runs, flight: Ints, each: Ints, moments: Ints | None) -> Ints:
    """(Layer, micro-batch) pairs that ranks hold when they hold most; `each` has the layers of every chunk on its last axis."""
    if moments is None or w.places * w.chunks == w.n_layers:  # equal chunks
        return flight * (each.sum(axis=3) // w.chunks)
    held = np.stack([(moments[..., j, :] * each).sum(axis=-1) for j in range(moments.shape[-2])])
    return np.asarray(held.max(axis=0))


# ---- memory --------------------------------------------------------------------------------------------------------


def room_by_mode(r: Ranks, modes: tuple[int, ...]) -> list[Ints]:
    """Bytes left for saved activations when each of `modes` is the strongest in use."""
    return peaks.saved_limits(r.p, r.first, r.last, r.flight, r.layers, modes, r.pairs)


def _late(r: Ranks) -> Ints:
    """Bytes of the output gradients that wait for weight gradients."""
    return r.waiting * (r.layers // r.chunks) * r.p.deferred


def fits(r: Ranks) -> Bools:
    """Whether a rank can hold a run under any recompute that the modes allow. Exact.

    For each strongest mode, one layer at least is under it, and the others are under what saves most among the weaker ones.
    """
    found = np.zeros(r.shape(), dtype=bool)
    for mode, room in zip(r.modes, room_by_mode(r, r.modes), strict=True):
        if r.chunks > 1:
            saved = r.pairs * r.p.saved(mode) + _late(r)
        else:
            weaker = np.minimum.reduce([r.p.saved(other) for other in r.modes if other <= mode])
            saved = r.flight * (r.p.saved(mode) + (r.layers - 1) * weaker)
        found |= saved <= room
    return found & r.complete & (peaks.stage_update_bytes(r.p, r.first, r.last, r.layers) <= r.p.capacity)


# ---- time ----------------------------------------------------------------------------------------------------------


def least_again(r: Ranks) -> Ints:
    """Least extra time of one layer under any of the modes, ns."""
    return np.minimum.reduce([r.p.again(mode) for mode in r.modes])


def work(r: Ranks) -> Ints:
    """R without recompute, ns."""
    return r.layers * (r.p.forward + r.p.backward) + step.end_time(r.p, r.first, r.last)


def once(r: Ranks) -> Ints:
    """D, ns a step."""
    return np.broadcast_to(step.stage_once(r.p, r.first, r.last, r.layers), r.shape())


def recompute_time(r: Ranks) -> Ints:
    """Exactly the least recompute time of each rank and run under which it fits its memory, ns; NEVER where none does.

    Every number of fully recomputed layers is tried with the fewest selective ones that fit beside it. Raises
    ArithmeticError if recomputing took negative time: then fewest were not fastest.
    """
    if np.any(r.p.recompute1 < 0) or np.any(r.p.recompute2 < 0):
        raise ArithmeticError("recompute takes negative time")
    best = np.full(r.shape(), NEVER)
    beside = r.complete & (peaks.stage_update_bytes(r.p, r.first, r.last, r.layers) <= r.p.capacity)
    rooms = room_by_mode(r, (0, 1, 2))
    if r.chunks > 1:
        for mode in r.modes:
            within = r.pairs * r.p.saved(mode) + _late(r) <= rooms[mode]
            best = np.where(within, np.minimum(best, r.layers * r.p.again(mode)), best)
        return np.where(beside, best, NEVER)
    most = int(r.layers.max()) if 2 in r.modes else 0
    for full in range(most + 1):
        for selective, mode in _selective(r, full, rooms):
            plain = r.layers - selective - full
            bytes_ = r.flight * (plain * r.p.act0 + selective * r.p.act1 + full * r.p.act2)
            allowed = (selective >= 0) & (plain >= 0) & (bytes_ <= rooms[mode]) & ((plain == 0) | (0 in r.modes))
            time = np.where(allowed, selective * r.p.recompute1 + full * r.p.recompute2, NEVER)
            np.minimum(best, time, out=best)
        if np.all((full + 1) * r.p.recompute2 >= best):
            break  # more fully recomputed layers cost more by themselves
    return np.where(beside, best, NEVER)


def _selective(r: Ranks, full: int, rooms: list[Ints]) -> Iterator[tuple[Ints, int]]:
    """(selective layers, strongest mode) worth trying beside `full` fully recomputed layers."""
    rest = np.broadcast_to(r.layers - full, r.shape())
    none = np.zeros_like(rest)
    if 1 not in r.modes:
        if full or 0 in r.modes:
            yield none, 2 if full else 0
        return
    if 0 not in r.modes:
        yield rest, 2 if full else 1
        return
    if not full:
        yield none, 0
    mode, gain = (2 if full else 1), r.flight * (r.p.act0 - r.p.act1)
    short = r.flight * (rest * r.p.act0 + full * r.p.act2) - rooms[mode]
    needed = np.where((short > 0) & (gain > 0), -(-short // np.maximum(gain, 1)), 0)
    yield np.maximum(needed, 0 if full else 1), mode
