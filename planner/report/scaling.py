"""A table of cluster sizes in the terminal: one row a size, the chosen one marked, reasons below."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from planner.planfile import Economy, Plan
from planner.planning.scale import Row, Scaling
from planner.report.money import amount
from planner.report.uncertainty import certainty, probability, step_time
from planner.specs.layout import Layout
from planner.units import count, days, significant


def print_scaling(made: Scaling, out: Console) -> None:
    """Headline, table, what to know about rows, and the choice."""
    plans = list(made.plans.values())
    if plans:
        _headline(plans[0], out)
    out.print(_table(made))
    for row in made.rows:
        if row.reason:
            word = f"{row.status}: " if row.status in ("refused", "skipped") else ""
            out.print(Text(f"{row.gpus:,} devices: {word}{row.reason}", style="dim" if row.status == "planned" else ""))
    if plans and plans[0].economy is not None:
        for note in plans[0].economy.notes:
            out.print(Text(note, style="dim"))
    if plans:
        out.print(Text(f"step intervals are {certainty(plans[0].estimate.interval.provenance)}", style="dim"))
    if made.chosen is not None:
        out.print(Text(f"\nchosen for {made.objective}: ", style="bold").append(made.reason, style="not bold"))


_WORDS = {"infeasible": "does not fit", "refused": "refused", "skipped": "skipped", "open": "open"}


def _headline(plan: Plan, out: Console) -> None:
    job = plan.job
    out.print(f"[bold]{plan.model.name}[/] ({count(plan.model.total_params)} parameters) on {plan.cluster.device}")
    line = f"sequence {job.seq_len:,}, global batch {job.global_batch:,}, {job.precision}, engine {plan.engine}"
    out.print(line + ("" if plan.economy is None else f", {count(plan.economy.tokens)} tokens"))
    out.print()


def _table(made: Scaling) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    first = next(iter(made.plans.values()), None)
    money = None if first is None else first.economy
    names = ["", "devices", "layout", "step", "tokens/s\n/device", "MFU", "peak\nGiB"]
    names += ["P(OOM)"] if money is None else []
    names += ["effi-\nciency", *([] if money is None else _money_names(money))]
    for name in names:
        table.add_column(name, justify="left" if name in ("", "layout", "step") else "right", no_wrap=name != "layout")
    for i, row in enumerate(made.rows):
        chosen = i == made.chosen
        table.add_row("*" if chosen else "", f"{row.gpus:,}", *_cells(row, first), style="bold" if chosen else "")
    return table


def _cells(row: Row, first: Plan | None) -> list[str]:
    """Layout and figures, or the status alone."""
    if row.plan is None or first is None:
        return [_WORDS[row.status]]
    e = row.plan.estimate
    efficiency = e.tokens_per_s_per_gpu / first.estimate.tokens_per_s_per_gpu
    step = step_time(e.step_time_s, e.interval).replace(f", {certainty(e.interval.provenance)}", "")
    cells = [compact(row.plan.layout), step, significant(e.tokens_per_s_per_gpu), f"{e.mfu:.1%}", f"{e.memory.peak_gib:.1f}"]
    cells += [probability(e.memory.oom_probability)] if first.economy is None else []
    return [*cells, f"{efficiency:.1%}", *([] if row.plan.economy is None else _money(row.plan.economy))]


def compact(layout: Layout) -> str:
    """A layout in few characters: "tp4 pp4 dp8 zero1 mb1 1f1b full+selective"."""
    degrees = [f"{name}{getattr(layout, name)}" for name in ("tp", "cp", "pp", "dp", "ep", "etp") if getattr(layout, name) > 1]
    schedule: str = layout.schedule if layout.pp > 1 and layout.schedule != "1f1b" else ""
    schedule += f" v{layout.virtual_stages}" if layout.virtual_stages > 1 else ""
    modes = {
        mode: sum(n)
        for mode, n in zip(("selective", "full"), zip(*(s.counts for s in layout.stages), strict=True), strict=True)
    }
    again = "+".join(mode for mode, n in modes.items() if n)
    return " ".join(filter(None, (*degrees, f"zero{layout.zero}", f"mb{layout.micro_batch}", schedule, again)))


def _money_names(e: Economy) -> list[str]:
    names = ["time", "device-\nhours"]
    return names + ["USD"] * (e.cost_usd is not None) + ["MWh"] * (e.energy_mwh is not None)


def _money(e: Economy) -> list[str]:
    cells = [days(e.days.value), amount(e.device_hours.value)]
    cells += [] if e.cost_usd is None else [amount(e.cost_usd.value)]
    return cells + ([] if e.energy_mwh is None else [amount(e.energy_mwh.value)])
