"""Rows that are alike, found by hash and compared."""

from __future__ import annotations

import numpy as np
import pytest

from planner.search import alike


@pytest.mark.parametrize("mix", [alike._MIX, 0])
def test_rows_of_a_kind_are_equal_and_kinds_differ(monkeypatch, mix):
    """Also when every hash is the same."""
    monkeypatch.setattr(alike, "_MIX", mix)
    columns = np.random.default_rng(0).integers(-2, 2, (3, 500)) << 40
    some, kind = alike.distinct(columns)
    assert np.array_equal(columns, columns[:, some[kind]])
    assert len(some) == (len(np.unique(columns, axis=1).T) if mix else 500)
