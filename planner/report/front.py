"""A Pareto front in the terminal: the table, and a small plot of dots."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from planner.planning.make import short
from planner.planning.pareto import Against, Front
from planner.report.uncertainty import step_time
from planner.units import seconds, significant

AXES: dict[Against, tuple[str, str]] = {
    "memory": ("peak_gib", "peak memory of a device, GiB"),
    "gpus": ("gpus", "devices"),
    "cost": ("device_hours_per_b_tokens", "device-hours a billion tokens"),
}
"""What step time is weighed against: the frame's column, and its name with the unit."""


def cost_axis(front: Front) -> tuple[str, str]:
    """Column and name of the horizontal axis; cost is in USD where a price is known."""
    if front.against == "cost" and front.frame["usd_per_b_tokens"].notna().all():
        return "usd_per_b_tokens", "USD a billion tokens"
    return AXES[front.against]


def print_front(front: Front, out: Console) -> None:
    """Headline, table, plot, and what to know."""
    plan = front.points[0].plan
    out.print(f"[bold]{plan.model.name}[/]: step time against {front.against} on {plan.cluster.device}")
    job = plan.job
    out.print(f"sequence {job.seq_len:,}, global batch {job.global_batch:,}, {job.precision}, engine {plan.engine}\n")
    out.print(_table(front))
    column, name = cost_axis(front)
    x, y = front.frame[column].tolist(), front.frame["step_time_s"].tolist()
    if len(x) > 1:
        lines = dots(x, y, front.frame["on_front"].tolist(), width=min(64, max(20, out.width - 16)))
        out.print(Text("\n" + "\n".join(lines) + f"\n{'':>12}{name}"))
    for note in front.notes:
        out.print(Text(note, style="dim"))


def _table(front: Front) -> Table:
    names = ["", "devices", "step", "slower", "peak GiB", "P(OOM)", "device-hours", "USD", "layout"]
    priced = bool(front.frame["usd_per_b_tokens"].notna().any())
    shown = [n for n in names if (n != "USD" or priced) and (n != "P(OOM)" or front.against == "memory")]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), caption_justify="left", caption_style="dim")
    table.caption = (
        "device-hours" + (" and USD" if priced else "") + " of a billion tokens; * no other point is as good in both"
    )
    for name in shown:
        table.add_column(name, justify="left" if name in ("", "layout") else "right", overflow="fold")
    for point, row in zip(front.points, front.frame.to_dict(orient="records"), strict=True):
        e = point.plan.estimate
        cells = {
            "": ("*" if point.on_front else "") + ("" if row["proof"] == "optimal" else "?"),
            "devices": f"{row['gpus']:,}",
            "step": step_time(e.step_time_s, e.interval),
            "slower": f"{row['slower']:+.1%}",
            "peak GiB": f"{row['peak_gib']:.1f}",
            "P(OOM)": f"{row['oom_probability']:.0%}",
            "device-hours": significant(row["device_hours_per_b_tokens"]),
            "USD": "" if row["usd_per_b_tokens"] is None else significant(row["usd_per_b_tokens"]),
            "layout": short(point.plan.layout),
        }
        table.add_row(*(cells[name] for name in shown))
    return table


def dots(x: Sequence[float], y: Sequence[float], front: Sequence[bool], width: int = 60, height: int = 12) -> list[str]:
    """A plot of characters: `*` on the front, `.` off it; ends of both axes are labelled."""
    grid = [[" "] * width for _ in range(height)]

    def place(value: float, values: Sequence[float], size: int) -> int:
        low, high = min(values), max(values)
        return 0 if high <= low else round((value - low) / (high - low) * (size - 1))

    for a, b, kept in sorted(zip(x, y, front, strict=True), key=lambda point: point[2]):
        grid[height - 1 - place(b, y, height)][place(a, x, width)] = "*" if kept else "."
    labels = {0: seconds(max(y)), height - 1: seconds(min(y))}
    lines = [f"{labels.get(i, ''):>10} |{''.join(row)}".rstrip() for i, row in enumerate(grid)]
    left, right = significant(min(x)), significant(max(x))
    return [*lines, f"{'':>10} +{'-' * width}", f"{'':>12}{left}{right:>{max(width - len(left), len(right) + 1)}}"]
