"""What a dry run found, in the terminal: peak by use and rank, predicted beside it, and a step's collectives."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from planner.units import GIB, gib, significant


def print_dry_run(found: dict[str, Any], out: Console) -> None:
    """`found` as `planner run --dry-run --format json` prints it."""
    out.print(Text("dry run: the real job as one rank of a fake process group; bytes and calls, no times"))
    out.print(_memory_table(found))
    worst = max(found["ranks"], key=lambda r: float(r["peak_allocated_gib"]))
    out.print(Text(f"peak on rank {worst['rank']}: {worst['cause']}"))
    out.print(_collective_table([c for c in found["collectives"] if c["rank"] == worst["rank"]], worst["rank"]))
    if worst["microbatches_run"] < found["microbatches"]:
        note = (
            f"stepped through {worst['microbatches_run']} of {found['microbatches']} micro-batches; each further round of the"
        )
        out.print(Text(f"{note} pipeline adds the same bytes and calls (--exact-steps steps through all)"))


def _memory_table(found: dict[str, Any]) -> Table:
    table = Table(title="peak allocated", title_justify="left")
    for name in ("rank", "stage", "ranks like it", "predicted", "dry run", "error", "of which"):
        table.add_column(name, justify="left" if name == "of which" else "right")
    for r in found["ranks"]:
        parts = sorted(r["categories_gib"].items(), key=lambda item: -item[1])
        text = ", ".join(f"{name} {gib(n * GIB, 2)}" for name, n in parts if n >= 0.005 * r["peak_allocated_gib"])
        predicted = r["predicted_gib"]
        error = f"{predicted / r['peak_allocated_gib'] - 1:+.1%}"
        row = (str(r["rank"]), str(r["stage"]), str(r["stands_for"]), gib(predicted * GIB), gib(r["peak_allocated_gib"] * GIB))
        table.add_row(*row, error, text)
    return table


def _collective_table(calls: list[dict[str, Any]], rank: int) -> Table:
    table = Table(title=f"collectives of a step, rank {rank}", title_justify="left")
    for name in ("group", "operation", "ranks", "calls", "bytes a call", "bytes a step"):
        table.add_column(name, justify="left" if name in ("group", "operation") else "right")
    small = [c for c in calls if c["small"]]
    for c in calls:
        if not c["small"]:
            sizes = (_size(c["bytes_per_call"]), _size(c["bytes_per_call"] * c["count"]))
            table.add_row(c["group"], c["op"].replace("_", "-"), str(c["ranks"]), f"{c['count']:,}", *sizes)
    if small:
        total = sum(c["bytes_per_call"] * c["count"] for c in small)
        table.add_row("any", "norms and scalars", "", f"{sum(c['count'] for c in small):,}", "", _size(total))
    return table


def _size(n_bytes: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{significant(n_bytes / scale)} {unit}"
    return f"{n_bytes:.0f} B"
