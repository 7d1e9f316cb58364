"""Why the bundled runtime will not run a plan."""

from __future__ import annotations

from planner.errors import Problem
from planner.planfile.plan import Plan

RUNNABLE = frozenset(("bundled", "compile"))
"""The bundled engine, and its recipes that change what runs; others only say how a run is priced."""


def refusals(plan: Plan) -> list[Problem]:
    """Why the bundled runtime will not run a plan: the rules of its engine, from the same table that the search uses."""
    from planner.cost.task import Subject
    from planner.engines.problems import layout_problems
    from planner.engines.registry import engine_named

    if not RUNNABLE.issuperset(plan.engine.split("+")) or not plan.engine.startswith("bundled"):
        what = f"the plan is for engine {plan.engine}"
        why = "this runtime is the bundled one, alone or with +compile"
        return [Problem("PLN502", what, why, "plan again with --engine bundled")]
    subject = Subject(plan.model, plan.job, plan.cluster.gpus, tuple(t.gpus for t in plan.cluster.types))
    return layout_problems(subject, engine_named(plan.engine), plan.layout)
