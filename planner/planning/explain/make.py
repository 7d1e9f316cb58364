"""An explanation of a plan, put together."""

from __future__ import annotations

from planner.planfile import Plan
from planner.planning.estimate import estimate_layout
from planner.planning.explain import places
from planner.planning.explain.answers import Explanation
from planner.planning.explain.asked import Pins
from planner.planning.explain.excluded import excluded
from planner.planning.explain.losses import loss_of
from planner.planning.explain.ranks import explain_ranks
from planner.planning.explain.types import one_type_each
from planner.planning.explain.whynot import why_not, why_unfit
from planner.planning.make import short
from planner.planning.request import task_of_plan
from planner.search.space import declared_space
from planner.specs.layout import RECOMPUTE_MODES


def explain_plan(plan: Plan, pins: Pins | None = None) -> Explanation:
    """Why a plan is what it is; with `pins`, also why the best layout under them is not the plan.

    Everything is computed again from the model, job and profile in the plan. Raises InputError for an unknown engine, axis
    or value.
    """
    task, engine = task_of_plan(plan)
    answer = None
    now, layout = estimate_layout(task, plan.layout), plan.layout
    if pins:
        answer = why_not(plan, now, task, engine, pins)
    modes = tuple(range(len(RECOMPUTE_MODES)))
    if plan.certificate is not None:
        modes = declared_space(task, engine, plan.inputs.pins, plan.inputs.forbidden).modes
    ranks, bottleneck = explain_ranks(task, layout, modes)
    space = plan.certificate.space if plan.certificate else None
    return Explanation(
        name=short(layout),
        step_time_s=now.step_time_s,
        peak_gib=now.memory.peak_gib,
        limit_gib=now.memory.limit_gib,
        fits=now.memory.fits,
        ranks=ranks,
        bottleneck=bottleneck,
        losses=[loss_of(now, a.layout, estimate_layout(task, a.layout)) for a in plan.alternatives],
        excluded=excluded(task, engine, layout, space) if space else [],
        layouts=space.enumerated if space else None,
        dense=places.dense_mesh(layout, *plan.profiles),
        expert=places.expert_mesh(layout, *plan.profiles) if plan.model.routed_mlps else None,
        nodes=places.rank_map(layout, plan.cluster.node_size, places.node_types(task, layout)),
        unfit=None if now.memory.fits else why_unfit(plan, now, task, engine),
        why_not=answer,
        one_type=one_type_each(plan, task, engine, now.step_time_s) if space and answer is None else [],
    )
