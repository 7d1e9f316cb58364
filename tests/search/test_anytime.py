"""Stopped at any of its check points, the search gives a plan with a bound that holds, or says that there is none."""

from __future__ import annotations

import numpy as np
import pytest

from planner import stopping
from planner.search import solve
from planner.search.solve import search
from search.instances import instance, mixed_instance, mixture_instance


class After:
    """A stand-in for `stopping.check` that raises at its nth call and from then on."""

    def __init__(self, calls: int, reason: type[BaseException]):
        self.left, self.reason = calls, reason

    def __call__(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.reason


def stopped_after(monkeypatch, calls, reason, made):
    """The outcome of a search that is stopped at its nth check; None when that is before the rows have bounds."""
    with monkeypatch.context() as patch:
        patch.setattr(stopping, "check", After(calls, reason))
        try:
            return search(*made, k=3)
        except reason:
            return None


@pytest.mark.parametrize("made", [instance, mixed_instance, mixture_instance])
@pytest.mark.parametrize("seed", range(4))
def test_stopped_anywhere(monkeypatch, made, seed):
    task = made(seed)
    whole = search(*task, k=3)
    best = whole.candidates[0].step_ns if whole.candidates else None
    early = None
    for calls in (*range(0, 24, 3), *range(24, 120, 16)):
        outcome = stopped_after(monkeypatch, calls, (TimeoutError, KeyboardInterrupt)[calls % 2], task)
        if outcome is None:
            continue
        c = outcome.counts
        assert c.by_rule + c.by_memory + c.by_bound + c.exact + c.open == c.enumerated
        assert best is not None or not outcome.candidates
        assert outcome.status in ("interrupted", whole.status)
        if outcome.candidates:
            early = early or outcome
            assert outcome.bound_ns <= best <= outcome.candidates[0].step_ns
            if outcome.status == "optimal":
                assert outcome.candidates[0].step_ns == best
    assert best is None or early is not None


def test_the_even_split_is_near_on_a_real_job(monkeypatch):
    """Stopped before any row is solved: one plan, with the least open bound."""
    seen = []

    def solved(state, row, target, k):
        seen.append(row)
        raise TimeoutError

    task, engine, space = instance(3)
    whole = search(task, engine, space)
    monkeypatch.setattr(solve, "_solve", solved)
    outcome = search(task, engine, space)
    assert (outcome.status, outcome.stopped_by, len(outcome.candidates)) == ("interrupted", "limit", 1)
    assert len(seen) == 1
    assert outcome.bound_ns <= whole.candidates[0].step_ns <= outcome.candidates[0].step_ns
    stages = outcome.candidates[0].layout.stages
    assert np.ptp([s.layers for s in stages]) <= 1
    assert len({s.recompute for s in stages}) == 1


def test_the_nearer_of_nested_limits_holds():
    with stopping.limit(3600.0):
        with stopping.limit(0.0):
            assert stopping.due()
            with pytest.raises(TimeoutError), stopping.limit(60.0):
                stopping.check()
        assert not stopping.due()
    with stopping.limit(None):
        stopping.check()
