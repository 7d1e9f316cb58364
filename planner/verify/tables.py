"""What each run of layers costs each pipeline rank of many outer rows: exact integers, by code of its own.

Arrays have the shape (rows, ranks, runs). A rank's memory with n layers, n1 of them recomputed selectively and n2 fully, is

    n state + K ((n - n1 - n2) act0 + n1 act1 + n2 act2) + what its place needs + temporaries(strongest mode in use)

while micro-batches run, and must leave room for the optimizer besides; the cost model's own functions give the last two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

from planner.cost import primitives, step
from planner.cost.blending import blend
from planner.cost.primitives import Primitives
from planner.cost.schedules import in_flight
from planner.cost.task import Bools, Ints, LayoutArray, Task
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
    """The integers of rows."""
    if task.model.homogeneous:
        return Priced(task, layouts, (primitives.price(task, layouts),))
    each = range(len(task.model.kinds))
    return Priced(task, layouts, tuple(primitives.price(task.only(k), layouts) for k in each))


def batches(x: LayoutArray, rows: Ints) -> Iterator[Ints]:
    """Rows that share the pipeline degree and the number of chunks: what a table needs."""
    if not len(rows):
        return
    key = x.pp[rows] * (int(x.virtual_stages.max()) + 1) + x.virtual_stages[rows]
    for value in np.unique(key):
        yield rows[key == value]


@dataclass(frozen=True)
class Ranks:
    """Rows of one batch over runs of up to some length; every array broadcasts to (rows, ranks, runs)."""

    p: Primitives
    runs: Runs
    modes: tuple[int, ...]
    first: Ints
    last: Ints
    flight: Ints
    """Micro-batches (of a chunk each) in flight, K."""
    chunks: int
    m: Ints
    """Micro-batches of a step, shape (rows,)."""
    constant: Ints
    """ns, shape (rows,)."""

    @property
    def layers(self) -> Ints:
        """Layers of each run."""
        return self.runs.layers[None, None, :]

    @property
    def pp(self) -> int:
        """Pipeline ranks."""
        return self.flight.shape[1]

    def shape(self) -> tuple[int, int, int]:
        """(rows, ranks, runs)."""
        return len(self.m), self.pp, len(self.runs.counts)


def ranks_of(batch: Priced, modes: tuple[int, ...], longest: int) -> Ranks:
    """The tables' inputs for a batch, with runs of up to `longest` places (at least one)."""
    x, model = batch.layouts, batch.task.model
    pp, v = int(x.pp[0]), int(x.virtual_stages[0])
    w = runs(model.kind_of_layer, v, max(1, min(longest, model.n_layers // v - pp + 1)))
    deep = [Primitives(**{f.name: getattr(k, f.name)[:, None, None] for f in fields(Primitives)}) for k in batch.kinds]
    p = deep[0] if len(deep) == 1 else blend(deep, w.counts[None, None], model.text_kind)
    index = np.arange(pp, dtype=np.int64)[None, :]
    flight = in_flight(x.schedule[:, None], x.pp[:, None], x.virtual_stages[:, None], x.microbatches[:, None], index)
    first, last = ((index == place).astype(np.int64)[:, :, None] for place in (0, pp - 1))
    constant = batch.kinds[model.text_kind if len(deep) > 1 else 0].constant
    return Ranks(p, w, modes, first, last, flight[:, :, None], v, x.microbatches, constant)


# ---- memory --------------------------------------------------------------------------------------------------------


def _room(r: Ranks, mode: int) -> Ints:
    """Bytes left for saved activations when `mode` is the strongest in use."""
    base = step.stage_base_bytes(r.p, r.first, r.last, r.flight) + r.layers * r.p.state
    return r.p.capacity - base - step.stage_transient(r.p, r.first, r.last, mode)


def _weight(r: Ranks) -> Ints:
    """(Layer, micro-batch) pairs in flight; the chunks of a rank are equally long."""
    return r.flight * (r.layers // r.chunks)


def fits(r: Ranks) -> Bools:
    """Whether a rank can hold a run under any recompute that the modes allow. Exact.

    For each strongest mode, one layer at least is under it, and the others are under what saves most among the weaker ones.
    """
    found = np.zeros(r.shape(), dtype=bool)
    for mode in r.modes:
        if r.chunks > 1:
            saved = _weight(r) * r.p.saved(mode)
        else:
            weaker = np.minimum.reduce([r.p.saved(other) for other in r.modes if other <= mode])
            saved = r.flight * (r.p.saved(mode) + (r.layers - 1) * weaker)
        found |= (saved <= _room(r, mode)) & _ends_within(r, mode)
    return found


def _ends_within(r: Ranks, mode: int) -> Bools:
    """Whether there is room when a backward ends and for the optimizer."""
    return np.asarray(step.stage_update_bytes(r.p, r.first, r.last, r.layers, r.flight, mode) <= r.p.capacity)


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
    rooms = [_room(r, mode) for mode in range(3)]
    within = [_ends_within(r, mode) for mode in range(3)]
    if r.chunks > 1:
        for mode in r.modes:
            fits = (_weight(r) * r.p.saved(mode) <= rooms[mode]) & within[mode]
            best = np.where(fits, np.minimum(best, r.layers * r.p.again(mode)), best)
        return best
    most = int(r.layers.max()) if 2 in r.modes else 0
    for full in range(most + 1):
        for selective, mode in _selective(r, full, rooms):
            plain = r.layers - selective - full
            bytes_ = r.flight * (plain * r.p.act0 + selective * r.p.act1 + full * r.p.act2)
            allowed = (selective >= 0) & (plain >= 0) & (bytes_ <= rooms[mode]) & within[mode] & ((plain == 0) | (0 in r.modes))
            time = np.where(allowed, selective * r.p.recompute1 + full * r.p.recompute2, NEVER)
            np.minimum(best, time, out=best)
        if np.all((full + 1) * r.p.recompute2 >= best):
            break  # more fully recomputed layers cost more by themselves
    return best


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
