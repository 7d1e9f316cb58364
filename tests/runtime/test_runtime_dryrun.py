"""The dry run of the real job against the planner's formulas, and against itself where it takes a short cut."""

from __future__ import annotations

import pytest
from dryrunning import CASES, QUICK, predicted_calls, predicted_gib, stepped_calls

from planner.runtime.dryrun import dry_run, ranks_of

_MARKED = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", _MARKED)
def test_bytes_and_collectives(name: str) -> None:
    plan = CASES[name]
    for report in dry_run(plan, ranks_of(plan, "all"), workers=2):
        assert predicted_gib(plan, report.stage) == pytest.approx(report.peak_allocated_gib, rel=0.03), report
        assert sum(report.categories_gib.values()) == pytest.approx(report.peak_allocated_gib)
        assert predicted_calls(plan, report.stage) == stepped_calls(report), report.stage
