"""Plans for tests: made from random small tasks or by name, and changed by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

from search.instances import instance, mixed_instance

from planner.cost.task import Task
from planner.planfile import Plan
from planner.planning.make import NothingFits, make_plan
from planner.planning.request import Request
from planner.specs.policy import Policy
from planner.verify.case import case_of
from planner.verify.checks import verify
from planner.verify.report import Report


def made(task: Task, engine: str, pins: dict[str, Any], forbid: list[str], top_k: int = 4) -> Plan | None:
    """The plan of a task, None when nothing fits."""
    policy = Policy(max_memory_fraction=task.max_memory_fraction)
    nodes = {"nodes": task.gpus // task.hardware.node_size} if task.gpus >= task.hardware.node_size else {"gpus": task.gpus}
    request = Request(
        task.model, task.hardware, task.job, **nodes, engine=engine, policy=policy, pins=pins, forbid=forbid
    )  # fmt: skip
    try:
        return make_plan(request, top_k)
    except NothingFits:
        return None


@cache
def random_plan(seed: int, mixing: bool = False) -> Plan | None:
    """The plan of a random small task, loose or tight, pinned or not."""
    task, engine, space = (mixed_instance if mixing else instance)(seed)
    pins: dict[str, Any] = {"micro_batch": [1, 2]}
    if space.modes != (0, 1, 2):
        pins["recompute"] = [("none", "selective", "full")[m] for m in space.modes]
    return made(task, engine.name, pins, ["cp"] if space.cp == (1,) else [])


def checked(plan: Plan) -> Report:
    """The verification of a plan as if it had been written and read."""
    return verify(case_of(plan, plan.digest, "plan.json"))


def changed(plan: Plan, change: Callable[[dict[str, Any]], None]) -> Plan:
    """A plan with its data changed by hand, and a digest that fits the change."""
    data = copy.deepcopy(plan.model_dump(mode="json"))
    change(data)
    return Plan.model_validate(data)


def failed(report: Report) -> list[str]:
    """Names of the checks that failed."""
    return [c.name for c in report.checks if c.verdict == "FAIL"]
