"""The memory test of models that mix kinds of layers: can the ranks of a row together hold all layers?

Each rank takes as many layers as it can (`holding`), from the first to the last: furthest reach is exact where fewer layers
never need more memory. Most rows are settled before that, by two screens that look at all ranks at once: one of two chains
near an even split fits, or the layers surely weigh more than the ranks can hold.
"""

from __future__ import annotations

import numpy as np

from planner.cost.blending import Stack
from planner.cost.task import Bools, Floats, Ints
from planner.search.holding import Ranks, ranks_of
from planner.search.windows import Windows

_SLACK = 1e-9
"""Relative room for the rounding of the screen's floats."""
_ENTRIES = 2_000_000
"""Entries of the screen's largest array that are worked on at once."""
_FEW = 2048
"""Windows of all rows that are looked at in one go."""


def hold_all(stack: Stack, flight: Ints, microbatches: Ints, w: Windows, modes: tuple[int, ...]) -> Bools:
    """Which rows have ranks that together hold all layers; `flight` of shape (rows, pp)."""
    ranks, (rows, pp) = ranks_of(stack, flight, microbatches, w, modes), flight.shape
    every = np.arange(rows)
    even = np.arange(pp + 1) * w.positions // pp
    result = _holds(ranks, every, np.broadcast_to(even, (rows, pp + 1)))
    left = every[~result]
    if len(left):
        enough, meetings = _weighed(ranks, left)
        left, meetings = left[enough], meetings[enough]
        result[left] = _holds(ranks, left, meetings)
        left = left[~result[left]]
        result[left] = _furthest(ranks, left)
    return result


def _holds(ranks: Ranks, rows: Ints, meetings: Ints) -> Bools:
    """Whether ranks of `rows` fit that meet at these positions, shape (rows, pp + 1)."""
    w, good = ranks.windows, np.ones(len(rows), dtype=bool)
    start = 0
    while start < ranks.pp and len(alive := np.nonzero(good)[0]):
        # A few ranks at once: rows that fail on one of them need no others.
        some = np.arange(start, min(ranks.pp, start + max(1, _FEW // len(alive))))
        entries = w.at[meetings[alive[:, None], some], meetings[alive[:, None], some + 1] - meetings[alive[:, None], some]]
        every = np.broadcast_to(some, entries.shape).ravel(), rows[alive].repeat(len(some)), entries.ravel()
        good[alive] = (w.whole[entries] & ranks.fits(*every).reshape(entries.shape)).all(axis=1)
        start += len(some)
    return good


# ---- the weight of all layers --------------------------------------------------------------------------------------


def _weighed(ranks: Ranks, rows: Ints) -> tuple[Bools, Ints]:
    """(rows whose layers may weigh no more than their ranks hold, where ranks meet that are loaded alike).

    A position of the chain takes the share f of what rank s has left, under its best recompute mode at least. Shares of a rank
    add up to 1 at most, so for any weights a of positions it holds no more than max a / f of them: rows whose positions weigh
    more than their ranks hold together do not fit (weak duality of the linear program).
    """
    w, pp = ranks.windows, ranks.pp
    sorts, first, which = _sorts(w)
    pieces = max(1, _ENTRIES // (3 * sorts.size * pp))
    enough, meetings = np.zeros(len(rows), dtype=bool), np.zeros((len(rows), pp + 1), dtype=np.int64)
    for start in range(0, len(rows), pieces):
        piece = slice(start, start + pieces)
        needed, fitting = _shares(ranks, rows[piece], sorts, first)
        weight = needed[:, :, :, pp // 2].min(axis=0)  # of the positions, as on a rank in the middle
        if not w.whole[w.at[-2, 1]]:  # the last position lacks layers: the last rank's
            fitting[:, which[-1], :, :-1] = 0
        if len(sorts) == 1 + (not w.whole[w.at[-2, 1]]):
            fitting[..., :-1] = np.floor(fitting[..., :-1])
        holds = (weight[:, :, None] * fitting.max(axis=0)).max(axis=0)
        total = weight[which].cumsum(axis=0)
        enough[piece] = (fitting.max(axis=(0, 1)).min(axis=1) >= 1) & (holds.sum(axis=1) >= total[-1])
        meetings[piece] = _alike(total - weight[which] / 2, total[-1], np.maximum(holds, 1e-9))
    return enough, meetings


def _sorts(w: Windows) -> tuple[Ints, Ints, Ints]:
    """Layers of each kind in each chunk by sort of position, shape (sorts, chunks, kinds); a window of each; its sort."""
    alone = w.at[:-1, 1]
    entries, which = np.unique(alone, return_inverse=True)  # windows of equal layers share an entry
    return w.counts[entries], entries, which.ravel()


def _shares(ranks: Ranks, rows: Ints, sorts: Ints, entries: Ints) -> tuple[Floats, Floats]:
    """(bytes that a position needs at least, how many of it a rank has room for), shape (modes, sorts, rows, ranks).

    Of what the chunks save, the mean over the moments counts, which is no more than the most.
    """
    at, flight, held = ranks.places, ranks.flight[rows], ranks.held.take(rows, axis=2).astype(float)
    if ranks.windows.chunks == 1:
        pairs = sorts[:, 0, :, None, None] * flight
    else:
        mean = ranks.moments.sum(axis=2) / np.maximum(ranks.moments.any(axis=3).sum(axis=2), 1)[:, :, None]
        pairs = np.einsum("uck,tsc->ukts", sorts, mean).take(ranks.rounds[rows], axis=2)
    state = np.einsum("uck,krs->urs", sorts, held[0], optimize=True)
    state = state - sorts.sum(axis=(1, 2))[:, None, None] * at.unmade[rows]  # at least
    needed = sum((held[2:, None, kind] * pairs[:, kind] for kind in range(held.shape[1])), state)
    spared = np.where(at.headed[rows, :, None] >= 0, np.maximum(at.excess[:, rows], 0), 0)  # at most
    left = (at.left[:, rows] + spared)[:, :, at.of_rank][..., ranks.windows.patterns[1][entries]]
    besides = at.unmade_first[rows] - flight * at.passed[rows][:, at.of_rank]
    room = np.moveaxis(left + besides[..., None], 3, 1)
    forgiven = ranks.windows.layers.max() * (1 + flight) if held.shape[1] > 1 else np.zeros_like(flight)
    return needed, np.maximum(room + forgiven, 0) / needed * (1 + _SLACK)


def _alike(middle: Floats, total: Floats, holds: Floats) -> Ints:
    """Where ranks meet if each takes its part of the weight, shape (rows, ranks + 1); `middle`: weight up to each position's
    middle, shape (positions, rows)."""
    (length, rows), pp = middle.shape, holds.shape[1]
    until = holds.cumsum(axis=1)
    part = until[:, :-1] / until[:, -1:] * total[:, None]
    meet = (middle[:, :, None] <= part).sum(axis=0) - np.arange(1, pp)
    meet = np.clip(np.maximum.accumulate(meet, axis=1), 0, length - pp) if pp > 1 else meet
    ends = np.zeros((rows, 1), dtype=np.int64), np.full((rows, 1), length)
    return np.concatenate([ends[0], meet + np.arange(1, pp), ends[1]], axis=1)


# ---- furthest reach ------------------------------------------------------------------------------------------------


def _furthest(ranks: Ranks, rows: Ints) -> Bools:
    """Whether ranks of `rows` hold all layers when each takes as many as it can."""
    w, pp = ranks.windows, ranks.pp
    at, alive = np.zeros(len(rows), dtype=np.int64), np.arange(len(rows))
    size = np.full(len(rows), w.positions // pp, dtype=np.int64)
    for s in range(pp):
        if not len(alive):
            break
        size = _longest(ranks, s, rows[alive], at[alive], size)
        at[alive] += size
        alive, size = alive[size > 0], size[size > 0]
    result = np.zeros(len(rows), dtype=bool)
    result[alive] = at[alive] == w.positions
    return result


def _longest(ranks: Ranks, s: int, rows: Ints, at: Ints, guess: Ints) -> Ints:
    """The longest window from `at` that rank s of `rows` can hold, in positions; 0 for none. `guess` is tried first."""
    w, later = ranks.windows, ranks.pp - 1 - s
    later += int(later > 0 and not w.whole.all())  # the last rank holds another position if the last one lacks layers
    low, high = np.zeros_like(at), np.maximum(w.positions - at - later, 0)  # every later rank holds a position
    most = int(high.max())
    if len(rows) * most <= _FEW:  # few enough to look at every window
        size = np.arange(1, most + 1)
        row, n = np.nonzero(size <= high[:, None])
        good = ranks.fits(np.full_like(row, s), rows[row], w.at[at[row], size[n]])
        np.maximum.at(low, row, np.where(good, size[n], 0))
        return low
    probe, stride = np.clip(guess, 1, np.maximum(high, 1)), 1
    while len(open_ := np.nonzero(low < high)[0]):
        size = probe[open_]
        good = ranks.fits(np.full_like(open_, s), rows[open_], w.at[at[open_], size])
        low[open_] = np.where(good, size, low[open_])
        high[open_] = np.where(good, high[open_], size - 1)
        # Gallop away from the guess, then halve what is left between the two ends.
        near = np.where(low == probe, low + stride, high - stride + 1)
        probe = np.where((near > low) & (near <= high), near, (low + high + 1) // 2)
        stride *= 2
    return low
