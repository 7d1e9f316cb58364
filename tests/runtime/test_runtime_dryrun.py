"""The dry run of the real job against the planner's formulas, and against itself where it takes a short cut."""

from __future__ import annotations

from collections import Counter
from typing import Any

import plans
import pytest
from dryrunning import CASES, QUICK, predicted_calls, predicted_gib, stepped_calls

from planner.runtime.dryrun import RankReport, dry_run, ranks_of

_MARKED = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


def test_the_grid_is_wide() -> None:
    layouts = [plan.layout for plan in CASES.values()]
    assert len(CASES) >= 60
    assert {x.zero for x in layouts} == {0, 1, 2, 3}
    assert {x.schedule for x in layouts if x.pp > 1} == {"gpipe", "1f1b", "interleaved"}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", _MARKED)
def test_bytes_and_collectives(name: str) -> None:
    plan = CASES[name]
    for report in dry_run(plan, ranks_of(plan, "all"), workers=2):
        error = predicted_gib(plan, report.stage) / report.peak_allocated_gib - 1
        assert -0.01 < error < 0.03, report
        assert sum(report.categories_gib.values()) == pytest.approx(report.peak_allocated_gib)
        assert predicted_calls(plan, report.stage) == stepped_calls(report), report.stage


_LONG: dict[str, dict[str, Any]] = {
    "accumulation": {"dp": 2, "zero": 2, "global_batch": 12},
    "1f1b": {"pp": 2, "schedule": "1f1b", "global_batch": 12},
    "gpipe": {"pp": 2, "schedule": "gpipe", "global_batch": 12},
    "interleaved": {"pp": 2, "schedule": "interleaved", "virtual_stages": 2, "global_batch": 16},
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", _LONG)
def test_a_shortened_step_is_the_whole_one(name: str) -> None:
    # 64 token ids are 512 bytes, the allocator's step: rounded sizes of fewer micro-batches do not tell those of more.
    plan = plans.plan(plans.llama(4), **{"micro_batch": 1, "seq_len": 64, **_LONG[name]})
    (short,), (whole,) = (dry_run(plan, [0], exact=exact, workers=2) for exact in (False, True))
    assert short.microbatches_run < whole.microbatches_run
    assert short.peak_allocated_gib == whole.peak_allocated_gib
    assert _calls(short) == _calls(whole)


def _calls(report: RankReport) -> Counter[tuple[str, str, int]]:
    found: Counter[tuple[str, str, int]] = Counter()
    for c in report.collectives:
        found[c.group, c.op, c.bytes_per_call] += c.count
    return found


@pytest.mark.parametrize("which", ["4", "-1", "first"])
def test_a_rank_that_is_none(which: str) -> None:
    plan = plans.plan(plans.llama(), dp=4, micro_batch=1, global_batch=4)
    with pytest.raises(ValueError, match=f"rank {which} is not one of 4|{which}"):
        ranks_of(plan, which)
