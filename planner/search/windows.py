"""Runs of consecutive layers of a model that mixes several kinds: what a pipeline rank can hold.

Ranks hold equal chunks (a rule), so with v chunks chunk c of a rank starts c L / v layers after its first one: a rank is a
window of a chain of L / v positions, each standing for v layers. Costs depend on how many layers of each kind a window
holds only, so windows with equal counts share an entry.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from planner.cost.task import Bools, Ints


@dataclass(frozen=True)
class Windows:
    """The windows of up to `reach` positions."""

    counts: Ints
    """Layers of each kind by entry, shape (entries, kinds)."""
    at: Ints
    """Entry of the window of n positions (second axis) that starts at position a (first axis); -1 where there is none."""
    chunks: int
    """v: layers for each position."""

    @property
    def layers(self) -> Ints:
        """Layers by entry."""
        return self.counts.sum(axis=1)

    @property
    def positions(self) -> int:
        """Length of the chain."""
        return len(self.at) - 1

    @property
    def reach(self) -> int:
        """Positions of the longest window."""
        return self.at.shape[1] - 1

    def only(self, entries: Bools) -> Windows:
        """The windows of some entries; the others are left out."""
        number = np.where(entries, np.cumsum(entries) - 1, -1)
        return replace(self, counts=self.counts[entries], at=np.where(self.at >= 0, number[self.at], -1))


@lru_cache(maxsize=256)
def windows(kinds: tuple[int, ...], chunks: int, reach: int) -> Windows:
    """The windows over layers of these kinds, of up to `reach` positions. `chunks` divides the number of layers."""
    length, n_kinds = len(kinds) // chunks, max(kinds) + 1
    one_hot = np.eye(n_kinds, dtype=np.int64)[np.array(kinds)].reshape(chunks, length, n_kinds).sum(axis=0)
    before = np.concatenate([np.zeros((1, n_kinds), dtype=np.int64), np.cumsum(one_hot, axis=0)])
    reach = min(reach, length)
    start, size = np.meshgrid(np.arange(length + 1), np.arange(reach + 1), indexing="ij")
    inside = (size > 0) & (start + size <= length)
    held = before[(start + size)[inside]] - before[start[inside]]
    counts, entry = np.unique(held, axis=0, return_inverse=True)
    at = np.full(start.shape, -1, dtype=np.int64)
    at[inside] = entry.ravel()
    return Windows(counts, at, chunks)
