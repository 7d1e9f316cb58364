"""Two device types against one: what each type would do alone, and what all devices would do at the slower one's speed."""

from __future__ import annotations

from dataclasses import replace

from planner.cost.task import Task
from planner.engines.base import Engine, job_problems
from planner.errors import InputError
from planner.planfile import Plan
from planner.planning.explain.answers import OneType
from planner.planning.make import short
from planner.search.solve import search
from planner.search.space import declared_space

SEARCH_SECONDS = 60.0
"""After this long a comparison is made with the best layout so far, and says so."""


def one_type_each(plan: Plan, task: Task, engine: Engine, step_time_s: float) -> list[OneType]:
    """The fastest layout of each type alone, and of as many devices as there are if all were of the slower type.

    The plan's pins and forbids hold there too, but for those of the order of the types. Empty for one type.
    """
    if not task.types:
        return []
    found = [_alone(plan, task, engine, i, t.gpus, f"{t.hardware.name} alone", step_time_s) for i, t in enumerate(task.types)]
    slower = min(range(len(task.types)), key=lambda i: task.on(i).peak)
    name = f"every device a {task.types[slower].hardware.name}"
    return [*found, _alone(plan, task, engine, slower, task.gpus, name, step_time_s)]


def _alone(plan: Plan, task: Task, engine: Engine, i: int, gpus: int, what: str, step_time_s: float) -> OneType:
    one = replace(task.on(i), gpus=gpus)
    pins = {name: values for name, values in plan.inputs.pins.items() if name != "type_order"}
    forbid = [name for name in plan.inputs.forbidden if name != "type_order"]
    base = {"what": what, "hardware": task.types[i].hardware.name, "gpus": gpus}
    try:
        if problems := job_problems(one, engine):
            raise InputError(problems)
        outcome = search(one, engine, declared_space(one, engine, pins, forbid), 1, time_limit=SEARCH_SECONDS)
    except (InputError, TimeoutError) as error:
        return OneType.model_validate(base | {"reason": str(error).splitlines()[0] or "no layout within the time limit"})
    if not outcome.candidates:
        return OneType.model_validate(base | {"reason": "no layout fits"})
    best = outcome.candidates[0]
    seconds = best.step_ns / 1e9
    proven = outcome.status == "optimal"
    return OneType.model_validate(
        base | {"step_time_s": seconds, "times_the_plan": seconds / step_time_s, "layout": short(best.layout), "proven": proven}
    )
