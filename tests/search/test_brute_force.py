"""Brute force on instances that hypothesis draws and shrinks, for each schedule: the search gives the same integer.

A share of them in the default tier, the same ones in every run; 500 a schedule with `--slow`.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from search.strategies import SCHEDULES, instances
from search.test_exact import check_outcome

SETTINGS = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
"""The same instances in every run: nothing random, nothing remembered."""


def check(schedule: str, examples: int) -> None:
    """Draw `examples` instances; a failing one is shrunk and shown."""
    fitting = []

    @settings(SETTINGS, max_examples=examples)
    @given(instances(schedule))
    def run(instance) -> None:
        fitting.append(check_outcome(*instance))

    run()
    assert len(fitting) >= examples
    print(f"{schedule}: {sum(fitting)} of {len(fitting)} instances fit")
    assert 0.1 < sum(fitting) / len(fitting) < 0.9  # some fit, some do not


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_search_equals_brute_force(schedule):
    check(schedule, 25)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_search_equals_brute_force_on_500(schedule):
    check(schedule, 500)
