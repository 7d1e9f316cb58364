"""Sound plans pass every check; a plan changed anywhere fails the check that is about it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import one_line_error, planner
from machines import llama, mixture, profile, task

from planner.planfile import Plan
from planner.planning.estimate import estimate_layout
from planner.planning.make import make_plan
from planner.planning.request import Request, task_of_plan
from planner.search import solve
from planner.specs.job import Job
from planner.specs.layout import SPLIT_BACKWARD
from planner.verify import rows
from planner.verify.case import case_of
from planner.verify.checks import State
from verify.plans import changed, checked, failed, made, random_plan


@pytest.mark.parametrize("seed", range(30))
def test_plans_of_random_tasks_pass(seed):
    plan = random_plan(seed)
    if plan is not None:
        assert checked(plan).passed, checked(plan).reason


@pytest.mark.parametrize("seed", range(12))
def test_plans_of_mixed_sequences_pass(seed):
    plan = random_plan(seed, mixing=True)
    if plan is not None:
        assert checked(plan).passed, checked(plan).reason


def test_most_random_tasks_have_a_plan():
    assert sum(random_plan(seed) is not None for seed in range(12)) >= 6


@pytest.mark.parametrize(("model", "hardware", "gpus", "seq_len", "batch", "engine"), [
    ("llama3-8b", "h100-sxm", 8, 8192, 64, "bundled"),
    ("llama2-70b", "a100-80gb-sxm", 64, 4096, 256, "megatron"),
    ("llama3-70b", "h100-sxm", 128, 8192, 256, "torchtitan"),
    ("gpt3-175b", "h100-sxm", 1024, 2048, 1536, "megatron"),
    ("megatron-1t", "a100-80gb-sxm", 3072, 2048, 3072, "megatron+2021"),
])  # fmt: skip
def test_plans_of_shipped_models_pass(model, hardware, gpus, seq_len, batch, engine):
    plan = make_plan(Request(model, hardware, Job(seq_len=seq_len, global_batch=batch), gpus=gpus, engine=engine), 4)
    report = checked(plan)
    assert report.passed, report.reason
    assert len(report.checks) == 11


def test_pinned_spaces_pass():
    t = task(mixture(4, 1024, 8, 2, 1024), 8, 1024, 8, "megatron", profile(memory="60 GiB"))
    for pins, forbid in (
        ({"etp": ["2"], "tp": ["1", "2"]}, ["interleaved"]), ({"dp": ["2"], "mbs": ["3", "1"]}, ["full", "zero"]),
        ({"sp": ["true"], "vpp": ["1", "2"], "schedule": ["1f1b", "interleaved"]}, ["sequence_parallel"][:0]),
    ):  # fmt: skip
        plan = made(t, "megatron", pins, forbid)
        assert plan is not None
        assert checked(plan).passed, checked(plan).reason


@pytest.mark.parametrize("schedule", SPLIT_BACKWARD)
def test_plans_with_split_backwards_pass(schedule):
    """Both ends on the first rank, a heavy head: the simulated step is close to the closed form."""
    t = task(llama(12, 2048, 16, 8, 5504, 64000), 4, 2048, 24, "bundled", profile(memory="30 GiB"))
    plan = made(t, "bundled", {"schedule": [schedule], "pp": ["2", "4"], "tp": ["1"], "mbs": ["1", "2"]}, [])
    assert plan is not None
    assert plan.layout.schedule == schedule
    report = checked(plan)
    assert report.passed, report.reason
    gap = next(c for c in report.checks if c.name == "simulation").figures["gap_apart"]
    assert -0.15 < gap < 0.02


@pytest.mark.parametrize("after", [1, 3, 6, 12])
def test_a_search_that_was_stopped_is_verified_for_what_it_proved(after, monkeypatch):
    """Its bound holds; its alternatives are not checked, because nothing was proven about them."""
    left = [after]

    def check() -> None:
        left[0] -= 1
        if left[0] == 0:  # once: what follows is shielded from signals
            raise KeyboardInterrupt

    monkeypatch.setattr(solve.stopping, "check", check)
    job = Job(seq_len=8192, global_batch=64)
    try:
        plan = make_plan(Request("llama3-8b", "h100-sxm", job, gpus=16, engine="megatron"), 4)
    except KeyboardInterrupt:
        return  # stopped before any plan
    assert plan.certificate is not None
    assert plan.certificate.complete is False
    report = checked(plan)
    assert report.passed, report.reason
    assert "ended early" in report.checks[-1].text


# ---- changed by hand -------------------------------------------------------------------------------------------------


@cache
def tight() -> Plan:
    """A plan over several ranks with recompute, where memory is scarce."""
    t = task(llama(12, 4096, 32, 8, 11008, 64000), 8, 4096, 16, "megatron", profile(memory="13 GiB"))
    plan = made(t, "megatron", {"pp": ["2", "4"], "tp": ["1", "2"], "schedule": ["1f1b"]}, ["cp"])
    assert plan is not None
    assert checked(plan).passed, checked(plan).reason
    assert any(s.recompute != "none" for s in plan.layout.stages)
    return plan


def objective(data: dict[str, Any]) -> None:
    data["certificate"]["objective_ns"] += 1


def split(data: dict[str, Any]) -> None:
    stages = data["layout"]["stages"]
    first, last = stages[0]["layers"], stages[-1]["layers"]
    stages[0], stages[-1] = {"layers": first - 1, "recompute": "full"}, {"layers": last + 1, "recompute": "full"}


def missing_layer(data: dict[str, Any]) -> None:
    data["layout"]["stages"][0] = {"layers": data["layout"]["stages"][0]["layers"] - 1, "recompute": "none"}


def all_recompute(data: dict[str, Any]) -> None:
    for stage in data["layout"]["stages"]:
        stage["recompute"] = "full"


def no_recompute(data: dict[str, Any]) -> None:
    for stage in data["layout"]["stages"]:
        stage["recompute"] = "none"


def allocated_peak(data: dict[str, Any]) -> None:
    data["estimate"]["memory"]["peak_allocated_gib"] *= 0.999


def total_memory(data: dict[str, Any]) -> None:
    for stage in data["estimate"]["memory"]["stages"]:
        stage["total"] *= 0.999


def rule_count(data: dict[str, Any]) -> None:
    space = data["certificate"]["space"]
    name = next(iter(space["rules"]))
    space["rules"][name] -= 1
    space["by_rule"] -= 1
    space["by_bound"] += 1


def enumerated(data: dict[str, Any]) -> None:
    data["certificate"]["space"]["enumerated"] += 1
    data["certificate"]["space"]["by_bound"] += 1


def memory_count(data: dict[str, Any]) -> None:
    data["certificate"]["space"]["by_memory"] += 1
    data["certificate"]["space"]["by_bound"] -= 1


def partition(data: dict[str, Any]) -> None:
    data["certificate"]["space"]["exact"] += 1


def bound(data: dict[str, Any]) -> None:
    data["certificate"]["bound"] *= 0.99


def alternative(data: dict[str, Any]) -> None:
    data["alternatives"][0]["step_time_s"] += 1e-9


def hardware(data: dict[str, Any]) -> None:
    data["hardware"]["device"]["name"] = data["hardware"]["device"]["name"][:-1] + "E"


def smaller_space(data: dict[str, Any]) -> None:
    data["certificate"]["declared"]["micro_batch"].remove(16)


def worse_alternative(data: dict[str, Any]) -> None:
    del data["alternatives"][0]


CHANGES = [
    (objective, "value"), (split, "value"), (missing_layer, "layouts"), (all_recompute, "value"), (no_recompute, "memory"),
    (allocated_peak, "memory"), (total_memory, "memory"), (rule_count, "space"), (enumerated, "space"), (memory_count, "fits"),
    (partition, "space"), (bound, "certificate"), (alternative, "value"), (hardware, "file"), (smaller_space, "axes"),
    (worse_alternative, "alternatives"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "check"), CHANGES, ids=[c.__name__ for c, _ in CHANGES])
def test_a_changed_plan_fails_the_check_about_it(change, check):
    report = checked(changed(tight(), change))
    assert check in failed(report), (failed(report), report.reason)
    assert not report.passed


def second_best(plan: Plan) -> Plan:
    """The plan whose second best layout claims to be the optimum, consistent in everything else."""
    ordered = sorted([(plan.estimate.step_time_s, plan.layout), *((a.step_time_s, a.layout) for a in plan.alternatives)],
                     key=lambda pair: pair[0])  # fmt: skip
    seconds, layout = ordered[1]
    estimate = estimate_layout(task_of_plan(plan)[0], layout)

    def change(data: dict[str, Any]) -> None:
        data["layout"], data["estimate"] = layout.model_dump(mode="json"), estimate.model_dump(mode="json")
        data["alternatives"] = []
        data["choice"] |= {"rule": "fastest", "fastest_step_time_s": seconds}
        data["certificate"] |= {"objective": seconds, "bound": seconds, "objective_ns": round(seconds * 1e9)}

    return changed(plan, change)


def test_the_second_best_is_not_the_optimum():
    report = checked(second_best(tight()))
    assert failed(report)[0] == "optimum", report.reason
    assert "faster than the plan says" in report.reason


def test_every_row_below_the_objective_is_found():
    """A certificate one nanosecond too slow is contradicted by the optimum's own row, found without looking at the plan."""
    plan = tight()
    state = State(case_of(plan, plan.digest, ""), lambda what, done, total: None)
    keep = np.nonzero(state.fits)[0]
    limit = np.full(len(keep), state.optimum.step_ns + 1)
    settled = rows.settle(state.priced.take(keep), state.case.modes, limit, state.progress)
    assert state.optimum.step_ns in settled.below.values()
    assert min(settled.below.values()) == state.optimum.step_ns


# ---- as a user types it ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    words = ("plan", "llama3-8b", "--hardware", "h100-sxm", "--nodes", "1", "--seq-len", "8192", "--global-batch", "64")
    result = planner(*words, "-o", str(path))
    assert result.returncode == 0, result.stderr
    return path


def test_explain_without_verify_explains(plan_file):
    result = planner("explain", str(plan_file))
    assert result.returncode == 0, result.stderr
    assert "What binds each pipeline rank" in result.stdout


def test_verify_passes_and_says_so(plan_file):
    result = planner("explain", str(plan_file), "--verify")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("pass") == 11
    assert "verified in" in result.stdout
    data = json.loads(planner("explain", str(plan_file), "--verify", "--format", "json").stdout)
    assert data["passed"] is True
    assert [c["verdict"] for c in data["checks"]] == ["pass"] * 11
    assert data["plan"] == json.loads(plan_file.read_text())["digest"]


def test_verify_fails_with_one_reason(plan_file, tmp_path):
    data = json.loads(plan_file.read_text())
    data["certificate"]["objective_ns"] += 1
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(data))
    result = planner("explain", str(path), "--verify")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("planner: not verified: file: digest of the plan")
    assert "FAIL" in result.stdout


def test_what_cannot_be_verified(plan_file, tmp_path):
    one_line_error(planner("explain", str(tmp_path / "none.json"), "--verify"), "PLN101")
    (tmp_path / "broken.json").write_text("{")
    one_line_error(planner("explain", str(tmp_path / "broken.json"), "--verify"), "PLN102")
    named = tmp_path / "named.json"
    planner("estimate", "llama3-8b", "--hw", "h100-sxm", "--nodes", "1", "--seq-len", "4096", "--global-batch", "64",
            "-o", str(named))  # fmt: skip
    one_line_error(planner("explain", str(named), "--verify"), "PLN118")
    data = json.loads(plan_file.read_text())
    del data["certificate"]["declared"], data["digest"]
    (tmp_path / "old.json").write_text(json.dumps(data))
    one_line_error(planner("explain", str(tmp_path / "old.json"), "--verify"), "PLN118")
    one_line_error(planner("explain", str(plan_file), "--verify", "--format", "xml"), "PLN107")
