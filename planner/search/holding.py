"""What the ranks of a pipeline can hold of models that mix kinds of layers; `filling` puts all layers on them.

A window that fits still fits when it loses layers, but for the rounding of means, one byte each, which is forgiven. So a row
that is excluded surely does not fit; one within those bytes of the limit is decided when it is solved.

What a rank holds besides its layers depends on where it is and on which kinds of layers it has, not on how many; that is
computed once for each such pair (`Places`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.cost import peaks, unmade
from planner.cost.blending import HELD, Stack
from planner.cost.schedules import chunk_moments
from planner.cost.task import Bools, Ints
from planner.search.windows import Windows

_STATE, _UPDATING, _ACT = HELD.index("state"), HELD.index("updating"), HELD.index("act0")


@dataclass(frozen=True)
class Places:
    """What ranks at the places of a pipeline have left for layers: the first, the last, and one between them, or every rank
    where devices differ by rank. Kinds of layers by pattern (`Windows.patterns`)."""

    of_rank: Ints
    """Place of each rank."""
    left: Ints
    """Bytes under each recompute mode with nothing in flight, shape (modes, rows, places, patterns)."""
    between: Ints
    """The same on the first rank between two micro-batches, shape (rows, patterns)."""
    beside: Ints
    """Bytes beside the optimizer, shape (rows, places, patterns)."""
    closing: Ints
    """Bytes beside the embedding's reduction when backward ends, on the first rank, shape (rows, patterns)."""
    passed: Ints
    """Bytes of inputs and outputs kept for each chunk-micro-batch in flight, shape (rows, places)."""
    late: unmade.Late
    """Gradients that may not exist yet, each of shape (rows, places)."""
    headed: Ints
    """As `Primitives.headed` on the last rank, shape (rows, places); -1 on others."""
    excess: Ints
    """Of these (`peaks.head_excess`), shape (modes, rows, places, patterns)."""

    @property
    def unmade(self) -> Ints:
        """Bytes of a layer's gradients on the ranks of rows where some may be missing, shape (rows, ranks)."""
        return np.where(self.late.round > 0, self.late.grads, 0)[:, self.of_rank]

    @property
    def unmade_first(self) -> Ints:
        """The same of the embedding's, shape (rows, ranks)."""
        there = np.where((self.late.round > 0), self.late.grads_first, 0)[:, self.of_rank]
        return there * (np.arange(len(self.of_rank)) == 0)


@dataclass(frozen=True)
class Ranks:
    """The ranks of some rows with one pipeline degree and number of chunks."""

    held: Ints
    """Bytes of one layer: states, those beside the optimizer, and activations by recompute mode. Shape (2 + modes, kinds, rows,
    1), with ranks on the last axis where devices differ."""
    flight: Ints
    """Chunk-micro-batches in flight, shape (rows, pp)."""
    moments: Ints
    """Those of each chunk when memory may peak (`schedules.chunk_moments`) by full rounds of micro-batches, shape (rounds, pp,
    moments, chunks). Of no use without chunks."""
    rounds: Ints
    """Which of `moments` each row has."""
    windows: Windows
    modes: tuple[int, ...]
    places: Places

    @property
    def pp(self) -> int:
        """Ranks of a row."""
        return self.flight.shape[1]

    def fits(self, ranks: Ints, rows: Ints, entries: Ints) -> Bools:
        """Whether ranks of rows can hold windows, all of shape (n,); a byte is forgiven for each rounded mean: of one kind it
        is exact."""
        at, several, by_rank = self.places, len(self.held[0]) > 1, self.held.shape[3] > 1
        held = self.held.reshape(*self.held.shape[:2], -1).take(rows * self.pp + ranks if by_rank else rows, axis=2)
        place, pattern = rows * at.passed.shape[1] + at.of_rank[ranks], self.windows.patterns[1][entries]
        there, passed = place * at.beside.shape[2] + pattern, at.passed.ravel()[place]
        kinds, layers, flight = self.windows.kinds[entries], self.windows.layers[entries], self.flight[rows, ranks]
        pairs = self._pairs(ranks, rows, entries)
        weight = pairs.sum(axis=2).max(axis=0)
        whole, saved = np.einsum("nk,fkn->fn", kinds, held[:2]), np.einsum("jnk,fkn->jfn", pairs, held[2:]).max(axis=0)
        if several:  # layers cost their rounded mean each
            whole, saved = -(-whole // layers) * layers, -(-saved // np.maximum(weight, 1)) * weight
        forgiven = layers + weight if several else 0
        state, update = whole[0] - forgiven, whole[1] - forgiven
        late = unmade.Late(*(column.ravel()[place] for column in at.late))
        room = at.left.reshape(len(saved), -1).take(there, axis=1) - flight * passed - state
        if np.any(at.headed >= 0):
            last = peaks.HeadedRank(at.headed.ravel()[place], late.chunks)
            beyond = peaks.beyond_head(last, np.ones_like(ranks), flight, layers, weight)
            excess = at.excess.reshape(len(saved), -1).take(there, axis=1)
            room = room + peaks.spared_by_head(beyond, held[2:, 0], excess)
        fits = saved <= unmade.most_saved(late, (ranks == 0).astype(np.int64), flight, layers, room)
        first = np.nonzero(ranks == 0)[0]
        if len(first):
            row, one, others = rows[first], pattern[first], unmade.left_between(late, flight)[first]
            between = at.between[row, one] - flight[first] * passed[first] - state[first]
            fits[:, first] &= saved[:, first] * others // flight[first] <= between
            fits[:, first] &= state[first] <= at.closing[row, one]
        return np.asarray(fits.any(axis=0) & (update <= at.beside.ravel()[there]))

    def _pairs(self, ranks: Ints, rows: Ints, entries: Ints) -> Ints:
        """(layer, micro-batch) pairs in flight of each kind, shape (moments, n, kinds), at moments of which one decides."""
        if self.windows.chunks == 1:
            return (self.flight[rows, ranks][:, None] * self.windows.kinds[entries])[None]
        # Rows differ in little of what decides this: it is worked out once for each case.
        size = len(self.windows.counts)
        cases, number = np.unique((self.rounds[rows] * self.pp + ranks) * size + entries, return_inverse=True)
        place, entry = np.divmod(cases, size)
        pairs = np.einsum("njc,nck->jnk", self.moments[place // self.pp, place % self.pp], self.windows.counts[entry])
        most = pairs.max(axis=0)
        if np.array_equal(pairs.sum(axis=2).max(axis=0), most.sum(axis=1)):  # a moment has the most of every kind
            pairs = most[None]
        return pairs.take(number.ravel(), axis=1)


def ranks_of(stack: Stack, flight: Ints, microbatches: Ints, w: Windows, modes: tuple[int, ...]) -> Ranks:
    """The ranks of rows with `flight` (rows, pp) in flight, and what they hold besides layers."""
    pp = flight.shape[1]
    places = _places(stack, pp, w.patterns[0], modes)
    full, rounds = np.unique(np.clip(microbatches // pp, 1, 3), return_inverse=True)
    moments = chunk_moments(pp, w.chunks, full * pp) if w.chunks > 1 else np.zeros((1, 1, 1, 1), dtype=np.int64)
    held = np.stack([stack.held[:, name] for name in (_STATE, _UPDATING, *(_ACT + mode for mode in modes))])
    return Ranks(held if stack.ranked else held[..., None], flight, moments, rounds.ravel(), w, modes, places)


def _places(stack: Stack, pp: int, patterns: Bools, modes: tuple[int, ...]) -> Places:
    """What ranks have left, by row, place and pattern of kinds."""
    rank = np.arange(pp)
    of_rank = rank if stack.ranked else np.unique(2 * (rank == pp - 1) + (rank > 0), return_inverse=True)[1].ravel()
    some = np.unique(of_rank, return_index=True)[1]
    first, last = ((some == end).astype(np.int64)[None, :, None] for end in (0, pp - 1))
    p = stack.deep(1 if stack.ranked else 2).besides(patterns[None, None])
    shape = (len(p.capacity), len(some), len(patterns))

    def each(values: Ints) -> Ints:
        return np.ascontiguousarray(np.broadcast_to(values, shape))

    zero = np.zeros(1, dtype=np.int64)
    base, ending = p.capacity - peaks.stage_base_bytes(p, first, last, zero), peaks.endings(p, first, last)
    left = np.stack([each(base - peaks.stage_transient(p, first, last, mode)) for mode in modes])
    between = each(p.capacity - peaks.between_base(p, first, last, zero))[:, 0]
    beside, closing = (each(p.capacity - ending[name].of(zero)) for name in ("update", "closing"))
    late = unmade.Late(*(each(column)[:, :, 0] for column in (p.grads, p.grads_first, p.round, p.chunks)))
    passed = each(peaks.passed_bytes(p, first, last))[:, :, 0].copy()
    headed = each(np.where(last == 1, p.headed, -1))[:, :, 0]
    excess = np.stack([each(peaks.head_excess(p, first, mode)) for mode in modes])
    return Places(of_rank, left, between, beside, closing[:, 0], passed, late, headed, excess)
