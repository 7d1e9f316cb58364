"""A plan in the terminal: what was chosen, where the time goes, what fills the memory, what was proven."""

from __future__ import annotations

import os
import sys
from itertools import groupby
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from planner.planfile import Estimate, Plan, StageMemory
from planner.planning.make import limit_text, short
from planner.report import money
from planner.report.stagetext import stages_text
from planner.report.uncertainty import probability, step_time, with_interval
from planner.specs.layout import CONTEXTS, RANK_ORDERS, Stage
from planner.specs.projections import trained_params
from planner.units import GIB, count, gib, seconds, significant

_BREAKDOWN = (
    ("compute", "compute"),
    ("recompute", "recompute"),
    ("tp_comm", "tensor-parallel traffic"),
    ("cp_comm", "context-parallel traffic"),
    ("ep_comm", "expert-parallel traffic"),
    ("zero_comm", "ZeRO traffic of micro-batches"),
    ("pp_comm", "pipeline traffic"),
    ("bubble", "pipeline bubble"),
    ("dp_comm", "data-parallel traffic"),
    ("optimizer", "optimizer"),
    ("other", "other"),
)
_PARTS = ("params", "grads", "optimizer", "activations", "buffers", "transient")


def console(stream: TextIO | None = None, width: int | None = None, piped: int = 140) -> Console:
    """A console that is `piped` columns wide when the output is not a terminal, and honours NO_COLOR."""
    stream = stream or sys.stdout
    if width is None and not stream.isatty() and "COLUMNS" not in os.environ:
        width = piped
    return Console(file=stream, width=width, highlight=False, emoji=False)


def print_plan(plan: Plan, out: Console) -> None:
    """The whole report of a plan or an estimate."""
    _headline(plan, out)
    out.print(_layout_table(plan))
    for name, stages in _by_type(plan):
        out.print(Text(f"layers (recompute) of each rank{name}: {stages_text(stages)}"))
    out.print(_time_table(plan))
    out.print(_memory_table(plan))
    out.print(Text(_memory_text(plan)))
    if plan.alternatives:
        out.print(_alternatives_table(plan))
        out.print(Text(_near_text(plan)))
    money.print_economy(plan, out)
    if plan.certificate is not None:
        out.print(_proof(plan))


def _headline(plan: Plan, out: Console) -> None:
    job, cluster = plan.job, plan.cluster
    devices = " + ".join(f"{t.gpus} x {t.device}" for t in cluster.types) or f"{cluster.gpus} x {cluster.device}"
    nodes = f"{cluster.nodes} node{'s' if cluster.nodes > 1 else ''}, {devices}"
    out.print(f"[bold]{plan.model.name}[/] ({_parameters(plan)}) on {nodes}")
    out.print(f"sequence {job.seq_len:,}, global batch {job.global_batch:,}, {job.precision}, engine {plan.engine}")
    e, m = plan.estimate, plan.estimate.memory
    verdict = "[bold green]fits[/]" if m.fits else "[bold red]does not fit[/]"
    speed = f"{seconds(e.step_time_s)} a step, {significant(e.tokens_per_s_per_gpu)} tokens/s/device, {_mfu(e)}"
    out.print(f"{verdict}: {gib(m.peak_gib * GIB)} of {gib(m.limit_gib * GIB)}, {speed}")
    if plan.choice is not None and plan.choice.rule != "fastest":
        out.print(Text(plan.choice.reason))
    if note := _simulated_text(e):
        out.print(Text(note))
    out.print()


_SIMULATED_APART = 0.02
"""Share by which the schedule's simulation has to differ from the predicted step to be worth a line."""


def _simulated_text(e: Estimate) -> str:
    """What the schedule takes action by action, where unequal chunks make that another time than the one predicted."""
    simulated = e.simulated_step_time_s
    if simulated is None or abs(simulated / e.step_time_s - 1) < _SIMULATED_APART:
        return ""
    apart = simulated / e.step_time_s - 1
    return f"its chunks take unequal times: simulated action by action the step takes {seconds(simulated)} ({apart:+.1%})"


def _parameters(plan: Plan) -> str:
    """How many there are, and how many of them are trained where that is not all."""
    total, adapter = f"{count(plan.model.total_params)} parameters", plan.job.adapter
    return f"{total}, {count(trained_params(plan.model, plan.job))} trained, {adapter.text}" if adapter else total


def _mfu(e: Estimate) -> str:
    """MFU with its convention, and what others call so."""
    others = [f"{name} {value:.1%}" for name, value in (("causal", e.mfu_causal), ("HFU", e.hfu)) if value is not None]
    return f"MFU {e.mfu:.1%} (full attention" + (f"; {', '.join(others)})" if others else ")")


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))


def _layout_table(plan: Plan) -> Table:
    layout = plan.layout
    table = _table("Layout")
    names = ["tp", "cp", "pp", "dp", "ep", "etp"]
    shown = [n for n in names if n not in ("ep", "etp") or getattr(layout, n) > 1]
    rows = [(n, str(getattr(layout, n))) for n in shown]
    rows += [
        ("zero", str(layout.zero)),
        ("micro_batch", str(layout.micro_batch)),
        ("micro-batches", str(plan.estimate.microbatches)),
        ("schedule", layout.schedule + (f" v{layout.virtual_stages}" if layout.virtual_stages > 1 else "")),
        ("sp", "on" if layout.sequence_parallel else "off"),
    ]
    rows += [("offload", layout.offload)] if layout.offload != "none" else []
    rows += [("shard", str(layout.shard))] if layout.shard else []
    rows += [("first stages", _by_type(plan)[0][0].removeprefix(" on "))] if plan.cluster.types else []
    rows += [("context", layout.context)] if layout.context != CONTEXTS[0] else []
    rows += [("rank order", layout.order)] if layout.order != RANK_ORDERS[0] else []
    for name, _ in rows:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row(*(value for _, value in rows))
    return table


def _by_type(plan: Plan) -> list[tuple[str, list[Stage]]]:
    """Stages by the device type that holds them: ("", all of them) with one type."""
    typed = [m.hardware for m in plan.estimate.memory.stages]
    pairs = zip(typed, plan.layout.stages, strict=True)
    groups = [(name, [stage for _, stage in same]) for name, same in groupby(pairs, key=lambda pair: pair[0])]
    return [(f" on {name}" if name else "", stages) for name, stages in groups]


def _time_table(plan: Plan) -> Table:
    e = plan.estimate
    table = _table("\nOne step (slowest pipeline rank)")
    table.add_column("part")
    table.add_column("time", justify="right")
    table.add_column("share", justify="right")
    table.add_column("")
    for name, label in _BREAKDOWN:
        value = getattr(e.breakdown, name)
        share = value / e.step_time_s
        if share >= 0.0005:
            table.add_row(label, seconds(value), f"{share:.1%}", Text("█" * max(1, round(40 * share)), style="cyan"))
    spread = step_time(e.step_time_s, e.interval).removeprefix(f"{seconds(e.step_time_s)} ")
    note = Text(f"{spread}; least certain figure: {e.provenance}", style="dim")
    table.add_row("step", seconds(e.step_time_s), "", note)
    return table


def _memory_table(plan: Plan) -> Table:
    m = plan.estimate.memory
    # Small jobs are printed in MiB: a table of 0.0 GiB says nothing.
    unit, scale = ("GiB", 1.0) if m.peak_gib >= 1 else ("MiB", 1024.0)
    limit = f"limit {m.limit_gib * scale:.1f} = {limit_text(m, plan.policy)}"
    typed = bool(plan.cluster.types)
    if typed:
        limits = dict.fromkeys((s.hardware, s.limit_gib) for s in m.stages)
        limit = ", ".join(f"limit {(size or 0.0) * scale:.1f} on {name}" for name, size in limits)
    table = _table(f"\nMemory at each rank's peak, {unit} ({limit})")
    table.add_column("rank", justify="right")
    if typed:
        table.add_column("devices", no_wrap=True)
    for part in _PARTS:
        table.add_column(part, justify="right")
    for name in ("allocated", "total", "headroom"):
        table.add_column(name, justify="right")
    table.add_column("peak moment", overflow="fold")
    for ranks, stage in _folded(m.stages):
        style = "bold" if stage.stage == m.peak_stage else ""
        values = [*(getattr(stage, p) for p in _PARTS), stage.allocated, stage.total, stage.headroom]
        table.add_row(
            ranks, *([stage.hardware or ""] if typed else []), *(f"{v * scale:.1f}" for v in values), stage.cause, style=style
        )
    return table


def _memory_text(plan: Plan) -> str:
    """The peak with its interval, and how likely it is too much."""
    m = plan.estimate.memory
    value, low, high = (gib(v * GIB) for v in (m.peak_gib, m.interval.low_gib, m.interval.high_gib))
    peak = with_interval(value, low, high, m.interval.provenance)
    headroom = min(s.headroom for s in m.stages) * GIB
    text = f"peak {peak}, headroom {gib(headroom)}; OOM probability {probability(m.oom_probability)}"
    if m.host_gib:
        each = m.host_gib * GIB
        node = f"{gib(each * plan.cluster.node_size)} a node"
        text += (
            f"\noptimizer states in host memory: {gib(each)} a device at most, {node}, whose size no profile states: check it"
        )
    return text


def _folded(stages: list[StageMemory], most: int = 12) -> list[tuple[str, StageMemory]]:
    """Stages with their rank labels; in long pipelines only the ends and the peak."""
    if len(stages) <= most:
        return [(str(s.stage), s) for s in stages]
    peak = max(stages, key=lambda s: s.total).stage
    keep = sorted({0, 1, 2, peak, len(stages) - 2, len(stages) - 1})
    return [(str(i), stages[i]) for i in keep]


def _alternatives_table(plan: Plan) -> Table:
    table = _table("\nRunners-up, each the best of its (tp, cp, pp, ep)")
    for name in ("layout", "step", "slower", "peak GiB", "P(OOM)", "tokens/s/device"):
        table.add_column(name, justify="left" if name == "layout" else "right", overflow="fold")
    for other in plan.alternatives:
        table.add_row(
            short(other.layout),
            seconds(other.step_time_s),
            f"{other.slower:+.2%}",
            f"{other.peak_gib:.1f}",
            probability(other.oom_probability),
            significant(other.tokens_per_s_per_gpu),
        )
    return table


def _near_text(plan: Plan) -> str:
    """Which runners-up a measurement could find as fast: they lie inside the estimate's interval."""
    near = 0 if plan.choice is None else plan.choice.inside_interval
    if near == 0:
        return "no runner-up lies inside this estimate's interval"
    who = "the runner-up lies" if near == len(plan.alternatives) == 1 else f"the first {near} runners-up lie"
    who = "the first runner-up lies" if near == 1 < len(plan.alternatives) else who
    return f"{who} inside this estimate's interval: measure {'it' if near == 1 else 'them'} too"


def _proof(plan: Plan) -> Text:
    c = plan.certificate
    assert c is not None
    s = c.space
    head = "Proven optimal in the declared space" if c.status == "optimal" else f"Search {c.status}, gap {c.gap or 0:.2%}"
    text = Text(f"\n{head} ", style="bold")
    body = (
        f"of {s.enumerated:,} layouts: {s.by_rule:,} broke a rule, {s.by_memory:,} do not fit, "
        f"{s.by_bound:,} are slower by their bound, {s.exact:,} solved exactly"
        + (f", {s.open:,} open" if s.open else "")
        + f"; {f'{seconds(c.seconds)}, ' if c.seconds is not None else ''}{c.solver}."
    )
    text.append(body, style="not bold")
    if low := c.lowest_memory:
        text.append(
            f" That is under a limit of {low.limit_gib:.2f} GiB, the lowest that anything fits under: "
            f"nothing fits under {low.impossible_gib:.2f} GiB.",
            style="not bold",
        )
    return text


def print_comparison(rows: list[tuple[str, str, str, str]], out: Console) -> None:
    """The table "predicted against measured": (what, predicted, measured, error)."""
    table = _table("Predicted against measured")
    for name in ("", "predicted", "measured", "error"):
        table.add_column(name, justify="left" if not name else "right")
    for row in rows:
        table.add_row(*row)
    out.print(table)
