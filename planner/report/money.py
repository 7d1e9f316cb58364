"""What training takes, in the terminal: days, device-hours, money and energy of a plan; or the compute-optimal tokens."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from planner.planfile import ComputeOptimal, Economy, Plan, Rate, Span
from planner.units import count, days, significant


def print_economy(plan: Plan, out: Console) -> None:
    """The table of a token budget, or one dim line about compute-optimal training without one."""
    if plan.economy is not None:
        out.print(_table(plan.economy))
        for note in plan.economy.notes:
            out.print(Text(note, style="dim"))
    elif plan.compute_optimal is not None:
        out.print(Text("\n" + hint(plan.compute_optimal), style="dim"))


def _table(e: Economy) -> Table:
    table = Table(
        title=f"\nTraining {tokens(e.tokens)}", title_justify="left", title_style="bold", show_header=False,
        box=None, pad_edge=False, padding=(0, 2, 0, 0),
    )  # fmt: skip
    for name in ("", "value", "interval", ""):
        table.add_column(name, justify="right" if name == "value" else "left")
    deadline = "" if e.deadline_days is None else f"deadline {days(e.deadline_days)}"
    table.add_row("optimizer steps", f"{e.steps:,}", "", "")
    table.add_row("time", days(e.days.value), around(e.days, days), deadline)
    table.add_row("device-hours", amount(e.device_hours.value), around(e.device_hours, amount), "")
    if e.cost_usd is not None:
        table.add_row("cost", usd(e.cost_usd.value), around(e.cost_usd, usd), _rate(e.price_usd_per_device_hour, "USD/h"))
    if e.energy_mwh is not None:
        power = f"{_rate(e.power_watts, 'W')}, PUE {e.pue:g}"
        table.add_row("energy", mwh(e.energy_mwh.value), around(e.energy_mwh, mwh), power)
    return table


def hint(c: ComputeOptimal) -> str:
    """How long compute-optimal training takes: "about 20 tokens a parameter (...) would be 1.41 T tokens: 21 days here"."""
    each = "an active parameter" if c.counted == "active parameters" else "a parameter"
    source = c.source.replace(", arXiv 2203.15556", "")
    return f"about {c.tokens_per_param:g} tokens {each} ({source}) would be {tokens(c.tokens)}: {days(c.days.value)} here"


def tokens(value: int) -> str:
    """A number of tokens: "15 T tokens", "300 B tokens"."""
    return f"{count(value)} tokens"


def amount(value: float) -> str:
    """A plain quantity: "4.85 M", "12,300"; three digits below 1000."""
    return significant(value) if abs(value) < 1000 else count(value)


def usd(value: float) -> str:
    """Money: "12.1 M USD", "98,765 USD"."""
    return f"{amount(value)} USD"


def mwh(value: float) -> str:
    """Energy: "3,400 MWh"."""
    return f"{significant(value)} MWh"


def around(span: Span, text: Callable[[float], str]) -> str:
    """The interval in brackets; the unit stands once where it is that of the value."""
    value, low, high = text(span.value), text(span.low), text(span.high)
    unit = value.rpartition(" ")[2]
    if " " in value and all(end.endswith(f" {unit}") and end.count(" ") == 1 for end in (low, high)):
        low, high = low.removesuffix(f" {unit}"), high.removesuffix(f" {unit}")
    return f"({low} to {high})"


def _rate(rate: Rate | None, unit: str) -> str:
    """A price or power of one device, with where it comes from."""
    return "" if rate is None else f"{rate.value:g} {unit} a device ({rate.provenance})"
