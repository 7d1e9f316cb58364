"""The memory test of models that mix kinds of layers: can the ranks of a row together hold all layers?

Each rank takes as many layers as it can: a window that fits still fits when it loses layers, but for the rounding of means,
one byte each, which is forgiven. So a row that is excluded surely does not fit; one within those bytes of the limit is
decided when it is solved.

What a rank holds besides its layers depends on where it is and on which kinds of layers it has, not on how many; that is
computed once for each such pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.cost import step
from planner.cost.blending import HELD, Stack
from planner.cost.task import Bools, Ints
from planner.search.windows import Windows

_STATE, _UPDATING = HELD.index("state"), HELD.index("updating")


@dataclass(frozen=True)
class _Place:
    """What ranks at one place of the pipeline have left for layers; kinds of layers by `pattern`, see `_Ranks`."""

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
class _Ranks:
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
    places: tuple[_Place, ...]
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


def hold_all(stack: Stack, flight: Ints, moments: Ints, w: Windows, modes: tuple[int, ...]) -> Bools:
    """Which rows have ranks that together hold all layers; `flight` of shape (rows, pp), `moments` as in `chunk_moments`."""
    ranks, (rows, pp) = _ranks(stack, flight, moments, w, modes), flight.shape
    at, alive = np.zeros(rows, dtype=np.int64), np.arange(rows)
    size = np.full(rows, w.positions // pp, dtype=np.int64)
    for s in range(pp):
        size = _longest(ranks, s, alive, at[alive], size)
        at[alive] += size
        alive, size = alive[size > 0], size[size > 0]
        if not len(alive):
            break
    result = np.zeros(rows, dtype=bool)
    result[alive] = at[alive] == w.positions
    return result


def _ranks(stack: Stack, flight: Ints, moments: Ints, w: Windows, modes: tuple[int, ...]) -> _Ranks:
    """The ranks, and what they hold besides layers."""
    kinds, pattern = np.unique(w.counts.sum(axis=1) > 0, axis=0, return_inverse=True)
    pp = flight.shape[1]
    same = [(s if stack.ranked else 0, s == 0, s == pp - 1) for s in range(pp)]
    each = {key: _place(stack.of_rank(key[0]), kinds.astype(np.int64), key[1:], modes) for key in set(same)}
    return _Ranks(stack, flight, moments, w, modes, pattern.ravel(), tuple(each[key] for key in same))


def _place(stack: Stack, kinds: Ints, ends: tuple[bool, bool], modes: tuple[int, ...]) -> _Place:
    """What ranks have left that are the first or not, the last or not, for layers of `kinds`, shape (patterns, kinds)."""
    p, zero = stack.deep(1).blend(kinds[None]), np.zeros(1, dtype=np.int64)
    first, last = (np.array([int(end)]) for end in ends)
    base, one = p.capacity - step.stage_base_bytes(p, first, last, zero), np.ones(1, dtype=np.int64)
    left = np.stack([base - step.stage_transient(p, first, last, mode) for mode in modes])
    between = p.capacity - step.between_base(p, first, last, one)
    beside, closing = (p.capacity - step.endings(p, first, last)[name].of(zero) for name in ("update", "closing"))
    return _Place(left, between, beside, closing, step.passed_bytes(p, first, last)[:, 0], ends[0])


def _longest(ranks: _Ranks, s: int, rows: Ints, at: Ints, guess: Ints) -> Ints:
    """The longest window from `at` that rank s of `rows` can hold, in positions; 0 for none. `guess` is tried first."""
    w, later = ranks.windows, ranks.flight.shape[1] - 1 - s
    later += int(later > 0 and not w.whole.all())  # the last rank holds another position if the last one lacks layers
    low, high = np.zeros_like(at), np.maximum(w.positions - at - later, 0)  # every later rank holds a position
    probe, stride = np.clip(guess, 1, np.maximum(high, 1)), 1
    while len(open_ := np.nonzero(low < high)[0]):
        size = probe[open_]
        good = ranks.fits(s, rows[open_], w.at[at[open_], size])
        low[open_] = np.where(good, size, low[open_])
        high[open_] = np.where(good, high[open_], size - 1)
        # Gallop away from the guess, then halve what is left between the two ends.
        near = np.where(low == probe, low + stride, high - stride + 1)
        probe = np.where((near > low) & (near <= high), near, (low + high + 1) // 2)
        stride *= 2
    return low
