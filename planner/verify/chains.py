"""Chains of runs: every rank holds one, each begins where the last one ended, together they are the whole sequence.

All functions take `values` of the shape (rows, ranks, runs), NEVER where a rank cannot hold a run.
"""

from __future__ import annotations

import numpy as np

from planner.cost.task import Bools, Ints
from planner.verify.tables import NEVER
from planner.verify.windows import Runs


def exists(allowed: Bools, w: Runs) -> Bools:
    """Whether some chain uses allowed entries only, shape (rows,). Exact."""
    if w.by_length:
        simple, answer = _prefixes(allowed, w)
        rest = np.nonzero(~simple)[0]
    else:
        answer, rest = np.zeros(len(allowed), dtype=bool), np.arange(len(allowed))
    if len(rest):
        answer[rest] = _reaches(allowed[rest], w)
    return answer


def _reaches(allowed: Bools, w: Runs) -> Bools:
    """The same over any runs: the places that each rank can begin at, from the first one on."""
    rows, pp, _ = allowed.shape
    here: Bools = np.zeros((rows, w.places + 1), dtype=bool)
    here[:, 0] = True
    for s in range(pp):
        following = np.zeros_like(here)
        usable: Bools = np.any(allowed[:, s], axis=0)
        for length in range(1, w.longest + 1):
            starts = np.arange(s, w.places - length - (pp - 1 - s) + 1)[: None if s else 1]
            starts = starts[usable[w.number[starts, length]]]
            if len(starts):
                following[:, starts + length] |= here[:, starts] & allowed[:, s, w.number[starts, length]]
        here = following
    return np.asarray(here[:, w.places])


def _prefixes(allowed: Bools, w: Runs) -> tuple[Bools, Bools]:
    """(rows whose ranks may hold every length up to some longest one, whether those add up to the sequence)."""
    longest = np.argmin(np.concatenate([allowed, np.zeros_like(allowed[:, :, :1])], axis=2), axis=2)
    simple = np.all(allowed.sum(axis=2) == longest, axis=1)
    return simple, simple & np.all(longest > 0, axis=1) & (longest.sum(axis=1) >= w.places)


def to_the_end(values: Ints, w: Runs, join: np.ufunc) -> Ints:
    """The least sum (`np.add`) or the least maximum (`np.maximum`) over chains of ranks s.. from place a to the end.

    Shape (rows, ranks + 1, places + 1); NEVER where there is none. Exact: from the last rank backwards.
    """
    rows, pp, _ = values.shape
    places = w.places
    best = np.full((rows, pp + 1, places + 1), NEVER)
    best[:, pp, places] = 0
    for s in reversed(range(pp)):
        mine = values[:, s]
        usable: Bools = np.any(mine < NEVER, axis=0)
        for length in range(1, w.longest + 1):
            starts = np.arange(s, places - length - (pp - 1 - s) + 1)[: None if s else 1]
            # the first rank starts at the first place, every later rank holds one
            starts = starts[usable[w.number[starts, length]]]
            if len(starts):
                reached = join(mine[:, w.number[starts, length]], best[:, s + 1, starts + length])
                best[:, s, starts] = np.minimum(best[:, s, starts], np.minimum(reached, NEVER))
    return best
