"""Plans for two device types pass the verification; changed ones fail the check that is about it."""

from __future__ import annotations

from functools import cache

import pytest
from search.test_hetero import instance

from planner.planfile import Plan
from planner.planning.make import NothingFits, make_plan
from planner.planning.request import Request
from verify.plans import changed, checked, failed


@cache
def random_plan(seed: int) -> Plan | None:
    t, engine, space = instance(seed)
    shares = [(d.hardware, d.gpus // d.hardware.node_size) for d in t.types]
    pins = {"micro_batch": [1, 2]}
    if space.modes != (0, 1, 2):
        pins["recompute"] = [("none", "selective", "full")[m] for m in space.modes]
    try:
        return make_plan(Request(t.model, "", t.job, engine=engine.name, pins=pins, forbid=["cp"], shares=shares), 3)
    except NothingFits:
        return None


SEEDS = [0, 1, 2, 4, 5, 7, *(pytest.param(s, marks=pytest.mark.slow) for s in range(10, 40))]


@pytest.mark.parametrize("seed", SEEDS)
def test_plans_of_random_tasks_pass(seed):
    plan = random_plan(seed)
    if plan is not None:
        assert checked(plan).passed, checked(plan).reason


def test_changed_plans_fail():
    plan = next(p for p in map(random_plan, range(10)) if p is not None)
    first, second = plan.cluster.types

    def swapped(data):
        order = "reversed" if plan.layout.type_order == "as-named" else "as-named"
        data["layout"]["type_order"] = order

    def other_sizes(data):
        data["cluster"]["types"][0]["gpus"] *= 2

    def larger_memory(data):
        figure = data["second_hardware"]["device"]["memory"]
        figure["value"] = "500 GiB"

    def other_type(data):
        for m in data["estimate"]["memory"]["stages"]:
            m["hardware"] = {first.hardware: second.hardware, second.hardware: first.hardware}[m["hardware"]]

    def one_order(data):
        data["certificate"]["declared"]["type_order"] = ["as-named"]

    for change, check in (
        (swapped, "value"), (other_sizes, "file"), (larger_memory, "file"), (other_type, "memory"), (one_order, "axes"),
    ):  # fmt: skip
        assert {check, "memory"} & set(failed(checked(changed(plan, change)))), change.__name__
    assert "axes" in failed(checked(changed(plan, one_order)))
