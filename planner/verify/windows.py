"""What a pipeline rank can hold: runs of neighbouring layers, by how many of each kind are in each of its chunks.

With v chunks the layers are cut into v rounds of ceil(L / v), the last ones a layer shorter where v does not divide L. Place i
of a chain of ceil(L / v) stands for the i-th layer of every round; a rank holds the places of one run, and thereby a run of
every round: its chunks. The last place may stand for fewer layers than v; it is no run by itself then: chunks hold a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from planner.cost.task import Ints


@dataclass(frozen=True)
class Runs:
    """The distinct runs of up to `longest` places."""

    counts: Ints
    """Layers of each kind in each chunk of each distinct run, shape (runs, chunks, kinds)."""
    number: Ints
    """Run of each (first place, length); -1 where the chain ends before. Shape (places + 1, longest + 1)."""
    n_layers: int

    @property
    def chunks(self) -> int:
        """Chunks of a rank."""
        return self.counts.shape[1]

    @property
    def places(self) -> int:
        """Length of the chain."""
        return len(self.number) - 1

    @property
    def longest(self) -> int:
        """Places of the longest run."""
        return self.number.shape[1] - 1

    @property
    def layers(self) -> Ints:
        """Layers of each run."""
        return self.counts.sum(axis=(1, 2))

    @property
    def by_length(self) -> bool:
        """Whether a run's number is its length less one: layers of one kind in equal rounds."""
        return self.counts.shape[2] == 1 and self.places * self.chunks == self.n_layers


@lru_cache(maxsize=512)
def runs(kinds: tuple[int, ...], chunks: int, longest: int) -> Runs:
    """The runs over layers of these kinds."""
    places = -(-len(kinds) // chunks)
    full = chunks - (places * chunks - len(kinds))
    starts = [c * places - max(0, c - full) for c in range(chunks)]
    at_place = [[(c, kinds[starts[c] + i]) for c in range(chunks if i < places - 1 else full)] for i in range(places)]
    n_kinds = max(kinds) + 1
    seen: dict[tuple[int, ...], int] = {}
    number = np.full((places + 1, longest + 1), -1, dtype=np.int64)
    for first in range(places):
        held = [0] * (chunks * n_kinds)
        for length in range(1, min(longest, places - first) + 1):
            for c, kind in at_place[first + length - 1]:
                held[c * n_kinds + kind] += 1
            number[first, length] = seen.setdefault(tuple(held), len(seen))
    return Runs(np.array(list(seen), dtype=np.int64).reshape(-1, chunks, n_kinds), number, len(kinds))
