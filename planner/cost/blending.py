"""Primitives of ranks that mix several kinds of layers.

With virtual stages a rank whose chunks take unequal times waits for others that are at their longest one: half of what its
chunks lack to v times the longest counts beside them. What it saves is the most that its chunks hold together, over the pairs
of layers and micro-batches.

What a layer costs becomes its mean over the rank's layers, rounded up: n layers of the mean cost at most n units more than
the sum. What lives only at the peak is that of the largest kind on the rank, what ranks send to each other that of the
largest kind of all; embedding and head are those of one kind, the language model's last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from planner.cost.primitives import Blend, Primitives
from planner.cost.task import Bools, Ints, consecutive

_TIMES = ("forward", "backward", "weight", "recompute1", "recompute2", "comm", "hide", "floor", "update")
_CHUNK_TIMES = ("forward", "backward", "recompute1", "recompute2")
"""Of every micro-batch."""
_SAVED = ("act0", "act1", "act2")
HELD = ("state", "updating", "deferred", *_SAVED)
"""Bytes of layers that add up; activations by recompute mode last."""
_MEANS = (*_TIMES, *HELD)
_PEAKS = (
    "fixed", "transient", "reduction", "head_transient", "head_reduction", "head_finish", "last_reduction", "last_layer",
    "carried", "finish0", "finish1", "finish2",
)  # fmt: skip
_MODES = range(3)
_SHARED = ("boundary", "receive", "entering", "p2p")
_ENDS = tuple(f.name for f in fields(Primitives) if f.name not in (*_MEANS, *_PEAKS, *_SHARED))
_HIDE = _MEANS.index("hide")
_SENDS = (*_ENDS, *_SHARED).index("p2p")
_OTHER_TIMES = (
    "embedding", "head", "comm_first", "comm_last", "floor_first", "floor_last", "update_first", "update_last", "constant",
    "credit", "p2p",
)  # fmt: skip


@dataclass(frozen=True)
class Stack:
    """Primitives by kind of layers as a few arrays, so that blending and taking rows are a few operations.

    The last axes are those of the primitives: rows, and whatever they broadcast over.
    """

    means: Ints
    """(kinds, fields, ...): what layers add up to."""
    peaks: Ints
    """(kinds, fields, ...): what the largest kind decides; what depends on recompute by mode after them."""
    ends: Ints
    """(fields, ...): what kinds share."""

    @classmethod
    def of(cls, kinds: Sequence[Primitives], text: int = 0) -> Stack:
        """The stack of primitives by kind; `text` is the kind of embedding and head."""

        def stacked(p: Primitives, names: Sequence[str], more: Sequence[Ints] = ()) -> Ints:
            columns = [getattr(p, name) for name in names]
            return np.stack(np.broadcast_arrays(*columns, *more))

        by_mode = [[each(m) for each in (p.remade, p.reduction_rest) for m in _MODES] for p in kinds]
        largest = [np.maximum.reduce([getattr(p, name) for p in kinds]) for name in _SHARED]
        return cls(
            np.stack([stacked(p, _MEANS) for p in kinds]),
            np.stack([stacked(p, _PEAKS, modes) for p, modes in zip(kinds, by_mode, strict=True)]),
            stacked(kinds[text], _ENDS, largest),
        )

    @property
    def bytes(self) -> Ints:
        """All that memory depends on, shape (columns, rows); of a stack by rank, the columns of every rank."""
        shape = self.means.shape[2:]
        ends = [i for i, name in enumerate((*_ENDS, *_SHARED)) if name not in _OTHER_TIMES]
        parts = (self.held.reshape(-1, *shape), self.peaks.reshape(-1, *shape), self.ends[ends])
        return np.concatenate(parts).swapaxes(1, -1).reshape(-1, shape[0])

    @property
    def ranked(self) -> bool:
        """Whether pipeline ranks differ (`devicetypes`): their axis follows the rows."""
        return self.means.ndim > 3

    def take(self, rows: Ints) -> Stack:
        """The rows (the first axis of the primitives) at `rows`."""
        if (run := consecutive(rows)) is not None:
            return Stack(self.means[:, :, run], self.peaks[:, :, run], self.ends[:, run])
        return Stack(self.means.take(rows, axis=2), self.peaks.take(rows, axis=2), self.ends.take(rows, axis=1))

    def of_rank(self, rank: int) -> Stack:
        """The stack of one pipeline rank, where they differ."""
        if not self.ranked:
            return self
        return Stack(self.means[..., rank], self.peaks[..., rank], self.ends[..., rank])

    def with_capacity(self, capacity: Ints) -> Stack:
        """The stack on devices that may hold other bytes."""
        ends = self.ends.copy()
        ends[_ENDS.index("capacity")] = capacity
        return replace(self, ends=ends)

    def with_sends(self, sends: Ints) -> Stack:
        """The stack with another exposed time of sends."""
        ends = self.ends.copy()
        ends[_SENDS] = sends
        return replace(self, ends=ends)

    @property
    def sends(self) -> Ints:
        """Exposed time of sends, ns."""
        return np.asarray(self.ends[_SENDS])

    def deep(self, axes: int) -> Stack:
        """The stack with `axes` more axes of length one at the end."""
        return Stack(*(a.reshape(a.shape + (1,) * axes) for a in (self.means, self.peaks, self.ends)))

    def least_layers(self, modes: Sequence[int]) -> Ints:
        """Least time of one layer of each kind and micro-batch under any of the recompute modes, shape (kinds, ...)."""
        forward, backward, selective, full = (self.means[:, _MEANS.index(name)] for name in _CHUNK_TIMES)
        again = [(0 * selective, selective, full)[mode] for mode in modes]
        return np.asarray(forward + backward + np.minimum.reduce(again))

    @property
    def held(self) -> Ints:
        """Bytes of one layer of each kind by the names of `HELD`, shape (kinds, names, ...)."""
        return self.means[:, len(_TIMES) :]

    def blend(self, counts: Ints, moments: Ints | None = None) -> Blend:
        """Primitives of ranks with `counts` layers, kinds on the last axis; other axes broadcast against the primitives'.

        With virtual stages `counts` has the chunks on the axis before, and `moments` (`schedules.chunk_moments`) the moments
        and the chunks on its last two.
        """
        if moments is not None:
            whole = self.blend(counts.sum(axis=-2))
            return replace(whole, **self._by_chunk(counts, moments))  # type: ignore[arg-type]
        n = np.maximum(counts.sum(axis=-1), 1)
        total: Ints = np.zeros(1, dtype=np.int64)
        for k in range(len(self.means)):
            total = total + counts[..., k] * self.means[k]
        means = -(-total // n)
        means[_HIDE] = total[_HIDE] // n
        return self._blend(means, counts > 0)

    def besides(self, kinds: Bools) -> Blend:
        """Primitives of ranks that have layers of some `kinds` (last axis), with all that layers add up to left out (0)."""
        return self._blend(np.zeros((len(_MEANS), 1), dtype=np.int64), kinds)

    def _blend(self, means: Ints, kinds: Bools) -> Blend:
        """Primitives from the means over layers, and from which kinds of layers there are."""
        empty = ~kinds.any(axis=-1)  # a rank without layers keeps the workspace
        peaks: Ints = np.zeros(1, dtype=np.int64)
        for k in range(len(self.peaks)):
            peaks = np.maximum(peaks, np.where(kinds[..., k] | empty, self.peaks[k], 0))
        values = dict(zip(_MEANS, means, strict=True)) | dict(zip(_PEAKS, peaks, strict=False))
        values |= dict(zip((*_ENDS, *_SHARED), self.ends, strict=True))
        modes = peaks[len(_PEAKS) :]
        return Blend(**values, remade_by_mode=tuple(modes[:3]), rest_by_mode=tuple(modes[3:]))

    def _by_chunk(self, counts: Ints, moments: Ints) -> dict[str, Ints]:
        """The fields that depend on how the layers of a rank are spread over its chunks."""
        layers, chunks = counts.sum(axis=-1), range(counts.shape[-2])
        none: Ints = np.zeros(1, dtype=np.int64)
        if len(self.means) == 1 or np.all(counts == counts[..., :1, :]):
            return {}  # every chunk is like the mean

        def each(names: Sequence[str]) -> list[Ints]:
            rows = self.means[:, [_MEANS.index(name) for name in names]]
            return [sum((counts[..., c, k] * rows[k] for k in range(len(rows))), none) for c in chunks]

        taken, saved = each(_CHUNK_TIMES), each(_SAVED)
        twice = sum(taken, none) + len(chunks) * np.maximum.reduce(taken)
        values = dict(zip(_CHUNK_TIMES, -(-twice // np.maximum(2 * layers.sum(axis=-1), 1)), strict=True))
        pairs = most = none
        for j in range(moments.shape[-2]):
            held = [moments[..., j, c] for c in chunks]
            pairs = np.maximum(pairs, sum(n * layers[..., c] for c, n in zip(chunks, held, strict=True)))
            most = np.maximum(most, sum(n * saved[c] for c, n in zip(chunks, held, strict=True)))
        return values | dict(zip(_SAVED, -(-most // np.maximum(pairs, 1)), strict=True))


def blend(kinds: Sequence[Primitives], counts: Ints, text: int = 0, moments: Ints | None = None) -> Blend:
    """Primitives of ranks that mix `kinds`; `counts` has the kinds on its last axis, `text` is that of embedding and head.

    `moments`: see `Stack.blend`.
    """
    return Stack.of(kinds, text).blend(counts, moments=moments)
