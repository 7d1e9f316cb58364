"""A Pareto front as a picture, by matplotlib (the extra `report`): equal fronts give equal bytes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from planner.errors import MissingPartError, Problem, input_error
from planner.planning.pareto import Front
from planner.report.front import cost_axis

SUFFIXES = (".svg", ".png")


def checked_chart(path: Path | None) -> None:
    """Find out before the work whether a chart can be drawn. Raises InputError or MissingPartError."""
    if path is None:
        return
    if path.suffix not in SUFFIXES:
        raise input_error("PLN128", f"--chart {path}: {path.suffix or 'no suffix'} is not a picture", "", "--chart front.svg")
    if importlib.util.find_spec("matplotlib") is None:
        fix = "pip install 'planner[report]', or leave out --chart"
        raise MissingPartError(Problem("PLN556", "matplotlib is not installed", f"it draws {path.name}", fix))


def draw(front: Front, path: Path) -> None:
    """Write the chart: step time (s) over what it is weighed against. No dates, fixed ids: reproducible bytes."""
    import matplotlib

    settings: Any = {"svg.hashsalt": "planner", "svg.fonttype": "path", "font.family": "DejaVu Sans"}
    with matplotlib.rc_context(settings):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        _plot(front, figure.add_subplot())
        metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, format=path.suffix[1:], dpi=150, metadata=metadata)


def _plot(front: Front, axes: Any) -> None:
    column, name = cost_axis(front)
    frame = front.frame
    kept, rest = frame[frame["on_front"]], frame[~frame["on_front"]]
    kept = kept.sort_values(column, kind="stable")
    low = (kept["step_time_s"] - kept["step_time_low_s"]).tolist()
    high = (kept["step_time_high_s"] - kept["step_time_s"]).tolist()
    x, y = kept[column].tolist(), kept["step_time_s"].tolist()
    axes.errorbar(x, y, yerr=[low, high], fmt="none", ecolor="0.8", capsize=2, zorder=1)
    axes.step(x, y, where="post", color="C0", linewidth=1, zorder=2)
    axes.plot(x, y, "o", color="C0", zorder=3, label="front")
    if len(rest):
        axes.plot(rest[column].tolist(), rest["step_time_s"].tolist(), "o", color="0.6", zorder=2, label="beaten in both")
        axes.legend(frameon=False)
    plan = front.points[0].plan
    axes.set_xlabel(name)
    axes.set_ylabel("step time, s (bars: interval)")
    axes.set_title(f"{plan.model.name} on {plan.cluster.device}", fontsize=10)
    axes.grid(alpha=0.25)
