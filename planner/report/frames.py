"""Plans as data frames: one row a layout, the plan first, for CSV and Markdown."""

from __future__ import annotations

import pandas as pd

from planner.planfile import Plan
from planner.report.stagetext import stages_text
from planner.specs.layout import Layout


def plan_frame(plan: Plan) -> pd.DataFrame:
    """The plan and its alternatives, one row each; sizes in GiB, times in seconds."""
    e = plan.estimate
    first = _row(1, plan.layout, e.step_time_s, 0.0, e.memory.peak_gib, e.tokens_per_s_per_gpu)
    rows = [first | {"peak_allocated_gib": e.memory.peak_allocated_gib, "mfu": e.mfu}]
    for i, a in enumerate(plan.alternatives, start=2):
        rows.append(_row(i, a.layout, a.step_time_s, a.slower, a.peak_gib, a.tokens_per_s_per_gpu))
    return pd.DataFrame(rows)


def _row(rank: int, layout: Layout, step: float, slower: float, peak: float, rate: float) -> dict[str, object]:
    outer = layout.model_dump(exclude={"stages"})
    return {
        "rank": rank,
        **outer,
        "stages": stages_text(layout.stages),
        "step_time_s": step,
        "slower": slower,
        "peak_gib": peak,
        "tokens_per_s_per_gpu": rate,
    }


def markdown(frame: pd.DataFrame) -> str:
    """A frame as a Markdown table."""
    cells = [[_cell(v) for v in row] for row in frame.itertuples(index=False)]
    lines = ["| " + " | ".join(map(str, frame.columns)) + " |", "|" + " --- |" * len(frame.columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)]) + "\n"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.6g}"
    return str(value).replace("|", "\\|")
