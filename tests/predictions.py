"""Predictions to test with: a row that ran in 1 s and was predicted to, with what a test changes."""

from __future__ import annotations

from collections import Counter
from typing import Any

from planner.validation.prediction import Predicted, Prediction


def prediction(**changes: Any) -> Prediction:
    data: dict[str, Any] = {
        "line": 2, "row_id": "R1", "source": "s", "hardware": "H100-80", "engine": "megatron", "profile": "h100-sxm",
        "model": "llama3-8b", "quality": "A", "kind": "e2e", "gpus": 8, "seq_len": 4096, "global_batch": 64,
        "precision": "bf16", "layout": "tp1", "outcome": "ran", "measured_time": 1.0, "predicted_time": 1.0,
        "time_interval": (0.9, 1.1), "measured_memory": None, "predicted_memory": 40.0, "memory_kind": "allocated",
        "fits": True, "oom_probability": 0.1,
    }  # fmt: skip
    return Prediction(**data | changes)


def timed(*pairs: tuple[float, float], **changes: Any) -> list[Prediction]:
    """Rows of (predicted, measured) times, each of a layout of its own."""
    return [
        prediction(line=i + 2, row_id=f"R{i}", layout=f"tp{i}", predicted_time=p, measured_time=m, **changes)
        for i, (p, m) in enumerate(pairs)
    ]


def predicted(*rows: Prediction, **skipped: int) -> Predicted:
    return Predicted(rows, Counter({k.replace("_", " "): n for k, n in skipped.items()}))
