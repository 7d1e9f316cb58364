"""Rows that are alike in some columns, so that what depends on these columns alone is computed once for them."""

from __future__ import annotations

import numpy as np

from planner.cost.task import Ints

_MIX = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio: odd multiples of it spread the columns over 64 bits (Knuth, TAOCP 3, section 6.4)."""


def distinct(columns: Ints) -> tuple[Ints, Ints]:
    """(a row of each kind, the kind of every row) of `columns`, shape (columns, rows). Exact: equal hashes are compared."""
    key = np.zeros(columns.shape[1], dtype=np.uint64)
    for column in np.ascontiguousarray(columns).view(np.uint64):
        key ^= column
        key *= np.uint64(_MIX)
        key ^= key >> np.uint64(29)
    _, first, kind = np.unique(key, return_index=True, return_inverse=True)
    like = first[kind]
    if not all(np.array_equal(column, column[like]) for column in columns):  # two kinds of rows share a hash
        every = np.arange(columns.shape[1])
        return every, every
    return first, kind
