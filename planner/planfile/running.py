"""Why the bundled runtime will not run a plan."""

from __future__ import annotations

from planner.errors import Problem
from planner.planfile.plan import Plan


def _runs(engine: str) -> bool:
    """Whether the bundled runtime is an engine with its traits: those that it alone has change what it does, any others only
    say how a run of theirs is priced."""
    from planner.engines.bundled import BUNDLED
    from planner.engines.traits import TRAITS

    base, *traits = engine.split("+")
    return base == BUNDLED.name and all(TRAITS[t].engines == (base,) for t in traits if t in TRAITS)


def refusals(plan: Plan) -> list[Problem]:
    """Why the bundled runtime will not run a plan: the rules of its engine, from the same table that the search uses."""
    from planner.cost.task import Subject
    from planner.engines.problems import layout_problems
    from planner.engines.registry import engine_named
    from planner.engines.traits import TRAITS

    if not _runs(plan.engine):
        own = ", ".join(f"+{t.name}" for t in TRAITS.values() if t.engines == ("bundled",))
        what = f"the plan is for engine {plan.engine}"
        why = f"this runtime is the bundled one, alone or with {own}"
        return [Problem("PLN502", what, why, "plan again with --engine bundled")]
    subject = Subject(plan.model, plan.job, plan.cluster.gpus, tuple(t.gpus for t in plan.cluster.types))
    return layout_problems(subject, engine_named(plan.engine), plan.layout)
