"""Bounds hold on full grids; and a bound or memory test that is wrong by one unit does not pass these tests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from planner.cost import blending
from planner.search import bounds, mixed
from planner.search.solve import search
from search.grids import Grid, grid, tight, under, violations

NAMES = ("dense", "experts", "mixed")
FORGIVEN = 4096
"""More bytes than the memory test of mixed models forgives for the rounding of means."""
NONE = {"memory": 0, "simple": 0, "target": 0}


@pytest.mark.parametrize("name", NAMES)
def test_bounds_hold_on_a_full_grid(name):
    g = grid(name)
    assert 0.05 < np.mean(g.exact >= 0) < 1
    assert len(g.exact) >= 40
    assert violations(g) == NONE


def module(g: Grid):
    """Where the bounds of a grid's model live."""
    return bounds if g.task.model.homogeneous else mixed


TIGHT = [("dense", "simple_bound"), ("experts", "simple_bound"), *((name, "target_bound") for name in NAMES)]
"""The first bound of mixed models leaves out what layers do once a step, and so is never exact: a nanosecond is within it."""


@pytest.mark.parametrize(("name", "bound"), TIGHT)
def test_a_bound_that_is_one_nanosecond_too_high_is_caught(monkeypatch, name, bound):
    g = grid(name)
    real = getattr(module(g), bound)
    monkeypatch.setattr(module(g), bound, lambda *args: real(*args) + 1)
    assert violations(g)[bound.removesuffix("_bound")] > 0


def off_by(real, more: int):
    """A memory test for devices that hold `more` bytes more than they do."""

    def test(*args):
        group = args[-1]
        p = replace(group.p, capacity=group.p.capacity + more)
        group = replace(group, p=p)
        if group.stack is not None:
            ends = group.stack.ends.copy()
            ends[blending._ENDS.index("capacity")] += more
            group = replace(group, stack=replace(group.stack, ends=ends))
        return real(*args[:-1], group)

    return test


@pytest.mark.parametrize("name", ["dense", "mixed", pytest.param("experts", marks=pytest.mark.slow)])
def test_a_memory_test_that_is_one_byte_off_is_caught(monkeypatch, name):
    """On a job that fits to the byte: too strict, and the search says that nothing fits where brute force has a plan; too lax,
    and a byte below it there are rows without a plan."""
    g = tight(name)
    best = int(g.exact[g.exact >= 0].min())
    assert violations(g) == NONE
    assert search(g.task, g.engine, g.space, k=1).candidates[0].step_ns == best
    real = module(g).memory_feasible
    unit = 1 if g.task.model.homogeneous else FORGIVEN
    monkeypatch.setattr(module(g), "memory_feasible", off_by(real, -unit))
    assert violations(g)["memory"] > 0
    assert search(g.task, g.engine, g.space, k=1).status == "infeasible"
    below = replace(g, task=under(g.task, g.task.limit - 1), exact=np.full_like(g.exact, -1))
    monkeypatch.setattr(module(g), "memory_feasible", real)
    assert violations(below)["memory"] == 0
    outcome = search(below.task, g.engine, g.space, k=1)
    assert (outcome.status, outcome.counts.open, outcome.counts.exact) == ("infeasible", 0, 0)
    if g.task.model.homogeneous:
        monkeypatch.setattr(module(g), "memory_feasible", off_by(real, 1))
        assert violations(below)["memory"] > 0


@pytest.mark.parametrize("name", ["dense", "mixed"])
def test_a_row_whose_table_is_wrong_by_one_is_caught_by_the_second_method(monkeypatch, name):
    """Dynamic programming that is a nanosecond off does not agree with CP-SAT."""
    from planner.search import solve, stages

    g = grid(name)
    real = stages.best_split

    def off(*args):
        found = real(*args)
        return None if found is None else (found[0] + 1, found[1])

    monkeypatch.setattr(stages, "best_split", off)
    with pytest.raises(solve.SearchError, match="CP-SAT says"):
        search(g.task, g.engine, g.space, k=1)
