"""The gate: on the project's own table of published runs no group's error may grow by more than a tenth."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.validation.accuracy import GATED, SLACK, SUMMARY, TOLERANCE, current


@pytest.fixture(scope="module")
def now() -> dict[str, Any]:
    """The summary of this checkout."""
    return current()


def committed() -> dict[str, Any]:
    """The summary in the repository."""
    result: dict[str, Any] = json.loads(SUMMARY.read_text(encoding="utf-8"))
    return result


@pytest.mark.parametrize("group", sorted(committed()["groups"]))
def test_no_group_gets_worse(group: str, now: dict[str, Any]) -> None:
    """A better figure is welcome: rewrite the summary with `python -m tests.validation.accuracy`."""
    before, after = committed()["groups"][group], now["groups"].get(group)
    assert after is not None, f"{group} is no longer predicted"
    assert after["rows"] >= before["rows"], f"{group}: fewer rows are predicted"
    for figure in GATED:
        if before[figure] is not None:
            assert after[figure] is not None
            allowed = before[figure] * (1 + TOLERANCE) + SLACK
            assert after[figure] <= allowed, f"{group}: {figure} was {before[figure]:.2%}, is {after[figure]:.2%}"


def test_the_mean_over_groups_does_not_get_worse(now: dict[str, Any]) -> None:
    before, after = committed()["overall"]["macro_time_mape"], now["overall"]["macro_time_mape"]
    assert after <= before * (1 + TOLERANCE), f"mean over groups was {before:.2%}, is {after:.2%}"


def test_the_gate_can_fail(now: dict[str, Any]) -> None:
    """A cost model that is a third slower leaves at least half of the groups."""
    worse = 0
    for group, figures in committed()["groups"].items():
        bias = now["groups"][group]["time_bias"]
        if figures["time_mape"] is not None and abs(bias + 0.33) > figures["time_mape"] * (1 + TOLERANCE) + SLACK:
            worse += 1
    assert worse * 2 > len(committed()["groups"])
