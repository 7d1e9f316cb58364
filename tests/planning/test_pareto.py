"""Fronts: every point is the optimum under its limit, none is beaten, and the same front is the same picture."""

from __future__ import annotations

import json
import random

import pandas as pd
import pytest
from command import one_line_error, planner
from machines import llama, mixed, profile

import planner as api
from planner import stopping
from planner.errors import InfeasibleError, InputError, MissingPartError
from planner.report import front as report
from planner.report import frontchart
from planner.search import front as search_front
from planner.search.front import nondominated

JOB = {"seq_len": 2048, "global_batch": 16}
MACHINE = profile(memory="9 GiB", node_size=4)
FLAGS = ["plan", "llama3-8b", "--hw", "h100-sxm", "--seq-len", "4096", "--global-batch", "64", "--pin", "micro_batch=1",
         "--pin", "tp=2"]  # fmt: skip


@pytest.fixture(scope="module")
def front():
    return api.pareto(llama(), MACHINE, against="memory", gpus=4, **JOB)


def check_memory_front(made, model, gpus, engine="bundled") -> None:
    frame = made.frame
    assert len(frame) > 2
    assert frame["step_time_s"].is_monotonic_increasing
    assert frame["peak_gib"].is_monotonic_decreasing
    assert (frame["peak_gib"] <= frame["limit_gib"] + 1e-9).all()
    for point in made.points:
        limit = point.plan.policy.max_memory_fraction
        again = api.plan(model, MACHINE, gpus=gpus, max_memory_fraction=limit, alternatives=1, engine=engine, **JOB)
        proof = point.plan.certificate
        assert proof.objective_ns == again.certificate.objective_ns
        assert (proof.status, proof.space.open) == ("optimal", 0)
        s = proof.space
        assert s.by_rule + s.by_memory + s.by_bound + s.exact == s.enumerated


def test_memory_points_are_the_optima_under_their_limits(front):
    check_memory_front(front, llama(), 4)


def test_memory_points_over_kinds_of_layers():
    model = mixed("alternating", 6, 1024, random.Random(3))
    check_memory_front(
        api.pareto(model, MACHINE, against="memory", gpus=4, points=6, engine="megatron", **JOB), model, 4, "megatron"
    )


def test_the_last_memory_point_is_the_lowest_limit(front):
    lowest = api.plan(llama(), MACHINE, gpus=4, objective="memory", alternatives=1, **JOB).certificate.lowest_memory
    last = front.points[-1].plan
    assert lowest.impossible_gib <= last.estimate.memory.peak_gib <= lowest.limit_gib * (1 + 2 * search_front.RESOLUTION)


def test_a_memory_plan_is_a_plan_file(front, tmp_path):
    from planner import planfile

    path = tmp_path / "plan.json"
    planfile.write(front.points[1].plan, path)
    assert api.load_plan(str(path)).to_json() == front.points[1].plan.to_json()
    assert api.check(str(path)) == []


@pytest.mark.parametrize("against", ["gpus", "cost"])
def test_sizes(against):
    made = api.pareto(llama(), MACHINE, against=against, gpus="4,8,12,16", tokens="1B", price=2, seq_len=2048, global_batch=48)
    frame = made.frame
    x = frame["gpus"] if against == "gpus" else frame["usd_per_b_tokens"]
    for i in range(len(frame)):
        beaten = (x <= x[i]) & (frame["step_time_s"] <= frame["step_time_s"][i])
        beaten &= (x < x[i]) | (frame["step_time_s"] < frame["step_time_s"][i])
        assert frame["on_front"][i] == (not beaten.any())
    assert frame["usd_per_b_tokens"].to_numpy() == pytest.approx(2 * frame["device_hours_per_b_tokens"].to_numpy())
    assert made.frame["device_hours_per_b_tokens"][0] == pytest.approx(
        frame["step_time_s"][0] * 4 / 3600 * 1e9 / (2048 * 48)
    )  # fmt: skip


def test_nondominated():
    assert nondominated([3, 1, 2, 2, 4], [1, 3, 2, 2, 1]).tolist() == [0, 1, 2]
    assert nondominated([], []).tolist() == []


def test_a_stopped_front_keeps_its_points(monkeypatch):
    real, seen = search_front._under, []

    def under(*args):
        seen.append(1)
        if len(seen) > 3:
            raise TimeoutError
        return real(*args)

    monkeypatch.setattr(search_front, "_under", under)
    made = api.pareto(llama(), MACHINE, against="memory", gpus=4, **JOB)
    assert made.stopped
    assert 1 <= len(made.points) <= 4
    assert made.notes == ("stopped early: points are missing",)
    monkeypatch.setattr(stopping, "passed", lambda: True)
    with pytest.raises(TimeoutError):
        api.pareto(llama(), MACHINE, against="memory", gpus=4, **JOB)


def test_nothing_fits():
    with pytest.raises(InfeasibleError, match="PLN301"):
        api.pareto("llama3-70b", "h100-sxm", against="memory", gpus=8, seq_len=8192, global_batch=64)


@pytest.mark.parametrize(("change", "code"), [
    ({"against": "speed"}, "PLN107"), ({"points": 0}, "PLN107"), ({"against": "gpus"}, "PLN129"),
    ({"gpus": [4, 8]}, "PLN129"), ({"nodes": 1}, "PLN131"),
])  # fmt: skip
def test_bad_requests(change, code):
    with pytest.raises(InputError, match=code):
        api.pareto(llama(), MACHINE, **({"against": "memory", "gpus": 4} | JOB | change))


def test_command(tmp_path):
    words = [*FLAGS, "--nodes", "1,2", "--pareto", "cost"]
    table = planner(*words, "-o", str(tmp_path / "front.json"))
    assert table.returncode == 0, table.stderr
    assert "device-hours a billion tokens" in table.stdout
    assert "front written to" in table.stderr
    data = json.loads((tmp_path / "front.json").read_text())
    assert data["format"] == "planner.pareto"
    assert [p["gpus"] for p in data["points"]] == [8, 16]
    csv = planner(*words, "--format", "csv", "-o", str(tmp_path / "front.csv"))
    assert csv.stdout == (tmp_path / "front.csv").read_text()
    assert pd.read_csv(tmp_path / "front.csv")["on_front"].any()


@pytest.mark.parametrize(("words", "code"), [
    (["--chart", "x.svg"], "PLN129"), (["--points", "3"], "PLN129"),
    (["--pareto", "memory", "--objective", "memory"], "PLN129"), (["--pareto", "memory", "--chart", "x.pdf"], "PLN128"),
    (["--pareto", "memory", "-o", "x.txt"], "PLN128"), (["--pareto", "speed"], "PLN107"),
])  # fmt: skip
def test_bad_flags(words, code):
    one_line_error(planner(*FLAGS, "--nodes", "1", *words), code)


def test_a_chart_without_its_part(tmp_path, monkeypatch):
    monkeypatch.setattr(frontchart.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPartError, match="PLN556 matplotlib is not installed") as caught:
        frontchart.checked_chart(tmp_path / "front.svg")
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_same_chart_twice(front, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    frontchart.draw(front, first)
    frontchart.draw(front, second)
    assert first.read_bytes() == second.read_bytes()
    assert b"<dc:date>" not in first.read_bytes()


def test_dots():
    lines = report.dots([1, 2, 3], [9, 4, 5], [True, True, False], width=21, height=5)
    plot = [line[12:] for line in lines[:5]]
    assert plot[0].startswith("*")
    assert plot[4] == " " * 10 + "*"
    assert plot[3].endswith(".")
    assert report.dots([1.0], [1.0], [True], width=4, height=2)[1].endswith("|*")
