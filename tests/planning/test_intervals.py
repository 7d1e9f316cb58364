"""Every estimate has intervals: a calibration's residual where the profile has one, an assumed one elsewhere."""

from __future__ import annotations

import pytest
from machines import figure, llama, profile, profile_data, task

from planner.cost.intervals import DEFAULT_MEMORY_ERROR, DEFAULT_TIME_ERROR
from planner.cost.task import Task
from planner.planfile import Estimate
from planner.planning.estimate import estimate_layout
from planner.report import uncertainty
from planner.specs.hardware import HardwareProfile
from planner.specs.layoutflags import complete_layout


def estimated(t: Task, **named: object) -> Estimate:
    return estimate_layout(t, complete_layout({"zero": 1, **named}, t.model, t.gpus))


def calibrated(engine: str, provenance: str = "fitted") -> HardwareProfile:
    errors = {"time_error": figure(0.07), "memory_error": figure(0.02)}
    errors = {k: {**v, "provenance": provenance, "source": "12 runs"} for k, v in errors.items()}
    return HardwareProfile.model_validate({**profile_data(), "engines": {engine: errors}})


def test_without_a_calibration_intervals_are_assumed():
    e = estimated(task())
    assert (e.interval.relative, e.interval.provenance) == (DEFAULT_TIME_ERROR, "assumed")
    assert "test-machine has no calibration of engine bundled" in e.interval.source
    assert e.interval.low_s == pytest.approx(e.step_time_s / 1.3)
    assert e.interval.high_s == pytest.approx(e.step_time_s * 1.3)
    m = e.memory
    assert (m.interval.relative, m.interval.provenance) == (DEFAULT_MEMORY_ERROR, "assumed")
    assert (m.interval.low_gib, m.interval.high_gib) == pytest.approx((m.peak_gib / 1.1, m.peak_gib * 1.1))


@pytest.mark.parametrize("key", ["bundled", "any"])
def test_a_calibration_of_the_engine_gives_its_residual(key):
    e = estimated(task(hardware=calibrated(key)))
    assert (e.interval.relative, e.interval.provenance, e.interval.source) == (0.07, "fitted", "12 runs")
    assert e.interval.high_s == pytest.approx(e.step_time_s * 1.07)
    assert (e.memory.interval.relative, e.memory.interval.provenance) == (0.02, "fitted")


def test_another_engines_calibration_does_not_count_and_an_assumed_error_stays_assumed():
    assert estimated(task(hardware=calibrated("megatron"))).interval.relative == DEFAULT_TIME_ERROR
    e = estimated(task(hardware=calibrated("bundled", "assumed")))
    assert (e.interval.relative, e.interval.provenance) == (0.07, "assumed")


def test_intervals_do_not_move_the_estimate():
    ours, other = estimated(task()), estimated(task(hardware=calibrated("bundled")))
    assert ours.step_time_s == other.step_time_s
    assert ours.memory.peak_gib == other.memory.peak_gib


def test_the_probability_to_run_out_grows_with_the_worst_rank():
    t = task(llama(8, 2048, 16, 16, 5632), 8, 2048, 64, hardware=profile(memory="14 GiB"))
    found = [estimated(t, pp=2, tp=2, micro_batch=m).memory for m in (1, 2, 4, 8)]
    risks = [m.oom_probability for m in found]
    assert risks == sorted(set(risks))
    assert all(0 < r < 1 for r in risks)


@pytest.mark.parametrize(("value", "text"), [
    (0.0, "<0.1%"), (0.0009, "<0.1%"), (0.047, "4.7%"), (0.0999, "10%"), (0.31, "31%"), (0.99, "99%"), (0.996, "99.6%"),
    (0.9995, ">99.9%"), (1.0, ">99.9%"),
])  # fmt: skip
def test_probabilities_are_never_certain(value, text):
    assert uncertainty.probability(value) == text


def test_units_stand_once_where_they_are_equal():
    assert uncertainty.with_interval("2.31 s", "2.1 s", "2.54 s", "fitted") == "2.31 s (2.1 to 2.54, calibrated)"
    assert uncertainty.with_interval("1.1 s", "846 ms", "1.43 s", "assumed") == "1.1 s (846 ms to 1.43 s, assumed)"
    three = ("3 h 12 min", "2 h 10 min", "4 h 5 min")
    assert uncertainty.with_interval(*three, "assumed") == "3 h 12 min (2 h 10 min to 4 h 5 min, assumed)"
