"""What a pipeline rank can hold: runs of neighbouring layers, by how many of each kind are in them.

With v chunks a rank holds v runs, L / v layers apart, each as long as the others (a rule of all engines): together they are
one run of a chain of L / v places, each of which stands for v layers.
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
    """Layers of each kind in each distinct run, shape (runs, kinds)."""
    number: Ints
    """Run of each (first place, length); -1 where the chain ends before. Shape (places + 1, longest + 1)."""
    chunks: int

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
        return self.counts.sum(axis=1)


@lru_cache(maxsize=512)
def runs(kinds: tuple[int, ...], chunks: int, longest: int) -> Runs:
    """The runs over layers of these kinds; `chunks` divides their number."""
    places = len(kinds) // chunks
    at_place = [[kinds[c * places + i] for c in range(chunks)] for i in range(places)]
    n_kinds = max(kinds) + 1
    seen: dict[tuple[int, ...], int] = {}
    number = np.full((places + 1, longest + 1), -1, dtype=np.int64)
    for first in range(places):
        held = [0] * n_kinds
        for length in range(1, min(longest, places - first) + 1):
            for kind in at_place[first + length - 1]:
                held[kind] += 1
            number[first, length] = seen.setdefault(tuple(held), len(seen))
    return Runs(np.array(list(seen), dtype=np.int64).reshape(-1, n_kinds), number, chunks)
