"""What the ranks of a pipeline can hold of models that mix kinds of layers; `filling` puts all layers on them.

A window that fits still fits when it loses layers, but for the rounding of means, one byte each, which is forgiven. So a row
that is excluded surely does not fit; one within those bytes of the limit is decided when it is solved.

What a rank holds besides its layers depends on where it is and on which kinds of layers it has, not on how many; that is
computed once for each such pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.cost import step
from planner.cost.blending import HELD, Stack
from planner.cost.primitives import Blend
from planner.cost.task import Bools, Ints
from planner.search.windows import Windows

_STATE, _UPDATING = HELD.index("state"), HELD.index("updating")


@dataclass(frozen=True)
class Place:
    """What ranks at one place of the pipeline have left for layers; kinds of layers by `pattern`, see `Ranks`."""

    left: Ints
    """Bytes under each recompute mode with nothing in flight, shape (modes, rows, patterns)."""
    between: Ints
    """The same between two micro-batches with one in flight, shape (rows, patterns)."""
    beside: Ints
    """Bytes beside the optimizer, shape (rows, patterns)."""
    closing: Ints
    """Bytes beside the embedding's reduction when backward ends, shape (rows, patterns)."""
    passed: Ints
    """Bytes of inputs and outputs kept for each chunk-micro-batch in flight, shape (rows,)."""
    first: bool


@dataclass(frozen=True)
class Ranks:
    """The ranks of some rows with one pipeline degree and number of chunks."""

    stack: Stack
    flight: Ints
    """Chunk-micro-batches in flight, shape (rows, pp)."""
    moments: Ints
    """Those of each chunk when memory may peak (`schedules.chunk_moments`), shape (rows, pp, moments, chunks)."""
    windows: Windows
    modes: tuple[int, ...]
    pattern: Ints
    """Which kinds of layers each entry of the windows has, as an index into `places`' patterns."""
    places: tuple[Place, ...]
    """By rank; those between the first and the last share one unless devices differ by rank."""

    def fits(self, s: int, rows: Ints, entries: Ints) -> Bools:
        """Whether rank s of `rows` can hold windows; a byte is forgiven for each rounded mean: of one kind it is exact."""
        place, pattern = self.places[s], self.pattern[entries]
        counts, held = self.windows.counts[entries], self.stack.of_rank(s).held.take(rows, axis=2)
        layers, flight, moments = counts.sum(axis=(1, 2)), self.flight[rows, s], self.moments[rows, s]
        whole = np.einsum("rck,kfr->fr", counts, held[:, :-3])
        whole = -(-whole // layers) * layers  # the layers cost their rounded mean each
        pairs = np.einsum("rjc,rck->rjk", moments, counts)
        weight = pairs.sum(axis=2).max(axis=1)
        saved = np.einsum("rjk,kfr->fjr", pairs, held[:, -3:]).max(axis=1)
        saved = -(-saved // np.maximum(weight, 1)) * weight
        forgiven = layers + weight if len(held) > 1 else 0
        saved, held = saved[list(self.modes)], whole[_STATE] - forgiven
        fits = saved <= place.left[:, rows, pattern] - flight * place.passed[rows] - held
        if place.first:
            between = place.between[rows, pattern] - (flight - 1) * place.passed[rows] - held
            fits &= (saved * (flight - 1) // flight <= between) & (held <= place.closing[rows, pattern])
        return np.asarray(fits.any(axis=0) & (whole[_UPDATING] <= place.beside[rows, pattern] + forgiven))


def ranks_of(stack: Stack, flight: Ints, moments: Ints, w: Windows, modes: tuple[int, ...]) -> Ranks:
    """The ranks, and what they hold besides layers."""
    kinds, pattern = np.unique(w.counts.sum(axis=1) > 0, axis=0, return_inverse=True)
    pp = flight.shape[1]
    same = [(s if stack.ranked else 0, s == 0, s == pp - 1) for s in range(pp)]
    each: dict[tuple[int, bool, bool], Place] = {}
    for rank in {key[0] for key in same}:
        p = stack.of_rank(rank).deep(1).blend(kinds.astype(np.int64)[None])
        each |= {key: _place(p, key[1:], modes) for key in set(same) if key[0] == rank}
    return Ranks(stack, flight, moments, w, modes, pattern.ravel(), tuple(each[key] for key in same))


def _place(p: Blend, ends: tuple[bool, bool], modes: tuple[int, ...]) -> Place:
    """What ranks have left that are the first or not, the last or not; `p` by row and pattern of kinds."""
    zero = np.zeros(1, dtype=np.int64)
    first, last = (np.array([int(end)]) for end in ends)
    base, one = p.capacity - step.stage_base_bytes(p, first, last, zero), np.ones(1, dtype=np.int64)
    left = np.stack([base - step.stage_transient(p, first, last, mode) for mode in modes])
    between = p.capacity - step.between_base(p, first, last, one)
    beside, closing = (p.capacity - step.endings(p, first, last)[name].of(zero) for name in ("update", "closing"))
    return Place(left, between, beside, closing, step.passed_bytes(p, first, last)[:, 0], ends[0])
