"""A verified plan in the terminal: one line a check."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from planner.units import seconds
from planner.verify.report import Report

_STYLES = {"pass": "green", "FAIL": "bold red", "skipped": "yellow"}


def print_report(report: Report, out: Console) -> None:
    """All checks as a table, further problems of those that failed below it, and the verdict."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("check", "verdict", "what was found"):
        table.add_column(name, no_wrap=name != "what was found", overflow="fold")
    table.add_column("time", justify="right", no_wrap=True)
    for c in report.checks:
        table.add_row(c.title, Text(c.verdict, style=_STYLES[c.verdict]), Text(c.text), seconds(c.seconds))
    out.print(table)
    for c in report.checks:
        for problem in c.problems[1:]:
            out.print(Text(f"{c.name}: {problem}"))
    total = seconds(sum(c.seconds for c in report.checks))
    out.print(Text(f"verified in {total}" if report.passed else f"not verified: {report.reason}"))
