"""The plan among proven layouts: a near tie replaces the optimum only where it gives something and takes nothing."""

from __future__ import annotations

from typing import Any

import pytest
from machines import llama, profile, task

from planner.planning import choice, make
from planner.planning.choice import Proven, choose, inside_interval, moving_parts
from planner.planning.estimate import estimate_layout
from planner.planning.request import Request
from planner.search import solve
from planner.specs.job import Job
from planner.specs.layout import Layout, Stage
from planner.specs.layoutflags import complete_layout

TASK = task(llama(), 8, 2048, 64)
SIMPLE: dict[str, Any] = {"zero": 1}
COMPLEX: dict[str, Any] = {"tp": 2, "pp": 2, "virtual_stages": 2, "zero": 1}
LIMIT = 100.0


def layout(**named: Any) -> Layout:
    return complete_layout(named, TASK.model, 8)


def proven(seconds: float, headroom: float, **named: Any) -> Proven:
    """A layout with the step time and headroom that a test wants."""
    made = layout(**named)
    estimate = estimate_layout(TASK, made)
    stages = [s.model_copy(update={"headroom": headroom}) for s in estimate.memory.stages]
    memory = estimate.memory.model_copy(update={"stages": stages, "limit_gib": LIMIT})
    interval = estimate.interval.model_copy(update={"low_s": seconds / 1.3, "high_s": seconds * 1.3})
    return Proven(made, estimate.model_copy(update={"step_time_s": seconds, "memory": memory, "interval": interval}))


@pytest.mark.parametrize(("named", "parts"), [
    ({}, 0),
    ({"zero": 3}, 3),
    ({"tp": 2, "cp": 2}, 2),
    ({"ep": 2, "etp": 2}, 2),
    ({"pp": 2}, 1),
    ({"pp": 2, "schedule": "gpipe"}, 2),
    ({"pp": 2, "virtual_stages": 2}, 3),
    ({"pp": 2, "layers": [5, 3]}, 2),
    ({"recompute": "full"}, 1),
    ({"recompute": "full:8"}, 1),
    ({"recompute": "full:3"}, 2),
    ({"recompute": "full:3,selective:5"}, 2),
    (COMPLEX, 5),
])  # fmt: skip
def test_moving_parts(named, parts):
    assert moving_parts(layout(**named)) == parts


def test_recompute_that_differs_between_ranks_is_mixed():
    stages = [Stage(layers=4, recompute="full"), Stage(layers=4)]
    assert moving_parts(Layout(pp=2, dp=4, schedule="1f1b", stages=stages)) == 3


@pytest.mark.parametrize(("seconds", "headroom", "named", "preferred"), [
    (1.010, 5.0, SIMPLE, True),  # fewer parts, as much headroom
    (1.0101, 50.0, SIMPLE, False),  # not a tie
    (1.005, 4.99, SIMPLE, False),  # less headroom
    (1.005, 7.0, COMPLEX, True),  # as many parts, 2 % of the limit more
    (1.005, 6.9, COMPLEX, False),  # not enough more
    (1.005, 50.0, {**COMPLEX, "recompute": "full"}, False),  # more parts
])  # fmt: skip
def test_what_may_replace_the_optimum(seconds, headroom, named, preferred):
    found = [proven(1.0, 5.0, **COMPLEX), proven(seconds, headroom, **named)]
    assert choose(found) == int(preferred)


def test_alone_the_optimum_is_the_plan():
    assert choose([proven(1.0, 5.0, **COMPLEX)]) == 0


def test_among_several_parts_then_headroom_then_time_then_order():
    best = proven(1.0, 5.0, **COMPLEX)
    fewer, more = proven(1.008, 5.0, zero=0), proven(1.002, 50.0, **SIMPLE)
    assert choose([best, more, fewer]) == 2
    assert choose([best, proven(1.001, 6.0, **SIMPLE), more]) == 2
    assert choose([best, proven(1.004, 6.0, **SIMPLE), proven(1.003, 6.0, **SIMPLE)]) == 2
    same = proven(1.004, 6.0, **SIMPLE)
    assert choose([best, same, same]) == 1


def test_the_reason_has_the_numbers():
    found = [proven(1.0, 5.0, **COMPLEX), proven(1.005, 9.5, **SIMPLE), proven(1.005, 5.0, **SIMPLE)]
    text = choice.reason(found, 1, "that one")
    assert text == (
        "preferred to the proven fastest (that one; 1 s a step): 0.50% slower, which runs cannot tell apart, "
        "with 1 moving part instead of 5 and 4.5 GiB more headroom"
    )
    assert "the same headroom" in choice.reason(found, 2, "that one")


def test_runners_up_inside_the_interval_are_counted():
    estimate = proven(1.0, 5.0).estimate
    assert [inside_interval(estimate, others) for others in ([], [1.2, 1.29, 1.31], [0.999, 1.1], [2.0])] == [0, 2, 2, 0]


def made(monkeypatch: pytest.MonkeyPatch, stopped_by: str = "", count: int = 2) -> Any:
    """A plan from a search that found COMPLEX, and SIMPLE half a percent slower with more headroom."""
    found = [proven(1.0, 5.0, **COMPLEX), proven(1.005, 6.0, **SIMPLE)][:count]
    nanoseconds = (1_000_000_000, 1_005_000_000)
    candidates = tuple(solve.Candidate(i, ns, f.layout) for i, (f, ns) in enumerate(zip(found, nanoseconds, strict=False)))
    outcome = solve.Outcome("optimal", candidates, nanoseconds[0], solve.Counts(2, 0, exact=2), 0.1, "test", stopped_by)
    estimates = {f.layout.model_dump_json(): f.estimate for f in found}
    monkeypatch.setattr(solve, "search", lambda *_: outcome)
    monkeypatch.setattr(make, "estimate_layout", lambda _, x: estimates[x.model_dump_json()])
    job = Job(seq_len=2048, global_batch=64)
    return make.make_plan(Request(llama(), profile(), job, gpus=8), count)


def test_the_optimum_stays_in_certificate_and_alternatives(monkeypatch):
    plan = made(monkeypatch)
    assert plan.layout == layout(**SIMPLE)
    assert plan.estimate.step_time_s == 1.005
    assert (plan.choice.rule, plan.choice.fastest_step_time_s, plan.choice.tie) == ("near tie", 1.0, 0.01)
    assert plan.certificate.objective == plan.certificate.bound == 1.0
    assert plan.certificate.gap == 0.0
    (optimum,) = plan.alternatives
    assert optimum.layout == layout(**COMPLEX)
    assert optimum.slower == pytest.approx(1 / 1.005 - 1)
    assert plan.choice.inside_interval == 1


def test_a_search_that_ended_early_prefers_nothing(monkeypatch):
    plan = made(monkeypatch, stopped_by="limit")
    assert (plan.choice.rule, plan.layout) == ("fastest", layout(**COMPLEX))


def test_with_one_candidate_nothing_is_preferred(monkeypatch):
    plan = made(monkeypatch, count=1)
    assert (plan.choice.rule, plan.choice.inside_interval, plan.alternatives) == ("fastest", 0, [])
