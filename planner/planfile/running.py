"""Why the bundled runtime will not run a plan."""

from __future__ import annotations

from planner.errors import Problem
from planner.planfile.plan import Plan


def refusals(plan: Plan) -> list[Problem]:
    """Why the bundled runtime will not run a plan: the rules of its engine, from the same table that the search uses."""
    from planner.cost.task import Subject
    from planner.engines.bundled import BUNDLED
    from planner.engines.problems import layout_problems
    from planner.engines.registry import engine_named
    from planner.engines.traits import TRAITS

    base, *traits = plan.engine.split("+")
    # Recipes that it alone has change what it does, any others only say how a run of theirs is priced.
    own = [t.name for t in TRAITS.values() if t.engines == (BUNDLED.name,)]
    if base != BUNDLED.name or any(t in TRAITS and t not in own for t in traits):
        what = f"the plan is for engine {plan.engine}"
        why = f"this runtime is the bundled one, alone or with {', '.join(f'+{name}' for name in own)}"
        return [Problem("PLN502", what, why, "plan again with --engine bundled")]
    subject = Subject(plan.model, plan.job, plan.cluster.gpus, tuple(t.gpus for t in plan.cluster.types))
    return layout_problems(subject, engine_named(plan.engine), plan.layout)
