"""What is checked, in order. Each check notes what it found; `verify` runs them all and gathers the verdicts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from planner import planfile
from planner.cost import devicetypes
from planner.cost.task import Bools, Ints
from planner.engines.problems import layout_problems
from planner.verify import memory, rows, simulation, space, tables
from planner.verify.case import Case, key_of, name_of
from planner.verify.layouts import Evaluated, evaluate
from planner.verify.report import Check, Findings, Progress, Report
from planner.verify.tables import Priced


@dataclass
class State:
    """The case, and what several checks use."""

    case: Case
    progress: Progress
    passed: set[str] = field(default_factory=set)

    @cached_property
    def evaluated(self) -> list[Evaluated]:
        """The plan's layout and those of the alternatives, priced."""
        return [evaluate(self.case.task, layout) for layout in self.case.layouts]

    @cached_property
    def optimum(self) -> Evaluated:
        """The layout that the certificate is about, priced."""
        return self.evaluated[self.case.layouts.index(self.case.optimum)]

    @cached_property
    def enumeration(self) -> space.Enumeration:
        """The declared space, settled by the rules."""
        return space.enumerate_space(self.case.task, self.case.engine, self.case.declared)

    @cached_property
    def priced(self) -> Priced:
        """The rows that obey the rules."""
        return tables.price(self.case.task, self.enumeration.layouts)

    @cached_property
    def fits(self) -> Bools:
        """Which of them fit."""
        return memory.fitting(self.priced, self.case.modes, self.progress)

    @cached_property
    def kept(self) -> Priced:
        """These rows."""
        return self.priced.take(np.nonzero(self.fits)[0])

    @cached_property
    def least(self) -> Ints:
        """What they take at least, ns."""
        return rows.least_steps(self.kept, self.case.modes)

    def settle(self, cutoff: Ints) -> rows.Settled:
        """Each of them searched for a layout below its cutoff, ns."""
        return rows.settle(self.kept, self.case.modes, cutoff, self.progress, self.least)


def verify(case: Case, progress: Progress = lambda what, done, total: None) -> Report:
    """Check everything that a plan and its certificate say. A check whose ground failed is skipped."""
    state, checks = State(case, progress), []
    for name, title, look, ground in CHECKS:
        started = time.perf_counter()
        missing = [g for g in ground if g not in state.passed]
        if missing:
            checks.append(Check(name, title, "skipped", f"needs {', '.join(missing)}", (), {}, 0.0))
            continue
        progress(title, 0, 0)
        found = Findings()
        try:
            look(state, found)
        except (ArithmeticError, ValueError, IndexError, KeyError) as error:
            found.problems.append(f"cannot be checked: {error}")
        if not found.problems:
            state.passed.add(name)
        text = found.problems[0] if found.problems else found.text
        verdict = "FAIL" if found.problems else "pass"
        seconds = time.perf_counter() - started
        checks.append(Check(name, title, verdict, text, tuple(found.problems), found.figures, seconds))  # type: ignore[arg-type]
    return Report(tuple(checks))


def _file(s: State, found: Findings) -> None:
    plan = s.case.plan
    found.expect(s.case.stated_digest is not None, "the file states no digest")
    if s.case.stated_digest is not None:
        found.equal("digest of the plan", s.case.stated_digest, plan.digest)
    contents = planfile.content_digests(plan.model, plan.hardware, plan.job, plan.second_hardware)
    for name, digest in contents.items():
        found.equal(f"digest of the embedded {name}", plan.inputs.contents.get(name), digest)
    found.equal("digest of the job", plan.inputs.digests.get("job"), contents["job"])
    cluster = plan.cluster
    found.equal("hardware of the cluster", cluster.hardware, " + ".join(h.name for h in plan.profiles))
    for h in plan.profiles:
        found.equal("devices of a node", cluster.node_size, h.node_size)
    found.equal("nodes", cluster.nodes, -(-cluster.gpus // cluster.node_size))
    _two_types(plan, found)
    found.text = "digests of the plan, its model, hardware and job match their contents"


def _two_types(plan: planfile.Plan, found: Findings) -> None:
    """The parts of a cluster of two device types add up to it."""
    types = plan.cluster.types
    found.equal("device types of the cluster", len(types), len(plan.profiles) if len(plan.profiles) > 1 else 0)
    for t, h in zip(types, plan.profiles, strict=False):
        found.equal("hardware of a device type", t.hardware, h.name)
        found.equal(f"devices of {t.hardware}", t.gpus, t.nodes * h.node_size)
    if types:
        found.equal("devices of both types", sum(t.gpus for t in types), plan.cluster.gpus)


def _layouts(s: State, found: Findings) -> None:
    declared = s.case.declared
    for i, layout in enumerate(s.case.layouts):
        where = f"alternative {i}" if i else "the plan"
        for problem in layout_problems(s.case.task, s.case.engine, layout):
            found.problems.append(f"{where}: {problem.code} {problem.what}")
        for axis in (
            "tp",
            "cp",
            "pp",
            "ep",
            "etp",
            "zero",
            "micro_batch",
            "sequence_parallel",
            "offload",
            "order",
            "type_order",
            "context",
        ):
            found.expect(getattr(layout, axis) in getattr(declared, axis), f"{where}: {axis} outside the declared space")
        found.expect(not declared.dp or layout.dp in declared.dp, f"{where}: dp outside the declared space")
        found.expect(declared.any_etp or layout.etp in (1, layout.tp), f"{where}: etp is neither 1 nor tp")
        chunks = declared.schedules.get(layout.schedule, [])
        found.expect(layout.virtual_stages in chunks, f"{where}: schedule outside the declared space")
        used = [(st.layers - sum(st.counts), *st.counts) for st in layout.stages]
        modes = {mode for counts in used for mode, n in zip(("none", "selective", "full"), counts, strict=True) if n}
        found.expect(modes <= set(declared.recompute), f"{where}: recompute outside the declared space")
    keys = [key_of(layout) for layout in s.case.layouts]
    found.expect(len(set(keys)) == len(keys), "two alternatives have the same (tp, cp, pp, ep)")
    found.text = f"{len(keys)} layouts obey every rule of {s.case.engine.name} and hold all layers"


def _value(s: State, found: Findings) -> None:
    plan, certificate = s.case.plan, s.case.certificate
    found.equal("step time of the optimum, ns", certificate.objective_ns, s.optimum.step_ns)
    found.equal("objective, s", certificate.objective, s.optimum.step_ns / 1e9)
    found.equal("step time of the plan, s", plan.estimate.step_time_s, s.evaluated[0].step_ns / 1e9)
    for i, (a, e) in enumerate(zip(plan.alternatives, s.evaluated[1:], strict=True), 1):
        found.equal(f"step time of alternative {i}, s", a.step_time_s, e.step_ns / 1e9)
        slower = (e.step_ns - s.evaluated[0].step_ns) / s.evaluated[0].step_ns
        found.equal(f"share by which alternative {i} is slower", a.slower, slower)
    if plan.choice is not None:
        near = s.evaluated[0].step_ns <= (1 + plan.choice.tie) * s.optimum.step_ns
        found.expect(near, "the plan was preferred to the optimum, and is slower than a near tie")
        found.equal("step time of the fastest, s", plan.choice.fastest_step_time_s, s.optimum.step_ns / 1e9)
    found.figures = {"objective_ns": s.optimum.step_ns}
    found.text = f"the optimum takes {s.optimum.step_ns:,} ns, as the certificate says"


def _memory(s: State, found: Findings) -> None:
    least = None
    for i, e in enumerate(s.evaluated):
        left = int((e.capacity - e.held).min())
        fullest = int(np.argmin(e.capacity - e.held))
        where = f"alternative {i}" if i else "the plan"
        found.expect(left >= 0, f"{where}: rank {fullest} needs {-left:,} bytes more than it may have")
        least = left if least is None else min(least, left)
    stated, plan = s.case.plan.estimate.memory, s.evaluated[0]
    fullest = int(np.argmax(plan.held))
    types = devicetypes.stages_of(s.case.task, plan.layout) if s.case.task.types else ()
    if types:  # the stage that comes nearest to what its own type may hold
        fullest = stated.peak_stage
        least_headroom = min(m.headroom for m in stated.stages)
        found.equal("least headroom of the plan, GiB", stated.stages[fullest].headroom, least_headroom)
        names = [s.case.task.types[i].hardware.name for i in types]
        found.equal("device type of each stage", [m.hardware for m in stated.stages], names)
    peak, capacity = int(plan.held[fullest]), int(plan.capacity[fullest])
    most = plan.allocated[fullest] if types else plan.allocated.max()
    found.equal("peak allocated of the plan, GiB", stated.peak_allocated_gib, int(most) / 2**30)
    ratio = s.case.task.on(types[fullest]).reserved_ratio if types else s.case.task.reserved_ratio
    found.equal(
        "memory of the fullest rank, GiB", stated.stages[fullest].total, (peak * ratio + int(plan.outside[fullest])) / 2**30
    )
    found.figures = {"least_bytes_left": least, "peak_bytes": peak, "capacity_bytes": capacity}
    found.text = f"every rank of every layout fits; the fullest leaves {least:,} bytes"


def _simulation(s: State, found: Findings) -> None:
    e, v = s.optimum, s.optimum.layout.virtual_stages
    closed, whole = simulation.closed_form(e), simulation.run_whole(e)
    step_ns = -(-(closed + v * e.once_ns) // v) + e.constant_ns
    found.equal("closed form of the step, ns", step_ns, e.step_ns)
    demanded = closed < simulation.LARGEST and simulation.exact(e.layout, [int(t) for t in e.time])
    if demanded:
        found.equal("makespan of whole ranks (closed form against simulation)", closed, whole.makespan)
    apart = simulation.run_apart(e)
    gap, other = (r.makespan / closed - 1 for r in (apart, whole))
    found.figures = {
        "closed_form": closed, "simulated_whole": whole.makespan, "equality_demanded": demanded,
        "simulated_apart": apart.makespan,
        "gap_apart": gap, "gap_whole": other, "unit": f"1/{v} ns", "microbatches": e.microbatches,
        "microbatches_simulated": list(whole.simulated), "extrapolation_affine": whole.affine and apart.affine,
    }  # fmt: skip
    equal = "the same integer" if whole.makespan == closed else f"{other:+.2%} of the closed form"
    by = "" if len(whole.simulated) == 1 else f", extrapolated from {', '.join(map(str, whole.simulated))} micro-batches"
    found.text = f"{e.microbatches} micro-batches simulated{by}: {equal}; forward, backward and chunks apart {gap:+.2%}"


def _axes(s: State, found: Findings) -> None:
    documented = space.documented_axes(s.case.task, s.case.engine, s.case.plan.inputs)
    for axis in type(documented).model_fields:
        found.equal(f"declared {axis}", getattr(s.case.declared, axis), getattr(documented, axis))
    found.figures = {"declared": s.case.declared.model_dump(mode="json")}
    found.text = "every axis has the values that the documentation, pins and forbids give it"


def _space(s: State, found: Findings) -> None:
    stated, mine = s.case.certificate.space, s.enumeration
    found.equal("rows enumerated", stated.enumerated, mine.enumerated)
    for rule in sorted(stated.rules.keys() | mine.rejected.keys()):
        found.equal(f"rows excluded by rule '{rule}'", stated.rules.get(rule, 0), mine.rejected.get(rule, 0))
    found.equal("rows excluded by rules", stated.by_rule, sum(mine.rejected.values()))
    parts = stated.by_rule + stated.by_memory + stated.by_bound + stated.exact + stated.open
    found.equal("rows accounted for", parts, stated.enumerated)
    found.figures = {"enumerated": mine.enumerated, "by_rule": sum(mine.rejected.values()), "rules": mine.rejected}
    found.text = f"{mine.enumerated:,} rows, {len(mine.layouts):,} of them obey the rules; every count agrees"


def _fits(s: State, found: Findings) -> None:
    stated, fitting = s.case.certificate.space, int(np.count_nonzero(s.fits))
    found.equal("rows that do not fit", stated.by_memory, len(s.fits) - fitting)
    found.equal("rows that fit", stated.by_bound + stated.exact + stated.open, fitting)
    found.figures = {"by_memory": len(s.fits) - fitting, "fit": fitting}
    found.text = f"{len(s.fits) - fitting:,} rows cannot hold the model, {fitting:,} can, as the certificate counts"


def _certificate(s: State, found: Findings) -> None:
    c = s.case.certificate
    found.expect(c.status in ("optimal", "interrupted"), f"status {c.status} beside a plan")
    if c.status == "optimal":
        found.equal("bound of an optimum, s", c.bound, c.objective)
        found.equal("gap of an optimum", c.gap, 0.0)
        found.equal("open rows of an optimum", c.space.open, 0)
    else:
        bound, best = c.bound or 0.0, c.objective or 0.0
        found.expect(0 < bound <= best, "the bound is not below the plan")
        found.expect(abs((c.gap or 0.0) - (best - bound) / best) < 1e-9, "the gap is not that of bound and plan")
        found.expect(not c.complete, "an interrupted search cannot be complete")
    found.expect(not c.complete or c.status == "optimal", "a complete search proves an optimum")
    found.text = f"status {c.status}: bound, gap and open rows are consistent"


def _below(s: State, found: Findings) -> None:
    """No row under the proven bound; and none under the alternatives where the search proved them."""
    c = s.case.certificate
    bound = s.optimum.step_ns if c.status == "optimal" else round((c.bound or 0.0) * 1e9)
    settled = s.settle(np.full(len(s.kept), bound))
    _contradictions(s, found, settled)
    found.figures = _figures(settled) | {"bound_ns": bound}
    found.text = f"none of {len(s.kept):,} rows is below {bound:,} ns: {_ways(settled)}"


def _alternatives(s: State, found: Findings) -> None:
    times = [e.step_ns for e in s.evaluated]
    found.equal("the fastest of all layouts listed, ns", s.optimum.step_ns, min(times))
    rest = [e.step_ns for e in s.evaluated[1:]]
    found.expect(rest == sorted(rest), "the alternatives are not in the order of their times")
    if not s.case.certificate.complete:
        found.text = "the search ended early: it proved nothing about the alternatives"
        return
    listed = {key_of(e.layout): e.step_ns for e in s.evaluated}
    x = s.kept.layouts
    keys = zip(x.tp.tolist(), x.cp.tolist(), x.pp.tolist(), x.ep.tolist(), strict=True)
    cutoff = np.array([listed.get(key, max(times)) for key in keys], dtype=np.int64)
    settled = s.settle(cutoff)
    _contradictions(s, found, settled)
    found.figures = _figures(settled) | {"listed": len(listed)}
    found.text = f"each of {len(listed)} layouts is the best of its (tp, cp, pp, ep), no other one is better: {_ways(settled)}"


def _contradictions(s: State, found: Findings, settled: rows.Settled) -> None:
    for row, value in sorted(settled.below.items(), key=lambda item: item[1])[:5]:
        found.problems.append(f"{name_of(s.kept.layouts, row)} takes {value:,} ns: faster than the plan says it can be")


def _figures(settled: rows.Settled) -> dict[str, int]:
    return {"by_bound": settled.by_bound, "by_table": settled.by_table, "by_labels": settled.by_labels}


def _ways(settled: rows.Settled) -> str:
    return f"{settled.by_bound:,} by a bound, {settled.by_table:,} by exact tables, {settled.by_labels:,} solved"


CHECKS: tuple[tuple[str, str, Callable[[State, Findings], None], tuple[str, ...]], ...] = (
    ("file", "the file is what its digests say", _file, ()),
    ("layouts", "layouts obey rules and space", _layouts, ()),
    ("value", "step times, evaluated again", _value, ("layouts",)),
    ("memory", "every rank fits, in bytes", _memory, ("layouts",)),
    ("simulation", "the step, simulated", _simulation, ("layouts",)),
    ("axes", "axes of the declared space", _axes, ()),
    ("space", "the space, enumerated again", _space, ("axes",)),
    ("certificate", "status, bound and gap", _certificate, ()),
    ("fits", "which rows fit, decided again", _fits, ("axes",)),
    ("optimum", "no row is faster", _below, ("layouts", "axes")),
    ("alternatives", "alternatives are the best", _alternatives, ("layouts", "axes")),
)
"""(name, title, what looks, checks that must have passed before)."""
