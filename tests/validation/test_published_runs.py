"""Targets on a large table of published runs, where it lies beside the checkout; skipped elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from planner.validation.metrics import summarize
from planner.validation.predict import predict_file

TABLE = Path(__file__).parents[2].parent / "shared" / "validation" / "published_runs.csv"
pytestmark = pytest.mark.skipif(
    not TABLE.exists(), reason="the large table of published runs is not here (../shared/validation)"
)

TIME = {
    "Korthikanti": 0.03, "vTrain ground truth (multi-node)": 0.05, "vTrain ground truth (single-node)": 0.08, "Narayanan": 0.07,
    "SimuMax": 0.03, "NVIDIA DGX Cloud": 0.07, "MosaicML llm-foundry": 0.07, "torchtitan benchmarks": 0.07,
    "torchtitan performance": 0.07, "BigScience BLOOM": 0.07, "MLPerf Training v3": 0.07, "NeMo 24.07": 0.07,
}  # fmt: skip
"""Mean absolute error of the step time by source, with the shipped profiles."""
MEMORY = {
    "SimuMax": 0.01,
    "BigScience BLOOM": 0.05,
    "torchtitan benchmarks": 0.05,
    "HF nanotron": 0.05,
    "NVIDIA DGX Cloud": 0.05,
}


@pytest.fixture(scope="module")
def groups() -> dict[str, Any]:
    """Errors by source."""
    result: dict[str, Any] = summarize(predict_file(str(TABLE), None, frozenset("AB"))).to_dict()["groups"]
    return result


@pytest.mark.parametrize("source", TIME)
def test_step_times(groups: dict[str, Any], source: str) -> None:
    found = [g for name, g in groups.items() if name.startswith(source) and g["time_rows"]]
    assert found
    rows = sum(g["time_rows"] for g in found)
    assert sum(g["time_rows"] * g["time_mape"] for g in found) / rows <= TIME[source]


@pytest.mark.parametrize("source", MEMORY)
def test_memory(groups: dict[str, Any], source: str) -> None:
    found = [g for name, g in groups.items() if name.startswith(source) and g["memory_rows"]]
    assert found
    assert max(g["memory_mape"] for g in found) <= MEMORY[source]


def test_out_of_memory_labels(groups: dict[str, Any]) -> None:
    assert next(g for name, g in groups.items() if name.startswith("Aleph"))["oom_accuracy"] >= 0.95
