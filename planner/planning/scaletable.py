"""A scaling table as a data frame and as JSON data: one row a count, kept where nothing fits, with the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from planner.planfile import Economy, Plan
from planner.planning.make import short

if TYPE_CHECKING:
    from planner.planning.scale import Row, Scaling

FORMAT, VERSION = "planner.scaling", "1.0"
SPANS = ("days", "device_hours", "cost_usd", "energy_mwh")
"""What a token budget comes to, each with its interval."""
MEASURES = (
    "step_time_s", "step_time_low_s", "step_time_high_s", "tokens_per_s", "tokens_per_s_per_gpu", "mfu", "mfu_causal", "hfu",
    "peak_gib", "limit_gib", "oom_probability", "scaling_efficiency",
)  # fmt: skip
COLUMNS = ("gpus", "nodes", "status", "chosen", "layout", *MEASURES, "reason")
"""Without a token budget. Times in seconds, sizes in GiB; `scaling_efficiency` is tokens a second and device over those of
the first planned row."""


def frame_of(scaling: Scaling) -> pd.DataFrame:
    """One row a count. Numbers of rows without a plan are missing (NaN)."""
    first = next(iter(scaling.plans.values()), None)
    money = first is not None and first.economy is not None
    names = [*COLUMNS[:-1], *(_money_columns() if money else ()), "reason"]
    data = [_cells(row, i == scaling.chosen, first) for i, row in enumerate(scaling.rows)]
    frame = pd.DataFrame(data, columns=names)
    types = {name: "Int64" if name == "steps" else "float64" for name in names if name in (*MEASURES, *_money_columns())}
    return frame.astype(types)


def _money_columns() -> tuple[str, ...]:
    return ("steps", *(f"{name}{end}" for name in SPANS for end in ("", "_low", "_high")))


def _cells(row: Row, chosen: bool, first: Plan | None) -> dict[str, Any]:
    """The known cells of one row."""
    cells: dict[str, Any] = {"gpus": row.gpus, "nodes": row.nodes, "status": row.status, "chosen": chosen, "layout": ""}
    cells["reason"] = row.reason
    if row.plan is None or first is None:
        return cells
    e = row.plan.estimate
    cells |= {
        name: getattr(e, name) for name in ("step_time_s", "tokens_per_s", "tokens_per_s_per_gpu", "mfu", "mfu_causal", "hfu")
    }
    cells |= {"layout": short(row.plan.layout), "step_time_low_s": e.interval.low_s, "step_time_high_s": e.interval.high_s}
    cells |= {"peak_gib": e.memory.peak_gib, "limit_gib": e.memory.limit_gib, "oom_probability": e.memory.oom_probability}
    cells["scaling_efficiency"] = e.tokens_per_s_per_gpu / first.estimate.tokens_per_s_per_gpu
    return cells if row.plan.economy is None else cells | money_cells(row.plan.economy)


def money_cells(e: Economy) -> dict[str, float]:
    """Steps, and the spans with their ends, as columns."""
    cells: dict[str, float] = {"steps": e.steps}
    for name in SPANS:
        if (span := getattr(e, name)) is not None:
            cells |= {name: span.value, f"{name}_low": span.low, f"{name}_high": span.high}
    return cells


def data_of(scaling: Scaling) -> dict[str, Any]:
    """The table as JSON data; missing numbers are null."""
    frame = scaling.frame.astype(object)
    rows = frame.where(frame.notna(), None).to_dict(orient="records")
    plan = scaling.plan
    return {
        "format": FORMAT,
        "version": VERSION,
        "objective": scaling.objective,
        "chosen": None if plan is None else plan.cluster.gpus,
        "reason": scaling.reason,
        "rows": [{str(k): v for k, v in row.items()} for row in rows],
    }
