"""A table of cluster sizes in the terminal: one row a size, the chosen one marked, reasons below."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from planner.planfile import Economy, Plan
from planner.planning.scale import Scaling
from planner.report.money import amount, around
from planner.report.uncertainty import certainty, probability, step_time
from planner.specs.layout import Layout
from planner.units import count, days, significant


def print_scaling(made: Scaling, out: Console) -> None:
    """Headline, table, what to know about rows, and the choice."""
    plans = list(made.plans.values())
    if plans:
        _headline(plans[0], out)
    out.print(_table(made, out.width))
    if plans and plans[0].economy is not None:
        out.print()
        out.print(_money_table(made, plans[0].economy, out.width))
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


def _grid(width: int, *names: str) -> Table:
    """An empty table; text columns fold where the terminal is narrow, numbers stay whole."""
    table = Table(box=None, pad_edge=False, padding=(0, 2 if width >= 100 else 1, 0, 0))
    for name in names:
        text, least = name in ("", "layout", "step", "time"), {"layout": 14, "step": 8, "time": 10}.get(name)
        folds = least is not None
        table.add_column(
            name, justify="left" if text else "right", no_wrap=not folds, min_width=least or _width(name), overflow="fold"
        )
    return table


def _width(name: str) -> int:
    """Room that a column of numbers keeps."""
    return max(len(line) for line in name.split("\n")) if name else 1


def _table(made: Scaling, width: int) -> Table:
    """Layouts and what they reach."""
    table = _grid(
        width, "", "devices", "layout", "step", "tokens/s\n/device", "  MFU", "peak\n GiB", "P(OOM)", " effi-\nciency"
    )
    first = next(iter(made.plans.values()), None)
    for i, row in enumerate(made.rows):
        cells = [_WORDS[row.status]] if row.plan is None or first is None else _cells(row.plan, first)
        table.add_row(*_head(made, i), *cells, style="bold" if i == made.chosen else "")
    return table


def _head(made: Scaling, i: int) -> tuple[str, str]:
    """The first cells of a row: the mark of the chosen one, the devices."""
    return "*" if i == made.chosen else "", f"{made.rows[i].gpus:,}"


def _cells(plan: Plan, first: Plan) -> list[str]:
    """Layout and figures."""
    e = plan.estimate
    step = step_time(e.step_time_s, e.interval).replace(f", {certainty(e.interval.provenance)}", "")
    return [
        compact(plan.layout),
        step,
        significant(e.tokens_per_s_per_gpu),
        f"{e.mfu:.1%}",
        f"{e.memory.peak_gib:.1f}",
        probability(e.memory.oom_probability),
        f"{e.tokens_per_s_per_gpu / first.estimate.tokens_per_s_per_gpu:.1%}",
    ]


def _money_table(made: Scaling, first: Economy, width: int) -> Table:
    """What the token budget comes to on each size that was planned."""
    cost, energy = first.cost_usd is not None, first.energy_mwh is not None
    table = _grid(width, "", "devices", "time", "device-hours", *["    USD"] * cost, *["    MWh"] * energy)
    for i, row in enumerate(made.rows):
        e = None if row.plan is None else row.plan.economy
        if e is None:
            continue
        cells = [f"{days(e.days.value)} {around(e.days, days)}", amount(e.device_hours.value)]
        cells += [amount(span.value) for span in (e.cost_usd, e.energy_mwh) if span is not None]
        table.add_row(*_head(made, i), *cells, style="bold" if i == made.chosen else "")
    return table


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
