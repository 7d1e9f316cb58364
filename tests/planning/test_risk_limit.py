"""A limit on the risk to run out of memory is a lower capacity: estimates, search and proof obey it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from machines import llama, profile, task
from search.brute import all_rows
from search.instances import instance

from planner.cost import risk
from planner.cost.primitives import price
from planner.cost.task import LayoutArray
from planner.planning.estimate import estimate_layout
from planner.search.solve import search
from planner.specs.layoutflags import complete_layout

TASK = task(llama(8, 2048, 16, 16, 5632), 8, 2048, 64, hardware=profile(memory="14 GiB"))
LAYOUT = complete_layout({"zero": 1, "recompute": "selective"}, TASK.model, 8)


@pytest.mark.parametrize("probability", [1e-9, 0.01, 0.5, 0.99])
def test_the_allocated_limit_is_the_curves_inverse(probability):
    limited = replace(TASK, max_oom_probability=probability)
    allowed = risk.allocated_limit(limited)
    assert allowed is not None
    if allowed:
        at, above = risk.out_of_memory_probability(limited, np.array([allowed, allowed * 1.001]))
        assert at <= probability < above
    else:
        assert risk.out_of_memory_probability(limited, np.array([0.0]))[0] > probability


def test_capacity_is_the_lower_of_both_limits():
    x = LayoutArray.of([LAYOUT], TASK.job)
    free = int(price(TASK, x).capacity[0])
    assert int(price(replace(TASK, max_oom_probability=0.999), x).capacity[0]) == free
    strict = replace(TASK, max_oom_probability=0.02)
    assert int(price(strict, x).capacity[0]) == risk.allocated_limit(strict) < free


def test_the_estimate_names_the_limit_that_binds():
    free = estimate_layout(TASK, LAYOUT).memory
    assert (free.limit_by, free.limit_gib) == ("max_memory_fraction", pytest.approx(0.92 * 14))
    loose = estimate_layout(replace(TASK, max_oom_probability=0.999), LAYOUT).memory
    assert loose == free
    for share, fits in ((1.01, True), (0.99, False)):
        m = estimate_layout(replace(TASK, max_oom_probability=free.oom_probability * share), LAYOUT).memory
        assert m.limit_by == "max_oom_probability"
        assert (m.fits, m.stages[0].headroom >= 0) == (fits, fits)
        assert m.limit_gib < free.limit_gib
        assert (m.peak_gib, m.oom_probability) == (free.peak_gib, free.oom_probability)


@pytest.mark.parametrize("seed", range(8))
def test_the_search_proves_the_optimum_under_both_limits(seed):
    free, engine, space = instance(seed)
    limited = replace(free, max_oom_probability=0.2)
    _, values = all_rows(limited, engine, space)
    outcome = search(limited, engine, space, k=2)
    finite = [v for v in values if v is not None]
    assert outcome.counts.by_memory == len(values) - len(finite)
    assert [c.step_ns for c in outcome.candidates[:1]] == sorted(finite)[:1]
    for candidate in outcome.candidates:
        memory = estimate_layout(limited, candidate.layout).memory
        assert memory.fits
        assert memory.oom_probability <= 0.2
