"""Several cluster sizes: every count on its own, the objective's pick against all counts, and rows that are kept."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from machines import llama, mixture, profile, profile_data

import planner
from planner import stopping
from planner.errors import InfeasibleError, InputError
from planner.planning.counts import parse_counts, several
from planner.planning.request import Request, prepare
from planner.planning.scale import batch_note, least_step
from planner.planning.scale import scale as scan
from planner.specs.hardware import HardwareProfile
from planner.specs.job import Job

MODEL, MACHINE = llama(layers=6), profile(node_size=4)
PINS = {"tp": 1, "cp": 1, "zero": 1, "recompute": "none", "virtual_stages": 1}


def scale(**changes):
    """A small job whose larger clusters are not always faster: dp must divide a batch of 24, pp at most 6 layers."""
    named = {"seq_len": 2048, "global_batch": 24, "pin": PINS, "alternatives": 1}
    named |= {} if "nodes" in changes else {"gpus": [4, 8, 12, 16, 20, 24, 28]}
    return planner.scale(MODEL, MACHINE, **{**named, **changes})


@pytest.fixture(scope="module")
def table():
    return scale()


def alone(gpus: int) -> float:
    plan = planner.plan(MODEL, MACHINE, gpus=gpus, seq_len=2048, global_batch=24, pin=PINS, alternatives=1)
    return plan.estimate.step_time_s


@pytest.mark.parametrize(("text", "counts"), [
    ("8", (8,)), ("8,16,32", (8, 16, 32)), ("32, 8,8", (8, 32)), ("8:40:8", (8, 16, 24, 32, 40)), ("1:3", (1, 2, 3)),
    ("8:20:8", (8, 16)), ("1,2,4:8:2", (1, 2, 4, 6, 8)), (16, (16,)), ([4, 2], (2, 4)), (range(2, 9, 3), (2, 5, 8)),
])  # fmt: skip
def test_counts(text, counts):
    assert parse_counts(text, "--nodes") == counts


@pytest.mark.parametrize(("text", "code"), [
    ("", "PLN126"), ("8,", "PLN126"), ("8:4", "PLN126"), ("8:16:0", "PLN126"), ("8-16", "PLN126"), ("1:2:3:4", "PLN126"),
    ("-8", "PLN126"), ("8.0", "PLN126"), ("٨", "PLN126"), ("1:1000000", "PLN126"), ("0", "PLN131"), ("0:8:4", "PLN131"),
    ([], "PLN131"), ([2.0], "PLN126"), ([True], "PLN126"), (["8"], "PLN126"),
])  # fmt: skip
def test_refused_counts(text, code):
    with pytest.raises(InputError, match=code) as caught:
        parse_counts(text, "--nodes")
    assert "--nodes" in str(caught.value)


def test_what_asks_for_a_table():
    assert [several(t) for t in (None, "8", "8,16", "8:8")] == [False, False, True, True]


def test_every_count_is_planned_as_if_alone(table):
    assert list(table.plans) == [4, 8, 12, 16, 20, 24]
    for gpus, plan in table.plans.items():
        assert plan.estimate.step_time_s == alone(gpus)


def test_more_devices_may_be_slower_and_the_scan_is_not_fooled(table):
    times = {gpus: plan.estimate.step_time_s for gpus, plan in table.plans.items()}
    assert times[20] > times[12], "20 devices allow dp 4 and pp 5 only: larger, but slower"
    assert times[24] < times[20]
    fastest = scale(objective="time", gpus=[12, 16, 20])
    assert fastest.plan.cluster.gpus == min((12, 16, 20), key=times.get) != 20
    least = min(times, key=lambda n: times[n] * n)
    assert scale(objective="cost").plan.cluster.gpus == least


def test_the_fewest_in_time_are_not_found_by_bisection(table):
    """A deadline that 12 devices meet and 20 do not."""
    steps = math.ceil(1e9 / (2048 * 24))
    taken = {gpus: plan.estimate.step_time_s * steps / 86400 for gpus, plan in table.plans.items()}
    due = (taken[12] + min(taken[8], taken[20])) / 2
    found = scale(objective="min-gpus", tokens="1B", deadline_days=due, gpus=[8, 12, 20, 24])
    assert found.plan.cluster.gpus == 12
    assert [row.status for row in found.rows] == ["planned", "planned", "skipped", "skipped"]
    assert "12 devices are enough" in found.rows[2].reason
    assert "fewest that fit and meet the deadline" in found.plan.count_choice.reason
    assert found.plan.count_choice.compared == [8, 12, 20, 24]
    assert found.plan.objective == "min-gpus"


def test_rows_without_a_plan_are_kept_with_their_reason(table):
    last = table.rows[-1]
    assert (last.gpus, last.nodes, last.status, last.plan) == (28, 7, "infeasible", None)
    assert "no layout of test-llama on 28" in last.reason
    assert "global batch 24 is not divisible by 28: at most 4 data-parallel ranks" in last.reason
    odd = scale(gpus=[2, 4, 10])
    assert odd.rows[2].status == "refused"
    assert "not whole nodes" in odd.rows[2].reason


def test_the_frame(table):
    frame = table.frame
    assert list(frame["gpus"]) == [4, 8, 12, 16, 20, 24, 28]
    assert list(frame.columns[:5]) == ["gpus", "nodes", "status", "chosen", "layout"]
    assert "days" not in frame.columns
    first = frame.iloc[0]
    assert first["scaling_efficiency"] == 1.0
    rates = frame["tokens_per_s_per_gpu"] / first["tokens_per_s_per_gpu"]
    pd.testing.assert_series_equal(frame["scaling_efficiency"], rates, check_names=False)
    assert frame["step_time_s"].isna().tolist() == [False] * 6 + [True]
    assert frame["chosen"].sum() == 1
    assert frame.loc[frame["chosen"], "step_time_s"].item() == frame["step_time_s"].min()


def test_the_frame_with_a_budget():
    frame = scale(gpus="4,8,28", tokens="1B", price=2.0).frame
    assert frame["steps"].dropna().tolist() == [math.ceil(1e9 / (2048 * 24))] * 2
    hours = frame["steps"].astype(float) * frame["step_time_s"] * frame["gpus"] / 3600
    pd.testing.assert_series_equal(frame["device_hours"], hours, check_names=False)
    pd.testing.assert_series_equal(frame["cost_usd"], 2.0 * hours, check_names=False)
    assert frame["energy_mwh"].isna().all()
    assert (frame["days_low"] < frame["days"]).tolist() == [True, True, False]


def test_json_data(table):
    data = table.to_data()
    assert data["format"] == "planner.scaling"
    assert data["chosen"] == table.plan.cluster.gpus
    assert data["rows"][-1]["step_time_s"] is None
    assert data["rows"][0]["gpus"] == 4


def test_time_skips_only_what_a_bound_settles():
    full, quick = scale(gpus=[4, 24, 64]), scale(gpus=[4, 24, 64], objective="time", global_batch=24)
    assert quick.plan.layout == full.plan.layout
    for row in quick.rows:
        if row.status == "skipped":
            assert "even at the peak rate" in row.reason


def test_a_bound_that_no_plan_breaks(table):
    for gpus, plan in table.plans.items():
        setting = prepare(Request(MODEL, MACHINE, Job(seq_len=2048, global_batch=24), gpus=gpus))
        assert least_step(setting) < plan.estimate.step_time_s


def test_sizes_too_near_to_tell_apart_are_named():
    made = scale(gpus=[4, 8], objective="cost")
    hours = {n: p.estimate.step_time_s * n for n, p in made.plans.items()}
    near = max(hours.values()) <= 1.01 * min(hours.values())
    assert ("within 1%, which runs cannot tell apart" in made.reason) == near


def test_a_scan_that_is_stopped_keeps_what_it_has(monkeypatch):
    seen = []

    def due() -> bool:
        seen.append(1)
        return len(seen) > 2

    monkeypatch.setattr(stopping, "due", due)

    job = Job(seq_len=2048, global_batch=24)
    pins = {k: [v] for k, v in PINS.items()}
    made = scan(Request(MODEL, MACHINE, job, gpus=4, pins=pins), [4, 8, 12], 1)
    assert [row.status for row in made.rows] == ["planned", "planned", "open"]
    assert made.reason.endswith("1 not planned")


def test_nothing_is_chosen_after_the_deadline():
    late = scale(gpus=[4, 8], tokens="1T", deadline_days=5)
    assert late.plan is None
    with pytest.raises(InfeasibleError, match="PLN304 no count of 2 meets the deadline"):
        late.require()
    assert [row.status for row in late.rows] == ["planned", "planned"] or "peak rate" in late.rows[0].reason


def test_nothing_fits():
    small = HardwareProfile.model_validate(profile_data(memory="2 GiB", node_size=4))
    made = planner.scale(llama(32, 4096, 32, 8, 11008), small, gpus=[4, 8], seq_len=2048, global_batch=24)
    assert [row.status for row in made.rows] == ["infeasible", "infeasible"]
    with pytest.raises(InfeasibleError, match="PLN303 no count of 2 fits"):
        made.require()


@pytest.mark.parametrize(("changes", "code"), [
    ({"objective": "speed"}, "PLN107"),
    ({"objective": "memory"}, "PLN127"),
    ({"gpus": [10, 14]}, "PLN131"),
    ({"nodes": [1], "gpus": [4]}, "PLN131"),
    ({"gpus": None}, "PLN131"),
    ({"deadline_days": 3.0}, "PLN125"),
    ({"pin": {"speed": 1}}, "PLN121"),
])  # fmt: skip
def test_refused(changes, code):
    with pytest.raises(InputError, match=code):
        scale(**changes)


@pytest.mark.parametrize(("gpus", "batch", "node", "most"), [
    (88, 512, 8, 8), (96, 512, 8, 32), (8192, 512, 8, 512), (1024, 512, 8, None), (64, 512, 8, None), (24, 24, 4, None),
])  # fmt: skip
def test_batch_notes(gpus, batch, node, most):
    note = batch_note(gpus, batch, node)
    assert note == "" if most is None else f"at most {most} data-parallel ranks" in note


def test_mixtures_scale_too():
    made = planner.scale(mixture(), MACHINE, gpus=[4, 8], seq_len=2048, global_batch=16, engine="megatron", alternatives=1)
    assert [row.status for row in made.rows] == ["planned", "planned"]
