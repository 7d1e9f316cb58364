"""Why a layout that a person names is not the plan: it breaks rules, does not fit, or is not the fastest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.cost.task import LayoutArray, Task
from planner.engines.base import Engine
from planner.engines.rule import Rule, values_of
from planner.planfile import Estimate, Plan
from planner.planning.estimate import estimate_layout
from planner.planning.explain.answers import BrokenRule, Conflict, Shortfall, WhyNot
from planner.planning.explain.asked import Asked, Pins
from planner.planning.explain.changes import nearest_changes, resplit
from planner.planning.explain.losses import loss_of
from planner.planning.make import MEMORY_PARTS, short
from planner.search import conflicts, stages
from planner.search.extra import least_extra_memory, with_memory
from planner.search.solve import Outcome, group_of, price, search
from planner.search.space import NAMED, Space, declared_space, enumerate_rows, unruled_rows
from planner.specs.layout import SCHEDULES, Layout, even_stages
from planner.units import GIB, gib

_AXES = (
    "tp", "cp", "pp", "dp", "ep", "etp", "zero", "micro_batch", "schedule", "virtual_stages", "sequence_parallel",
    "offload", "order", "context",
)  # fmt: skip


@dataclass(frozen=True)
class _Question:
    """A plan, and what is asked about it."""

    plan: Plan
    now: Estimate
    """The plan's, made again."""
    task: Task
    engine: Engine
    pins: Pins
    """By the full names of axes."""
    asked: Asked
    """The pins and what the plan's own restrictions leave beside them."""
    space: Space


def why_not(plan: Plan, now: Estimate, task: Task, engine: Engine, pins: Pins) -> WhyNot:
    """Why the best layout under `pins` is not the plan. Raises InputError for an unknown axis or value."""
    named = Asked.of(pins, flag="--why-not").pins
    asked = Asked.of(plan.inputs.pins, plan.inputs.forbidden).also(named)
    return _answer(_Question(plan, now, task, engine, named, asked, asked.space(task, engine)))


def why_unfit(plan: Plan, now: Estimate, task: Task, engine: Engine) -> WhyNot:
    """What conflicts in a plan that does not fit, and what would help: its axes and recompute modes as pins."""
    used = {mode for stage in plan.layout.stages for mode in stage_modes(stage.layers, *stage.counts)}
    pins: dict[str, list[object]] = {name: [getattr(plan.layout, name)] for name in _AXES}
    pins["recompute"] = [*sorted(used)]
    asked = Asked.of(pins)
    q = _Question(plan, now, task, engine, asked.pins, asked, asked.space(task, engine))
    short_of, changes = shortfall(task, plan.layout), resplit(task, engine, plan.layout, q.space)
    conflict = memory_conflict(task, plan.layout, q.space.modes)
    if conflict is None:  # another split fits: this one is part of the conflict
        s, stage = short_of.stage, plan.layout.stages[short_of.stage]
        members = [f"memory of stage {s}", f"stage {s} holds {stage.layers} layers, recompute {stage.recompute}"]
        conflict = Conflict(members=members, rules=[], stages=[s], all_layers=False)
    else:
        changes += nearest_changes(task, engine, asked)
    sentence = _over("the layout", short_of)
    more = {"shortfall": short_of, "conflict": conflict, "changes": changes}
    return _result(q, "does not fit", sentence, "infeasible", 1, **more)


def stage_modes(layers: int, selective: int, full: int) -> set[str]:
    """Recompute modes of a stage."""
    counts = {"none": layers - selective - full, "selective": selective, "full": full}
    return {mode for mode, count in counts.items() if count}


def _answer(q: _Question) -> WhyNot:
    rows = enumerate_rows(q.task, q.engine, q.space)
    if not len(rows.layouts):
        return _breaks_rules(q, rows.enumerated)
    outcome = search(q.task, q.engine, q.space, 1)
    if not outcome.candidates:
        return _does_not_fit(q, outcome)
    return _fits(q, outcome)


def _result(q: _Question, verdict: str, sentence: str, status: str, layouts: int, **more: Any) -> WhyNot:
    pins = {name: list(values) for name, values in q.pins.items()}
    data = {"pins": pins, "verdict": verdict, "sentence": sentence, "notes": _notes(q), "status": status, "layouts": layouts}
    return WhyNot.model_validate(data | more)


def pins_text(pins: Pins) -> str:
    """Pins as they are written: "tp=4 pp=8"."""
    return " ".join(f"{name}={','.join(str(v).lower() for v in values)}" for name, values in pins.items())


def _notes(q: _Question) -> list[str]:
    """Where the question lies outside the space that the plan was proven in."""
    own = Asked.of(q.plan.inputs.pins, q.plan.inputs.forbidden)
    lifted = [axis for axis in own.axes if axis not in own.also(q.pins).axes or axis in q.pins]
    notes = [f"the plan was made with a restriction on {axis}, lifted for this answer" for axis in lifted]
    declared = declared_space(q.task, q.engine, {}, ())
    for axis in q.pins:
        known = _declared(declared, axis)
        if known and (other := [v for v in _declared(q.space, axis) if v not in known]):
            named, shown = (", ".join(map(str, v)) for v in (other, known))
            notes.append(f"{axis} {named} is outside the declared space, which has {shown}")
    return notes


def _declared(space: Space, axis: str) -> list[Any]:
    """Values of an axis in a space; empty where any goes."""
    if axis in ("schedule", "virtual_stages"):
        values = sorted({pair[axis == "virtual_stages"] for pair in space.schedules})
        return values if axis == "virtual_stages" else [SCHEDULES[code] for code in values]
    if axis in NAMED:
        return [NAMED[axis][code] for code in getattr(space, axis)]
    return [] if axis in ("recompute", "micro_batch") else list(getattr(space, axis))


# ---- it fits -------------------------------------------------------------------------------------------------------


def _fits(q: _Question, outcome: Outcome) -> WhyNot:
    """The best layout under the pins, against the plan."""
    layout, label = outcome.candidates[0].layout, pins_text(q.pins)
    loss = loss_of(q.now, layout, estimate_layout(q.task, layout))
    mine, own = round(loss.step_time_s * 1e9), round(q.now.step_time_s * 1e9)
    if layout == q.plan.layout:
        verdict, sentence = "the plan", f"the plan has {label}"
    elif mine == own:
        verdict, sentence = "equal", f"{label} is as fast as the plan: equal times are decided by fewer moving parts"
    elif mine > own:
        verdict, sentence = "slower", f"the best layout with {label} is {loss.slower:.1%} slower than the plan"
    else:
        verdict, sentence = (
            "faster",
            f"the best layout with {label} is {-loss.slower:.1%} faster than the plan: {_why_faster(q)}",
        )
    return _result(q, verdict, sentence, outcome.status, outcome.counts.enumerated, loss=loss)


def _why_faster(q: _Question) -> str:
    """Why the plan is not that fast layout."""
    if q.plan.objective == "memory":
        return "the plan was made for the lowest memory"
    if q.plan.certificate is None:
        return "the plan's layout was named by a person"
    if _notes(q):
        return "it lies outside the space that the plan was searched in"
    if q.plan.choice is not None and q.plan.choice.rule == "near tie":
        return "the plan is preferred to it as a near tie"
    return "the plan's search ended early, or was made with another model of the cost"


# ---- it breaks rules -----------------------------------------------------------------------------------------------


def _breaks_rules(q: _Question, layouts: int) -> WhyNot:
    """Every rule that one of the pins breaks alone, then those that they break together."""
    free = Asked(forbid=())
    broken = [found for axis in q.pins for found in _broken(q, free.also({axis: q.pins[axis]}), {axis: list(q.pins[axis])})]
    x = unruled_rows(q.task, q.space)
    core = conflicts.rule_core(q.engine, conflicts.broken(q.task, q.engine, x))
    together = _described(q, x, core, {a: list(v) for a, v in q.asked.pins.items()})
    known = {b.code for b in broken}
    broken += [b for b in together if b.code not in known]
    conflict = Conflict(members=[b.what for b in together], rules=[b.code for b in together], stages=[], all_layers=False)
    sentence = (
        f"{pins_text(q.pins)} breaks {'a rule' if len(broken) == 1 else f'{len(broken)} rules'}, whatever the other axes are"
    )
    changes = nearest_changes(q.task, q.engine, q.asked) if len(q.asked.axes) > 1 else []
    return _result(
        q, "breaks rules", sentence, "infeasible", layouts,
        broken=broken, conflict=conflict, allowed={axis: _allowed(q, axis) for axis in q.pins}, changes=changes,
    )  # fmt: skip


def _broken(q: _Question, asked: Asked, pins: dict[str, list[Any]]) -> list[BrokenRule]:
    """Rules that every row under `asked` breaks."""
    x = unruled_rows(q.task, asked.space(q.task, q.engine))
    breaks = conflicts.broken(q.task, q.engine, x)
    return _described(q, x, [rule for i, rule in enumerate(q.engine.all_rules) if bool(breaks[:, i].all())], pins)


def _described(q: _Question, x: LayoutArray, rules: Sequence[Rule], pins: dict[str, list[Any]]) -> list[BrokenRule]:
    """Rules with the numbers of the simplest row that breaks each."""
    order, found = np.lexsort((x.micro_batch, x.tp * x.cp * x.pp * x.ep * x.etp)), []
    for rule in rules:
        row = int(order[np.argmax(rule.violated(q.task, x)[order])])
        pp = int(x.pp[row])
        p = rule.problem(
            values_of(q.task, x.layout(row, even_stages(q.task.model.n_layers, pp, virtual_stages=int(x.virtual_stages[row]))))
        )
        found.append(BrokenRule(pins=pins, code=p.code, name=rule.name, what=p.what, why=p.why, fix=p.fix))
    return found


def _allowed(q: _Question, axis: str) -> list[Any]:
    """Values of one pinned axis that the rules leave, the others as asked."""
    x = enumerate_rows(q.task, q.engine, q.asked.without(axis).space(q.task, q.engine)).layouts
    if axis == "recompute":
        return []
    values = sorted({int(v) for v in getattr(x, axis)})
    names = SCHEDULES if axis == "schedule" else NAMED.get(axis)
    return [names[v] for v in values] if names else values


# ---- it does not fit -----------------------------------------------------------------------------------------------


def _does_not_fit(q: _Question, outcome: Outcome) -> WhyNot:
    """The closest layout, what conflicts in it, and what would help."""
    extra = least_extra_memory(q.task, q.engine, q.space)
    changes = nearest_changes(q.task, q.engine, q.asked)
    label = pins_text(q.pins)
    if extra is None:
        sentence = f"{label} does not fit, with 16 TiB a device neither"
        return _result(q, "does not fit", sentence, outcome.status, outcome.counts.enumerated, changes=changes)
    closest = search(with_memory(q.task, extra), q.engine, q.space, 1).candidates[0].layout
    short_of = shortfall(q.task, closest)
    sentence = f"{label} does not fit: " + _over("the closest layout", short_of)
    more = {"shortfall": short_of, "conflict": memory_conflict(q.task, closest, q.space.modes), "changes": changes}
    return _result(q, "does not fit", sentence, outcome.status, outcome.counts.enumerated, **more)


def _over(who: str, short_of: Shortfall) -> str:
    over = gib(short_of.over_gib * GIB)
    needs, limit = gib(short_of.needs_gib * GIB), gib(short_of.limit_gib * GIB)
    return f"{who} needs {needs} on stage {short_of.stage}, {over} over the limit of {limit}"


def shortfall(task: Task, layout: Layout) -> Shortfall:
    """How far a layout is from fitting, on the rank that needs most."""
    memory = estimate_layout(task, layout).memory
    worst = memory.stages[memory.peak_stage]
    return Shortfall(
        layout=layout, name=short(layout), stage=worst.stage, needs_gib=worst.total, limit_gib=memory.limit_gib,
        over_gib=-worst.headroom, cause=worst.cause, parts={name: getattr(worst, name) for name in MEMORY_PARTS},
    )  # fmt: skip


def memory_conflict(task: Task, layout: Layout, modes: tuple[int, ...]) -> Conflict | None:
    """A minimal conflict in the outer row of a layout that does not fit, over all its splits; None when one fits."""
    x = LayoutArray.of([layout], task.job)
    p, stack = price(task, x)
    g = group_of(task, modes, x, p, stack, np.array([0]))
    fullest = estimate_layout(task, layout).memory.peak_stage
    core = conflicts.memory_core(stages.tables(g, task), fullest)
    if core is None:
        return None
    members = [f"memory of stage {s}" for s in core.stages] + ["all layers placed"] * core.placed
    return Conflict(members=members, rules=[], stages=list(core.stages), all_layers=core.placed)
