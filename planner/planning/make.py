"""Make a plan or an estimate: search, assemble, or explain why nothing fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from planner import stopping
from planner.cost.simulated import step_of_chunks
from planner.cost.task import DeviceType
from planner.engines.problems import job_problems, layout_problems
from planner.errors import InfeasibleError, InputError, Problem, input_error
from planner.planfile import TWO_TYPES_VERSION, Alternative, Certificate, Choice, Estimate, LowestMemory, Memory, Plan
from planner.planning import choice
from planner.planning.economy import compute_optimal, economy
from planner.planning.estimate import estimate_layout
from planner.planning.lowmemory import lowest_limit
from planner.planning.request import Request, Setting, one_type, prepare
from planner.search.solve import Outcome, Progress
from planner.search.space import Space, declared_space
from planner.specs.layout import CONTEXTS, OFFLOADS, RANK_ORDERS, RECOMPUTE_MODES, SCHEDULES, TYPE_ORDERS, Layout
from planner.specs.policy import Policy
from planner.units import GIB, gib, seconds

if TYPE_CHECKING:
    from planner.planning.explain.answers import Change


def make_plan(
    request: Request, alternatives: int = 5, progress: Progress | None = None, time_limit: float | None = None
) -> Plan:
    """The proven best plan of the declared space, with the best of the `alternatives` - 1 next (tp, cp, pp, ep).

    Where several of them are as fast as can be told, the plan is the simplest or emptiest one: see `choice`. With the
    objective `memory` the space is what fits under the lowest limit that anything fits under: see `lowmemory`.
    `time_limit` in seconds. Raises InputError, InfeasibleError when nothing fits, TimeoutError or KeyboardInterrupt when
    stopped before any plan.
    """
    if alternatives < 1:
        raise input_error("PLN107", f"alternatives {alternatives}: at least 1, the plan itself", "", "")
    with stopping.limit(time_limit):
        return _made(request, alternatives, progress)


def _made(request: Request, alternatives: int, progress: Progress | None) -> Plan:
    from planner.search.solve import search

    setting = prepare(request)
    if problems := job_problems(setting.task, setting.engine):
        raise InputError(problems)
    if request.objective == "memory":
        one_type(request, "--objective memory")
    space = declared_space(setting.task, setting.engine, request.pins, request.forbid)
    floor = lowest_limit(setting.task, setting.engine, space) if request.objective == "memory" else None
    task = setting.task if floor is None else floor.task
    outcome = search(task, setting.engine, space, alternatives, progress)
    certificate = certificate_of(outcome, space, None if floor is None else floor.proof)
    if not outcome.candidates:
        if outcome.status == "interrupted":
            raise TimeoutError if outcome.stopped_by == "limit" else KeyboardInterrupt
        raise explain_infeasible(setting, space, request, certificate)
    plan = assembled(setting, outcome, certificate)
    return plan.model_copy(update={"objective": request.objective})


def assembled(setting: Setting, outcome: Outcome, certificate: Certificate) -> Plan:
    """The plan among the candidates of a search, the others as alternatives."""
    found = [choice.Proven(c.layout, estimate_layout(setting.task, c.layout)) for c in outcome.candidates]
    # A search that ended early proved too little for anything but its best to be the plan.
    chosen = 0 if outcome.stopped_by else choice.choose(found)
    best = outcome.candidates[chosen]
    others = [
        Alternative(
            layout=c.layout,
            step_time_s=f.estimate.step_time_s,
            slower=(c.step_ns - best.step_ns) / best.step_ns,
            peak_gib=f.estimate.memory.peak_gib,
            oom_probability=f.estimate.memory.oom_probability,
            tokens_per_s_per_gpu=f.estimate.tokens_per_s_per_gpu,
        )
        for i, (c, f) in enumerate(zip(outcome.candidates, found, strict=True))
        if i != chosen
    ]
    estimate = found[chosen].estimate
    why = Choice(
        rule="near tie" if chosen else "fastest",
        reason=choice.reason(found, chosen, short(found[0].layout)),
        tie=choice.TIE,
        fastest_step_time_s=found[0].estimate.step_time_s,
        inside_interval=choice.inside_interval(estimate, [o.step_time_s for o in others]),
    )
    return _assemble(setting, best.layout, estimate, certificate, others, why)


def _assemble(
    setting: Setting,
    layout: Layout,
    estimate: Estimate,
    certificate: Certificate | None = None,
    others: Sequence[Alternative] = (),
    why: Choice | None = None,
) -> Plan:
    simulated = step_of_chunks(setting.task, layout)
    if simulated is not None:
        estimate = estimate.model_copy(update={"simulated_step_time_s": simulated / 1e9})
    return Plan(
        model=setting.task.model,
        job=setting.task.job,
        cluster=setting.cluster,
        hardware=setting.task.hardware,
        engine=setting.engine.name,
        policy=setting.policy,
        **_second(setting),
        layout=layout,
        estimate=estimate,
        certificate=certificate,
        choice=why,
        alternatives=list(others),
        **_money(setting, estimate),
        inputs=setting.inputs,
    )


def _second(setting: Setting) -> dict[str, Any]:
    """The profile of the second device type, and the version of the format that has one."""
    profiles = setting.task.profiles[1:]
    return {"second_hardware": profiles[0], "version": TWO_TYPES_VERSION} if profiles else {}


def _money(setting: Setting, estimate: Estimate) -> dict[str, Any]:
    """What the budget comes to, or how many tokens would be compute-optimal without one."""
    task = setting.task
    if setting.budget is None:
        return {"compute_optimal": compute_optimal(task.model, task.job, estimate)}
    return {"economy": economy(setting.budget, task.job, task.gpus, task.types or task.hardware, estimate)}


def certificate_of(outcome: Outcome, space: Space, lowest: LowestMemory | None) -> Certificate:
    best = outcome.candidates[0].step_ns if outcome.candidates else None
    bound = outcome.bound_ns
    gap = (best - bound) / best if best and bound is not None else None
    counts = outcome.counts
    return Certificate.model_validate(
        {
            "status": outcome.status,
            "objective": None if best is None else best / 1e9,
            "objective_ns": best,
            "bound": None if bound is None else bound / 1e9,
            "gap": gap,
            "space": {
                "enumerated": counts.enumerated, "by_rule": counts.by_rule, "by_memory": counts.by_memory,
                "by_bound": counts.by_bound, "exact": counts.exact, "open": counts.open, "rules": counts.rules,
            },
            "declared": _declared(space),
            "complete": not outcome.stopped_by,
            "seconds": round(outcome.seconds, 3),
            "solver": outcome.solver,
            "lowest_memory": lowest,
        }
    )  # fmt: skip


def _declared(space: Space) -> dict[str, Any]:
    """The declared space as the plan file records it."""
    axes = ("tp", "cp", "pp", "dp", "ep", "etp", "micro_batch", "zero")
    chunks: dict[str, list[int]] = {}
    for code, v in space.schedules:
        chunks.setdefault(SCHEDULES[code], []).append(v)
    return {
        **{axis: list(getattr(space, axis)) for axis in axes},
        "any_etp": space.any_etp,
        "schedules": chunks,
        "sequence_parallel": [bool(v) for v in space.sequence_parallel],
        "recompute": [RECOMPUTE_MODES[mode] for mode in space.modes],
        "offload": [OFFLOADS[code] for code in space.offload],
        "order": [RANK_ORDERS[code] for code in space.order],
        "type_order": [TYPE_ORDERS[code] for code in space.type_order],
        "context": [CONTEXTS[code] for code in space.context],
    }


class NothingFits(InfeasibleError):
    """The proof that no layout of the space fits."""

    def __init__(
        self, problems: list[Problem], certificate: Certificate, smallest_nodes: int | None, changes: Sequence[Change] = ()
    ):
        super().__init__(problems)
        self.changes = changes
        """The cheapest single changes that work."""
        self.certificate = certificate
        self.smallest_nodes = smallest_nodes


def explain_infeasible(setting: Setting, space: Space, request: Request, certificate: Certificate) -> NothingFits:
    """The binding constraint of the closest layout, the cheapest changes that work, and the smallest cluster."""
    from planner.planning.explain.asked import Asked
    from planner.planning.explain.changes import nearest_changes
    from planner.search import explain

    task, engine = setting.task, setting.engine
    asked, whole = Asked.of(request.pins, request.forbid), request.nodes is not None
    changes: list[Change] = []
    smallest, fix = None, "the search for what would help was stopped"
    try:
        changes = nearest_changes(task, engine, asked, whole, SHOWN_CHANGES)
        smallest = next((c.gpus for c in changes if c.gpus), None)
        if smallest is None and not task.types:
            unit = task.hardware.node_size if whole else 1
            smallest = explain.smallest_cluster(task, engine, lambda t: asked.space(t, engine), unit)
        fix = _fix(changes)
    except (TimeoutError, KeyboardInterrupt):  # what was asked is proven: stopped while looking for advice
        fix = _fix(changes) if changes else fix
    with stopping.shielded():
        problem = why_nothing_fits(setting, space, fix)
    nodes = None if smallest is None else -(-smallest // task.hardware.node_size)
    return NothingFits([problem], certificate, nodes, changes[:SHOWN_CHANGES])


def why_nothing_fits(setting: Setting, space: Space, fix: str) -> Problem:
    """The binding constraint of the closest layout, or the rules that leave none."""
    from planner.search import explain
    from planner.search.space import enumerate_rows

    task = setting.task
    rows = enumerate_rows(task, setting.engine, space)
    where = " + ".join(f"{t.gpus} x {t.hardware.device.name}" for t in task.types or (DeviceType(task.hardware, task.gpus),))
    nearest = explain.nearest_layout(task, space, rows)
    if nearest is None:
        rules = sorted(rows.rejected.items(), key=lambda item: -item[1])
        counted = "; ".join(f"{name}: {n:,}" for name, n in rules[:4])
        what = f"no layout of {task.model.name} on {where} obeys the rules"
        return Problem("PLN302", what, f"of {rows.enumerated:,} layouts, excluded by {counted}", fix)
    memory = estimate_layout(task, nearest.layout).memory
    worst = memory.stages[memory.peak_stage]
    parts = ", ".join(f"{name} {size:.1f}" for name in MEMORY_PARTS if (size := getattr(worst, name)) >= 0.05)
    what = (
        f"{task.model.name} does not fit on {where}: the closest layout ({short(nearest.layout)}) needs "
        f"{memory.peak_gib:.1f} GiB on stage {memory.peak_stage}, the limit is {memory.limit_gib:.1f} GiB"
    )
    why = f"{worst.cause}; GiB: {parts}; {memory.limit_gib:.1f} GiB is {limit_text(memory, setting.policy)}"
    return Problem("PLN301", what, why, fix)


MEMORY_PARTS = ("params", "grads", "optimizer", "activations", "buffers", "transient", "outside")
"""Parts of a stage's memory, as messages list them."""
SHOWN_CHANGES = 2
"""Changes that the message names, the cheapest ones."""
_VERBS = {"layers": "", "axis": "set ", "states": "use ", "fraction": "set ", "nodes": "use ", "memory": ""}


def _fix(changes: Sequence[Change]) -> str:
    """The cheapest changes that make something fit, one a line."""
    lines = [f"{_VERBS[c.kind]}{c.text}, {seconds(c.step_time_s)} a step" for c in changes[:SHOWN_CHANGES]]
    if not lines:
        return "no single change that was tried works, more nodes neither: loosen pins, or change batch, sequence or limits"
    return "\n   or: ".join(lines)


def limit_text(memory: Memory, policy: Policy) -> str:
    """What the memory limit is, by the policy's limit that binds: "0.92 of 79.1 GiB"."""
    usable = gib(memory.usable_gib * GIB)
    if memory.limit_by == "max_memory_fraction":
        return f"{policy.max_memory_fraction:g} of {usable}"
    return f"what max_oom_probability {policy.max_oom_probability:g} leaves of {usable}"


def short(layout: Layout) -> str:
    """A layout in one line: degrees above one, ZeRO, micro-batch, schedule, recompute."""
    degrees = [f"{name} {getattr(layout, name)}" for name in ("tp", "cp", "pp", "dp", "ep", "etp") if getattr(layout, name) > 1]
    schedule: str = layout.schedule if layout.pp > 1 else ""
    if layout.virtual_stages > 1:
        schedule += f" v{layout.virtual_stages}"
    kinds = sorted({s.recompute.partition(":")[0] for s in layout.stages})
    recompute = "" if kinds == ["none"] else "recompute " + "/".join(kinds)
    placed = [f"order {layout.order}"] if layout.order != "tp-cp-dp-pp" else []
    placed += [f"shard {layout.shard}"] if layout.shard else []
    placed += [layout.context] if layout.context != "default" else []
    placed += ["second type first"] if layout.type_order == "reversed" else []
    placed += [f"offload {layout.offload}"] if layout.offload != "none" else []
    parts = [*degrees, f"zero {layout.zero}", f"micro_batch {layout.micro_batch}", schedule, *placed, recompute]
    return ", ".join(p for p in parts if p)


def make_estimate(request: Request, layout: Layout) -> Plan:
    """The prediction for a layout that a person named: a plan without a certificate. Raises InputError."""
    setting = prepare(request)
    if problems := layout_problems(setting.task, setting.engine, layout):
        raise InputError(problems)
    return _assemble(setting, layout, estimate_layout(setting.task, layout))
