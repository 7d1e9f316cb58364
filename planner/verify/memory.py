"""Which outer rows fit: every one decided exactly, most of them without a table.

Two arguments settle most rows. One that fits has a witness: a split of which every rank holds its layers, asked exactly. One
whose ranks have too little room all together does not fit: with U_s the most bytes that rank s has left for layers, whatever
kinds they are of, and w_ks the least that a layer of kind k takes there (its states, and its saved activations under the mode
that saves least, for as many micro-batches as are surely in flight), a rank's layers weigh sum w_k <= U_s / rho_s in units of
the weights w_k of one of the ranks, where rho_s = min_k w_ks / w_k. Less than all layers weigh together is too little. The
rows in between are decided on the table of every rank and run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.cost import peaks
from planner.cost.primitives import Primitives
from planner.cost.schedules import chunk_moments
from planner.cost.task import Bools, Floats, Ints
from planner.verify import chains, tables
from planner.verify.report import Progress
from planner.verify.tables import Priced, Ranks
from planner.verify.windows import runs

_SLACK = 1e-9
"""Relative, for the rounding of floats: the sums are of a few hundred terms."""


def fitting(rows: Priced, modes: tuple[int, ...], progress: Progress) -> Bools:
    """Which rows have any split and recompute that fits the memory. Exact."""
    answer = np.zeros(len(rows), dtype=bool)
    done, longest = 0, rows.task.model.n_layers
    for batch in tables.batches(rows.layouts, np.arange(len(rows))):
        some, sort = tables.same_memory(rows, batch)
        room = room_of(rows.take(some), modes)
        open_ = some[room.enough]
        seen = witnessed(rows.take(open_), modes, room.take(room.enough))
        answer[open_] = seen
        for piece in tables.pieces(rows, open_[~seen], modes, longest):
            r = tables.ranks_of(rows.take(piece), modes, longest)
            answer[piece] = chains.exists(tables.fits(r), r.runs)
            progress("memory of rows", done, len(rows))
        answer[batch] = answer[some][sort]
        done += len(batch)
    return answer


@dataclass(frozen=True)
class Room:
    """How many layers the ranks of some rows have room for at most, by weight."""

    ranks: Floats
    """What each rank can hold, shape (rows, ranks)."""
    layer: Floats
    """Weight of a layer of each kind, shape (kinds, rows)."""
    enough: Bools
    """Whether all layers could be held, shape (rows,): surely not where this is false."""

    def take(self, rows: Bools) -> Room:
        """Some of the rows."""
        return Room(self.ranks[rows], self.layer[:, rows], self.enough[rows])


def room_of(batch: Priced, modes: tuple[int, ...]) -> Room:
    """The room of the ranks of rows that share a table."""
    r = tables.ranks_of(batch, modes, 1)
    # One place has the least besides layers: more of them have at least its kinds, and peaks are those of the largest kind.
    # A byte for what `saved_limit` rounds down on the first rank.
    rooms = [room + r.layers * _states(r.p) for room in tables.room_by_mode(r, r.modes)]
    spared = np.maximum.reduce([np.maximum(peaks.head_excess(r.p, r.first, mode), 0) for mode in r.modes])
    rooms = [room + np.where((r.p.headed >= 0) & (r.last == 1), spared, 0) for room in rooms]  # at most
    most = np.maximum.reduce(rooms).max(axis=2) + 1
    room = np.broadcast_to(most, (len(batch), r.pp)).astype(float)
    flight = _surely_in_flight(batch, r)
    takes = np.stack([np.broadcast_to(_layer_bytes(k, flight, r.modes), room.shape) for k in tables.by_rank(batch)]).astype(
        float
    )
    layer = np.maximum(takes[:, :, r.pp // 2], 1.0)
    ranks = np.maximum(room, 0.0) / np.maximum((takes / layer[:, :, None]).min(axis=0), 1e-300)
    model = batch.task.model
    counts = [n for _, n in model.kinds] if len(takes) > 1 else [model.n_layers]
    whole = sum((n * each for n, each in zip(counts, layer, strict=True)), np.zeros(len(batch)))
    one = np.all(room >= r.chunks * takes.min(axis=0) * (1 - _SLACK), axis=1)  # a layer in every chunk
    return Room(ranks, layer, one & (ranks.sum(axis=1) * (1 + _SLACK) >= whole))


def _layer_bytes(kind: Primitives, flight: Ints, modes: tuple[int, ...]) -> Ints:
    """The least that a layer takes on a rank while micro-batches run."""
    saved = np.minimum.reduce([kind.saved(mode) for mode in modes])
    return np.asarray(_states(kind)[:, :, 0] + flight * saved[:, :, 0])


def _states(kind: Primitives) -> Ints:
    """Bytes of a layer's states that are surely there when a rank holds the most activations: gradients may be missing
    (`unmade`)."""
    return kind.state - np.where(kind.round > 0, kind.grads, 0)


def _surely_in_flight(batch: Priced, r: Ranks) -> Ints:
    """Micro-batches in flight of every chunk of a rank at one moment, shape (rows, ranks)."""
    if r.chunks == 1:
        return r.flight[:, :, 0]
    return chunk_moments(r.pp, r.chunks, r.m).min(axis=3).max(axis=2)


def witnessed(batch: Priced, modes: tuple[int, ...], room: Room) -> Bools:
    """Rows that surely fit: their layers spread in proportion to the room of the ranks, or evenly, fit on every rank."""
    seen: Bools = np.zeros(len(batch), dtype=bool)
    for ranks in (room.ranks, np.ones_like(room.ranks)):
        left = np.nonzero(~seen)[0]
        if len(left):
            seen[left] = _spread(batch.take(left), modes, ranks[left], room.layer[:, left])
    return seen


def _spread(batch: Priced, modes: tuple[int, ...], ranks: Floats, layer: Floats) -> Bools:
    """Whether the layers fit in proportion to `ranks`, each rank asked exactly."""
    x, kinds = batch.layouts, batch.task.model.kind_of_layer
    pp, v = int(x.pp[0]), int(x.virtual_stages[0])
    w = runs(kinds, v, 1)
    place = w.counts[w.number[: w.places, 1]]  # (places, chunks, kinds)
    weight = np.einsum("pk,kr->rp", place.sum(axis=1), layer)
    whole = np.maximum(ranks.sum(axis=1, keepdims=True), 1e-300)
    reached, wanted = np.cumsum(weight, axis=1), np.cumsum(ranks, axis=1) / whole
    middle = (reached - weight / 2) / reached[:, -1:]
    ends = np.stack([(middle < wanted[:, [s]]).sum(axis=1) for s in range(pp)], axis=1)
    for s in range(pp):  # every rank holds a place
        before = ends[:, s - 1] if s else 0
        ends[:, s] = np.clip(ends[:, s], before + 1, w.places - (pp - 1 - s))
    ends[:, -1] = w.places
    sums = np.concatenate([np.zeros_like(place[:1]), np.cumsum(place, axis=0)])
    starts = np.concatenate([np.zeros_like(ends[:, :1]), ends[:, :-1]], axis=1)
    held = (sums[ends] - sums[starts])[:, :, None]
    return np.asarray(tables.fits(tables.ranks_with(batch, modes, w, held))[:, :, 0].all(axis=1))
