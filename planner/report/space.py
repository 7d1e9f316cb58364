"""A declared space in the terminal: a row an axis, then the counts."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from planner.planning.spaceview import Axis, SpaceView


def print_space(view: SpaceView, out: Console) -> None:
    """The axes, what excludes rows, and how many are left."""
    out.print(f"[bold]{view.model}[/] on {view.gpus:,} devices of {view.hardware}, engine {view.engine}: declared space\n")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("axis", "values", "why"):
        table.add_column(name, overflow="fold")
    for axis in view.axes:
        table.add_row(axis.name, _values(axis), _why(axis))
    out.print(table)
    out.print(f"\n{view.enumerated:,} layouts without splits and recompute; excluded by rules: {view.enumerated - view.kept:,}")
    rules = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2), show_header=False)
    rules.add_column(justify="right")
    rules.add_column(overflow="fold")
    for name, lost in sorted(view.rules.items(), key=lambda item: (-item[1], item[0])):
        rules.add_row(f"{lost:,}", Text(name))
    out.print(rules)
    out.print(f"left: {view.kept:,}, which stand for {many(view.layouts)} layouts with their splits and recompute")


def _values(axis: Axis) -> str:
    if not axis.values:
        return "any"
    return _listed(axis.values)


def _listed(values: tuple[Any, ...]) -> str:
    return " ".join(str(v).lower() if isinstance(v, bool) else str(v) for v in values)


def _why(axis: Axis) -> Text:
    text = Text(axis.why)
    if axis.restricted:
        gone = f", which takes away {_listed(axis.without)}" if axis.without else ""
        text.append(f"; {axis.restricted}{gone}", style="bold")
    return text


def many(value: int) -> str:
    """A number that may be very large: "1,234", "5.6e38"."""
    if value < 10**9:
        return f"{value:,}"
    digits = str(value)
    return f"{digits[0]}.{digits[1]}e{len(digits) - 1}"
