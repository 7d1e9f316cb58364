"""The committed summary of errors on the project's own table: `python -m tests.validation.accuracy` rewrites it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from planner.validation.metrics import summarize
from planner.validation.predict import predict_file

FOLDER = Path(__file__).parent
TABLE = FOLDER / "published.csv"
SUMMARY = FOLDER / "accuracy.json"
GATED = ("time_mape", "memory_mape")
"""Errors of a group that may not grow by more than `TOLERANCE`."""
TOLERANCE = 0.10
SLACK = 0.002
"""Growth below this many points of error is rounding, not a change."""


def current() -> dict[str, Any]:
    """The summary as the predictor gives it now, rounded to a hundredth of a percent."""
    summary = summarize(predict_file(str(TABLE), None, frozenset("ABC"))).to_dict()
    keys = ("rows", "time_mape", "time_bias", "memory_rows", "memory_mape", "memory_worst_under", "oom_accuracy")
    groups = {
        name: {k: round(v, 4) if isinstance(v, float) else v for k, v in group.items() if k in keys}
        for name, group in sorted(summary["groups"].items())
    }
    overall = {k: round(v, 4) for k, v in summary["overall"].items() if k in ("macro_time_mape", "macro_memory_mape") and v}
    return {"overall": overall, "groups": groups}


if __name__ == "__main__":
    SUMMARY.write_text(json.dumps(current(), indent=1) + "\n", encoding="utf-8")
    print(SUMMARY.read_text(encoding="utf-8"))
