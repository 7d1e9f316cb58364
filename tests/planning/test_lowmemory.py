"""The objective memory: no layout fits under a lower limit, and the plan is the fastest of those that fit under it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from machines import llama, profile

import planner
from planner.errors import InfeasibleError
from planner.planning.lowmemory import RESOLUTION, lowest_limit
from planner.planning.request import Request, prepare
from planner.search.explain import any_fits
from planner.search.space import declared_space
from planner.specs.job import Job

JOB = {"gpus": 8, "seq_len": 2048, "global_batch": 16}


@pytest.fixture(scope="module")
def plans():
    return [planner.plan(llama(), profile(), **JOB, objective=name) for name in ("throughput", "memory")]


def test_the_lowest_limit_is_exact_up_to_its_resolution():
    setting = prepare(Request(llama(), profile(), Job(seq_len=2048, global_batch=16), gpus=8))
    space = declared_space(setting.task, setting.engine, {}, ())
    floor = lowest_limit(setting.task, setting.engine, space)
    low = floor.proof
    usable = setting.task.hardware.device.memory.base / 2**30
    assert 0 < low.limit_gib - low.impossible_gib <= RESOLUTION * low.limit_gib
    assert any_fits(floor.task, setting.engine, space)
    assert not any_fits(replace(setting.task, max_memory_fraction=low.impossible_gib / usable), setting.engine, space)


def test_the_plan_is_emptier_slower_and_proven_under_that_limit(plans):
    fast, small = plans
    low = small.certificate.lowest_memory
    assert fast.certificate.lowest_memory is None
    assert small.objective == "memory"
    assert small.estimate.memory.peak_gib < fast.estimate.memory.peak_gib
    assert low.impossible_gib < small.estimate.memory.peak_gib <= low.limit_gib
    assert small.estimate.step_time_s > fast.estimate.step_time_s
    assert small.certificate.status == "optimal"
    assert small.policy == fast.policy
    assert small.estimate.memory.limit_gib == fast.estimate.memory.limit_gib
    assert all(a.peak_gib <= low.limit_gib for a in small.alternatives)


def test_what_does_not_fit_at_all_says_so_as_ever():
    with pytest.raises(InfeasibleError, match="PLN301"):
        planner.plan(llama(32, 4096, 32, 8, 11008), profile(memory="2 GiB"), **JOB, objective="memory")
