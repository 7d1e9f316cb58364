"""Runs of consecutive layers: what a pipeline rank can hold where that depends on their place.

With v chunks the L layers are cut into v rounds of ceil(L / v) layers, the last ones one layer shorter where v does not divide
L (`chunk_layers`). A chain of ceil(L / v) positions stands for all rounds at once: a rank is a window of it, and holds the
layers at these positions of every round. Only the last position may lack layers, so that only the last rank can have unequal
chunks; each of them holds a layer. Costs depend on how many layers of each kind each chunk holds, so windows with equal counts
share an entry.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from planner.cost.task import Bools, Ints
from planner.specs.layout import chunk_layers


@dataclass(frozen=True)
class Windows:
    """The windows of up to `reach` positions."""

    counts: Ints
    """Layers of each kind in each chunk by entry, shape (entries, chunks, kinds)."""
    at: Ints
    """Entry of the window of n positions (second axis) that starts at position a (first axis); -1 where there is none."""

    @property
    def chunks(self) -> int:
        """v: layers for each position, but for what the last one lacks."""
        return self.counts.shape[1]

    @cached_property
    def kinds(self) -> Ints:
        """Layers of each kind by entry, shape (entries, kinds)."""
        return self.counts.sum(axis=1)

    @cached_property
    def patterns(self) -> tuple[Bools, Ints]:
        """(which kinds of layers entries have, shape (patterns, kinds); the pattern of each entry)."""
        some, which = np.unique(self.kinds > 0, axis=0, return_inverse=True)
        return some, which.ravel()

    @cached_property
    def layers(self) -> Ints:
        """Layers by entry."""
        return self.counts.sum(axis=(1, 2))

    @cached_property
    def sizes(self) -> Ints:
        """Positions by entry."""
        return self.counts.sum(axis=2).max(axis=1)

    @cached_property
    def whole(self) -> Bools:
        """Entries with a layer in every chunk."""
        return np.asarray(self.counts.sum(axis=2).min(axis=1) > 0)

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


def positions(n_layers: int, chunks: int) -> int:
    """Length of the chain of a model's layers."""
    return -(-n_layers // chunks)


@lru_cache(maxsize=256)
def windows(kinds: tuple[int, ...], chunks: int, reach: int) -> Windows:
    """The windows over layers of these kinds, of up to `reach` positions."""
    length, n_kinds = positions(len(kinds), chunks), max(kinds) + 1
    rounds, one_hot = chunk_layers(len(kinds), chunks), np.zeros((length, chunks, n_kinds), dtype=np.int64)
    start = 0
    for c, n in enumerate(rounds):
        one_hot[np.arange(n), c, kinds[start : start + n]] = 1
        start += n
    before = np.concatenate([np.zeros_like(one_hot[:1]), np.cumsum(one_hot, axis=0)])
    reach = min(reach, length)
    first, size = np.meshgrid(np.arange(length + 1), np.arange(reach + 1), indexing="ij")
    inside = (size > 0) & (first + size <= length)
    held = before[(first + size)[inside]] - before[first[inside]]
    counts, entry = np.unique(held.reshape(len(held), -1), axis=0, return_inverse=True)
    at = np.full(first.shape, -1, dtype=np.int64)
    at[inside] = entry.ravel()
    return Windows(counts.reshape(-1, chunks, n_kinds), at)
