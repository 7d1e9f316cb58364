"""Primitives of ranks that mix several kinds of layers.

What a layer costs becomes its mean over the rank's layers, rounded up: n layers of the mean cost at most n units more than
the sum. What lives only at the peak is that of the largest kind on the rank, what ranks send to each other that of the
largest kind of all; embedding and head are those of one kind, the language model's last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from planner.cost.primitives import Blend, Primitives
from planner.cost.task import Ints

_TIMES = ("forward", "backward", "recompute1", "recompute2", "comm", "hide", "floor", "update")
_MEANS = (*_TIMES, "state", "updating", "act0", "act1", "act2")
_PEAKS = (
    "fixed", "transient", "reduction", "head_transient", "head_reduction", "head_finish", "last_reduction", "last_layer",
    "carried", "finish",
)  # fmt: skip
_MODES = range(3)
_SHARED = ("boundary", "receive", "entering", "p2p")
_ENDS = tuple(f.name for f in fields(Primitives) if f.name not in (*_MEANS, *_PEAKS, *_SHARED))
_HIDE = _MEANS.index("hide")


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

        by_mode = [[each(m) for each in (p.remade, p.reduction_rest, p.finish_rest) for m in _MODES] for p in kinds]
        largest = [np.maximum.reduce([getattr(p, name) for p in kinds]) for name in _SHARED]
        return cls(
            np.stack([stacked(p, _MEANS) for p in kinds]),
            np.stack([stacked(p, _PEAKS, modes) for p, modes in zip(kinds, by_mode, strict=True)]),
            stacked(kinds[text], _ENDS, largest),
        )

    def take(self, rows: Ints) -> Stack:
        """The rows (the first axis of the primitives) at `rows`."""
        return Stack(self.means.take(rows, axis=2), self.peaks.take(rows, axis=2), self.ends.take(rows, axis=1))

    def with_capacity(self, capacity: Ints) -> Stack:
        """The stack on devices that may hold other bytes."""
        ends = self.ends.copy()
        ends[_ENDS.index("capacity")] = capacity
        return replace(self, ends=ends)

    def deep(self, axes: int) -> Stack:
        """The stack with `axes` more axes of length one at the end."""
        return Stack(*(a.reshape(a.shape + (1,) * axes) for a in (self.means, self.peaks, self.ends)))

    def least_layers(self, modes: Sequence[int]) -> Ints:
        """Least time of one layer of each kind and micro-batch under any of the recompute modes, shape (kinds, ...)."""
        forward, backward, selective, full = (self.means[:, _MEANS.index(name)] for name in _TIMES[:4])
        again = [(0 * selective, selective, full)[mode] for mode in modes]
        return np.asarray(forward + backward + np.minimum.reduce(again))

    def blend(self, counts: Ints, timed: bool = True) -> Blend:
        """Primitives of ranks with `counts` layers, kinds on the last axis; other axes broadcast against the primitives'.

        Without `timed` the times of layers are zero: memory alone is asked for.
        """
        held = counts.sum(axis=-1)
        n, empty = np.maximum(held, 1), held == 0  # a rank without layers keeps the workspace
        skip = 0 if timed else len(_TIMES)
        total: Ints = np.zeros(1, dtype=np.int64)
        peaks: Ints = np.zeros(1, dtype=np.int64)
        for k in range(len(self.means)):
            total = total + counts[..., k] * self.means[k, skip:]
            peaks = np.maximum(peaks, np.where((counts[..., k] > 0) | empty, self.peaks[k], 0))
        means = -(-total // n)
        if timed:
            means[_HIDE] = total[_HIDE] // n
        values = dict(zip(_MEANS[skip:], means, strict=True)) | dict(zip(_PEAKS, peaks, strict=False))
        values |= dict.fromkeys(_TIMES[:skip], np.zeros_like(held))
        values |= dict(zip((*_ENDS, *_SHARED), self.ends, strict=True))
        modes = peaks[len(_PEAKS) :]
        return Blend(**values, remade_by_mode=tuple(modes[:3]), rest_by_mode=tuple(modes[3:6]), finish_by_mode=tuple(modes[6:]))


def blend(kinds: Sequence[Primitives], counts: Ints, text: int = 0) -> Blend:
    """Primitives of ranks that mix `kinds`; `counts` has the kinds on its last axis, `text` is that of embedding and head."""
    return Stack.of(kinds, text).blend(counts)
