"""Tokens into steps, days, device-hours, money and energy: by hand; and what is refused."""

from __future__ import annotations

import math

import pytest
from machines import figure, gpt, llama, mixture, profile, profile_data, task

import planner
from planner.errors import InputError
from planner.planning.economy import Budget, budget, budget_of, compute_optimal, economy, in_time
from planner.planning.estimate import estimate_layout
from planner.specs.hardware import HardwareProfile
from planner.specs.job import Job
from planner.specs.layout import Layout, Stage
from planner.units import days, parse_count

JOB = Job(seq_len=2048, global_batch=32)


def an_estimate(step: float = 2.0, relative: float = 0.25):
    """An estimate with a step time of choice."""
    layout = Layout(tp=1, cp=1, pp=1, dp=8, zero=1, micro_batch=1, schedule="none", stages=[Stage(layers=8, recompute="none")])
    made = estimate_layout(task(), layout)
    low, high = step / (1 + relative), step * (1 + relative)
    around = made.interval.model_copy(update={"low_s": low, "high_s": high, "relative": relative})
    return made.model_copy(update={"step_time_s": step, "interval": around})


def a_profile(price: str | None = None, power: str | None = None) -> HardwareProfile:
    data = profile_data() | ({"price": figure(price)} if price else {})
    data["device"] |= {"power": figure(power)} if power else {}
    return HardwareProfile.model_validate(data)


@pytest.mark.parametrize(("text", "tokens"), [
    ("15T", 15 * 10**12), ("15t", 15 * 10**12),
    ("300 B", 3 * 10**11), ("1.4e12", 1400 * 10**9), ("1400000000000", 1400 * 10**9), ("0.5K", 500),
    ("2.5M", 2500000), ("1_000_000", 10**6),
    ("1e3k", 10**6), ("1400000000000.0", 1400 * 10**9), (".5M", 500000),
    ("1.234567890123T", 1234567890123),
])  # fmt: skip
def test_counts(text, tokens):
    assert parse_count(text) == tokens


@pytest.mark.parametrize(
    "text", ["", "T", "-5B", "15 TB", "1.5", "0.0001K", "15,000", "nan", "inf", "1e-3", "0x10", "1__0", "٣T"]
)
def test_what_is_no_count(text):
    with pytest.raises(ValueError, match="not a"):
        parse_count(text)


def test_by_hand():
    wanted = budget("1B", price=2.5, pue=1.2)
    made = economy(wanted, JOB, 8, a_profile(power="700 W"), an_estimate(2.0, 0.25))
    assert made.steps == math.ceil(1e9 / (2048 * 32)) == 15259
    assert made.days.value == pytest.approx(15259 * 2.0 / 86400)
    assert (made.days.low, made.days.high) == (made.days.value / 1.25, made.days.value * 1.25)
    assert made.device_hours.value == pytest.approx(15259 * 2.0 * 8 / 3600)
    assert made.cost_usd.value == pytest.approx(15259 * 2.0 * 8 / 3600 * 2.5)
    assert made.energy_mwh.value == pytest.approx(15259 * 2.0 * 8 / 3600 * 700 * 1.2 / 1e6)
    assert made.energy_mwh.high == pytest.approx(1.25 * made.energy_mwh.value)
    assert made.price_usd_per_device_hour.provenance == "given"
    assert made.power_watts.provenance == "assumed"
    assert budget_of(made) == wanted
    assert any("upper estimate" in note for note in made.notes)


def test_fewer_tokens_than_a_step_are_one_step():
    assert economy(Budget(5), JOB, 8, profile(), an_estimate()).steps == 1


def test_the_profile_has_the_price_when_none_is_given():
    made = economy(Budget(10**9), JOB, 8, a_profile(price="3 USD/h"), an_estimate())
    assert made.cost_usd.value == pytest.approx(3 * made.device_hours.value)
    assert made.price_usd_per_device_hour.source == "test"
    assert budget_of(made) == Budget(10**9)


def test_what_is_unknown_is_left_out_and_said():
    made = economy(Budget(10**9), JOB, 8, profile(), an_estimate())
    assert made.cost_usd is None
    assert made.energy_mwh is None
    assert "--price" in made.notes[0]
    assert "power" in made.notes[1]


def test_deadlines():
    made = economy(Budget(10**9, deadline_days=0.36), JOB, 8, profile(), an_estimate(2.0))
    assert made.days.value == pytest.approx(0.3532, rel=1e-3)
    assert in_time(made)
    assert in_time(None)
    assert not in_time(made.model_copy(update={"deadline_days": 0.35}))


@pytest.mark.parametrize(("arguments", "code"), [
    (("abc",), "PLN124"), (("0",), "PLN124"), (("1e20",), "PLN124"),
    (("1.5",), "PLN124"), ((-3,), "PLN124"), ((float("nan"),), "PLN124"),
    (("1T", 0.0), "PLN107"), (("1T", -1.0), "PLN107"), (("1T", math.inf), "PLN107"), (("1T", math.nan), "PLN107"),
    (("1T", 1.0, 0.9), "PLN107"), (("1T", 1.0, 1.2, 0.0), "PLN107"), (("1T", True), "PLN107"),
    ((None, 2.5), "PLN125"), ((None, None, 1.2), "PLN125"), ((None, None, None, 3.0), "PLN125"),
])  # fmt: skip
def test_refused(arguments, code):
    with pytest.raises(InputError, match=code):
        budget(*arguments)


def test_compute_optimal_counts_what_a_token_uses():
    dense = compute_optimal(llama(), JOB, an_estimate(2.0))
    assert dense.tokens == 20 * llama().total_params
    assert dense.counted == "parameters"
    assert dense.days.value == pytest.approx(math.ceil(dense.tokens / 65536) * 2.0 / 86400)
    model = mixture()
    routed = compute_optimal(model, JOB, an_estimate())
    assert routed.tokens == 20 * model.active_params < 20 * model.total_params
    assert routed.counted == "active parameters"
    assert compute_optimal(gpt(), JOB, an_estimate()).source.startswith("Hoffmann 2022")


def test_a_plan_has_one_or_the_other():
    job = {"gpus": 8, "seq_len": 2048, "global_batch": 32, "layout": {"tp": 1, "dp": 8, "micro_batch": 1}}
    machine = HardwareProfile.model_validate(profile_data())
    plain = planner.estimate(llama(), machine, **job)
    paid = planner.estimate(llama(), machine, **job, tokens=1.4e12, price=2)
    assert plain.economy is None
    assert plain.compute_optimal is not None
    assert paid.compute_optimal is None
    assert paid.economy.tokens == 1400 * 10**9
    assert paid.estimate == plain.estimate


@pytest.mark.parametrize(
    ("value", "text"), [(3160.2, "3,160 days"), (21.34, "21.3 days"), (1.5, "36 h 0 min"), (0.01, "864 s")]
)
def test_days(value, text):
    assert days(value) == text


@pytest.mark.parametrize(
    "name", ["h100-sxm", "h200-sxm", "a100-80gb-sxm", "b200-sxm", "b300-sxm", "gb200-nvl72", "mi300x", "l40s"]
)
def test_shipped_devices_have_a_power(name):
    assert 300 <= planner.load_hardware(name).device.power.base <= 1400
