"""Plans as data frames: one row a layout, the plan first, for CSV and Markdown."""

from __future__ import annotations

import pandas as pd

from planner.planfile import Alternative, Economy, Estimate, Plan, Span
from planner.report.stagetext import stages_text


def plan_frame(plan: Plan) -> pd.DataFrame:
    """The plan and its alternatives, one row each; sizes in GiB, times in seconds."""
    e = plan.estimate
    first = Alternative(
        layout=plan.layout,
        step_time_s=e.step_time_s,
        slower=0.0,
        peak_gib=e.memory.peak_gib,
        oom_probability=e.memory.oom_probability,
        tokens_per_s_per_gpu=e.tokens_per_s_per_gpu,
    )
    rows = [_row(i, a, e) for i, a in enumerate([first, *plan.alternatives], start=1)]
    rows[0] |= {"peak_allocated_gib": e.memory.peak_allocated_gib, "mfu": e.mfu, "mfu_causal": e.mfu_causal, "hfu": e.hfu}
    if plan.economy is not None:
        for row, share in zip(rows, [1.0, *(a.step_time_s / e.step_time_s for a in plan.alternatives)], strict=True):
            row |= _money(plan.economy, share)
    return pd.DataFrame(rows)


def _money(e: Economy, share: float) -> dict[str, object]:
    """What the token budget comes to for a layout whose step takes `share` of the plan's."""
    cells: dict[str, object] = {"steps": e.steps}
    for name in ("days", "device_hours", "cost_usd", "energy_mwh"):
        span: Span | None = getattr(e, name)
        cells |= {} if span is None else {name: span.value * share}
    return cells


def _row(rank: int, a: Alternative, plan: Estimate) -> dict[str, object]:
    """One layout; the intervals are those of one engine on one machine, so they have the plan's relative width."""
    time, memory = 1.0 + plan.interval.relative, 1.0 + plan.memory.interval.relative
    return {
        "rank": rank,
        **a.layout.model_dump(exclude={"stages"}),
        **({"type_order": a.layout.type_order} if plan.memory.stages[0].hardware else {}),
        "stages": stages_text(a.layout.stages),
        "step_time_s": a.step_time_s,
        "step_time_low_s": a.step_time_s / time,
        "step_time_high_s": a.step_time_s * time,
        "step_time_interval": plan.interval.provenance,
        "slower": a.slower,
        "peak_gib": a.peak_gib,
        "peak_low_gib": a.peak_gib / memory,
        "peak_high_gib": a.peak_gib * memory,
        "peak_interval": plan.memory.interval.provenance,
        "oom_probability": a.oom_probability,
        "tokens_per_s_per_gpu": a.tokens_per_s_per_gpu,
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
