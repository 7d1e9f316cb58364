"""Explanations say what a direct search, a direct estimate and the runtime's mesh say."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import numpy as np
import pytest
from machines import llama, mixed, mixture, profile, task

import planner
from planner.cost.task import LayoutArray
from planner.engines.registry import engine_named
from planner.errors import InputError
from planner.planfile import Plan
from planner.planning.estimate import estimate_layout
from planner.planning.explain import explain_plan
from planner.planning.explain.asked import Asked
from planner.planning.explain.changes import nearest_changes, recompute_words
from planner.planning.explain.losses import PARTS
from planner.planning.explain.places import dense_mesh, expert_mesh, rank_map
from planner.planning.request import task_of_plan
from planner.search.explain import any_fits
from planner.search.extra import with_memory
from planner.search.solve import search
from planner.search.space import declared_space
from planner.specs.layout import Layout
from planner.units import GIB, MIB

MODELS: dict[str, Any] = {
    "llama": (llama(12, 2048), "bundled"),
    "mixture": (mixture(8, 1024, 8), "megatron"),
    "dense first": (mixed("dense first", 7, 1024, random.Random(1)), "megatron"),
    "encoder": (mixed("encoder", 8, 1024, random.Random(2)), "megatron"),
}


def made(name: str, memory: str = "9 GiB", **more: Any) -> Plan:
    model, engine = MODELS[name]
    words = {"seq_len": 2048, "global_batch": 32, "gpus": 16, "engine": engine} | more
    return planner.plan(model, profile(memory=memory), **words)


@cache
def plan_of(name: str) -> Plan:
    return made(name)


@cache
def pipeline_of(name: str) -> Plan:
    return made(name, "7 GiB", pin={"pp": 4, "virtual_stages": 1}, forbid=("cp",))


# ---- ranks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "dense first"])
def test_what_a_rank_would_need_is_what_the_estimate_says(name):
    plan = pipeline_of(name)
    t, _ = task_of_plan(plan)
    ranks = explain_plan(plan).ranks
    assert [r.layers for r in ranks] == [s.layers for s in plan.layout.stages]
    for r, stage in zip(ranks, plan.estimate.memory.stages, strict=True):
        assert r.slack_gib == pytest.approx(stage.headroom, abs=1e-4)
        if r.less_recompute is not None:
            changed = _with_stage(plan.layout, r.stage, recompute=r.less_recompute.recompute)
            over = -estimate_layout(t, changed).memory.stages[r.stage].headroom
            assert r.less_recompute.over_gib == pytest.approx(over, abs=1e-4)
            assert over > 0, "the proven plan recomputes no more than it must"
        other = r.stage + 1 if r.stage < len(ranks) - 1 else r.stage - 1
        if r.one_more is not None and plan.layout.stages[other].layers > 1:
            moved = _with_stage(plan.layout, other, layers=plan.layout.stages[other].layers - 1, recompute="none")
            moved = _with_stage(moved, r.stage, layers=r.one_more.layers, recompute=r.one_more.recompute or "full")
            fits = estimate_layout(t, moved).memory.stages[r.stage].headroom >= 0
            assert fits == (r.one_more.recompute is not None)


def _with_stage(layout: Layout, s: int, **changes: Any) -> Layout:
    stages = [stage.model_copy(update=changes) if i == s else stage for i, stage in enumerate(layout.stages)]
    return layout.model_copy(update={"stages": stages})


def test_a_rank_that_recomputes_is_bound_by_memory():
    plan = pipeline_of("llama")
    e = explain_plan(plan)
    for r in e.ranks:
        if r.recompute != "none":
            assert r.binding.startswith("memory")
        assert r.share <= 1
    assert e.bottleneck.time_s == max(r.time_s for r in e.ranks)
    assert e.bottleneck.ahead_s == pytest.approx(e.bottleneck.time_s - sorted(r.time_s for r in e.ranks)[-2])


# ---- runners-up and the histogram ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_losses_add_up(name):
    plan = plan_of(name)
    e = explain_plan(plan)
    assert len(e.losses) == len(plan.alternatives)
    for loss, other in zip(e.losses, plan.alternatives, strict=True):
        total = sum(getattr(loss.difference, part) for part in PARTS)
        assert total == pytest.approx(other.step_time_s - plan.estimate.step_time_s, abs=1e-6)
        assert loss.peak_difference_gib == pytest.approx(other.peak_gib - plan.estimate.memory.peak_gib)
        assert loss.sentence.startswith(f"{loss.slower:+.1%}: ")
    assert sum(x.layouts for x in e.excluded) == e.layouts == plan.certificate.space.enumerated
    assert all(x.words and "{" not in x.words for x in e.excluded)


# ---- why not -------------------------------------------------------------------------------------------------------

QUESTIONS: list[dict[str, Any]] = [
    {"tp": 2}, {"tp": 4, "zero": 0}, {"pp": [2, 4]}, {"zero": 1, "micro_batch": 2}, {"recompute": "full"}, {"schedule": "1f1b"},
    {"dp": 4}, {"virtual_stages": 2}, {"tp": 1, "zero": 0, "pp": 1, "micro_batch": 4, "recompute": "none"},
]  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pins", QUESTIONS, ids=str)
def test_why_not_is_a_direct_search_with_pins(name, pins):
    plan = plan_of(name)
    t, engine = task_of_plan(plan)
    answer = planner.explain(plan, why_not=pins).why_not
    listed = {k: v if isinstance(v, list) else [v] for k, v in pins.items()}
    best = search(t, engine, declared_space(t, engine, listed, ()), 1).candidates
    if not best:
        assert answer.verdict in ("does not fit", "breaks rules")
        return
    assert round(answer.loss.step_time_s * 1e9) == best[0].step_ns
    assert answer.loss.layout == best[0].layout
    fastest = plan.certificate.objective_ns
    assert best[0].step_ns >= fastest
    if best[0].step_ns > round(plan.estimate.step_time_s * 1e9):
        assert answer.verdict == "slower"
        assert answer.loss.slower > 0
    if best[0].layout == plan.layout:
        assert answer.verdict == "the plan"


def test_rules_are_named_with_their_numbers():
    plan = plan_of("llama")
    answer = planner.explain(plan, why_not={"tp": 7}).why_not
    assert answer.verdict == "breaks rules"
    assert {b.code for b in answer.broken} >= {"PLN201", "PLN202"}
    assert "tp 7 does not divide the 16 attention heads" in [b.what for b in answer.broken]
    assert answer.allowed["tp"] == [1, 2, 4, 8]
    together = planner.explain(plan, why_not={"pp": 1, "schedule": "1f1b"}).why_not
    assert together.conflict.rules == ["PLN206"]
    assert together.changes, "either pin can be lifted"


def test_a_question_lifts_the_plans_own_pins():
    plan = made("llama", pin={"tp": 8}, forbid=("interleaved",))
    answer = planner.explain(plan, why_not={"tp": 1}).why_not
    assert answer.verdict == "faster"
    assert answer.notes == ["the plan was made with a restriction on tp, lifted for this answer"]
    assert answer.loss.layout.tp == 1
    forbidden = planner.explain(plan, why_not={"tp": 8, "virtual_stages": 2, "pp": 2}).why_not
    assert forbidden.loss.layout.schedule == "interleaved"


@pytest.mark.parametrize("pins", [{"qq": 3}, {"tp": "x"}, {"tp": 0}, {"schedule": "fast"}, {"recompute": "some"}])
def test_unknown_axes_and_values_are_refused(pins):
    with pytest.raises(InputError, match="--why-not"):
        planner.explain(plan_of("llama"), why_not=pins)


# ---- it does not fit -----------------------------------------------------------------------------------------------


def test_changes_really_fit_and_one_step_less_does_not():
    model, engine_name = MODELS["llama"]
    machine = profile(memory="5 GiB")
    t, engine = task(model, 16, 2048, 32, engine_name, machine), engine_named(engine_name)
    asked = Asked.of({"zero": [0], "tp": [1], "pp": [1], "recompute": ["none"], "micro_batch": [2]})
    assert not any_fits(t, engine, asked.space(t, engine))
    changes = nearest_changes(t, engine, asked)
    kinds = [c.kind for c in changes]
    assert "memory" in kinds
    assert kinds == sorted(kinds, key=["axis", "states", "fraction", "nodes", "memory"].index)
    for c in changes:
        assert c.status == "optimal"
        with_change = t
        if c.kind == "memory":
            extra = round(c.extra_gib * GIB)
            with_change = with_memory(t, extra)
            assert not any_fits(with_memory(t, extra - MIB), engine, asked.space(t, engine))
        if c.kind == "nodes":
            with_change = task(model, c.gpus, 2048, 32, engine_name, machine)
        estimate = estimate_layout(with_change, c.layout)
        assert estimate.memory.fits
        assert estimate.step_time_s == c.step_time_s
        pinned = {"zero": c.layout.zero == 0, "tp": c.layout.tp == 1, "pp": c.layout.pp == 1}
        assert all(holds for axis, holds in pinned.items() if axis != c.axis)


def test_fewest_nodes_are_the_fewest():
    model, engine_name = MODELS["llama"]
    engine = engine_named(engine_name)
    asked = Asked.of({"tp": [1], "pp": [2]})

    def sized(gpus: int) -> Any:
        return task(model, gpus, 2048, 64, engine_name, profile(memory="3.6 GiB"))

    found = [c for c in nearest_changes(sized(8), engine, asked) if c.kind == "nodes"]
    for c in found:
        for fewer in range(8, c.gpus, 8):
            assert not any_fits(sized(fewer), engine, asked.space(sized(fewer), engine))
        assert any_fits(sized(c.gpus), engine, asked.space(sized(c.gpus), engine))


@pytest.mark.parametrize("name", ["llama", "dense first"])
def test_a_layout_that_does_not_fit_is_explained(name):
    model, engine = MODELS[name]
    layout = {"pp": 4, "zero": 0, "micro_batch": 8}
    where = {"gpus": 16, "seq_len": 2048, "global_batch": 128, "engine": engine}
    plan = planner.estimate(model, profile(memory="7 GiB"), layout=layout, **where)
    assert not plan.estimate.memory.fits
    unfit = planner.explain(plan).unfit
    assert unfit.verdict == "does not fit"
    assert unfit.shortfall.over_gib == pytest.approx(plan.estimate.memory.peak_gib - plan.estimate.memory.limit_gib)
    assert sum(unfit.shortfall.parts.values()) <= unfit.shortfall.needs_gib + 1e-6
    assert unfit.conflict.members
    assert unfit.changes
    t, _ = task_of_plan(plan)
    for c in unfit.changes:
        if c.kind in ("layers", "axis"):
            assert estimate_layout(t, c.layout).memory.fits


def test_recompute_in_words():
    layout = pipeline_of("llama").layout
    stages = [
        s.model_copy(update={"recompute": r}) for s, r in zip(layout.stages, ("full", "full", "none", "selective"), strict=True)
    ]
    assert recompute_words(layout.model_copy(update={"stages": stages})) == "full on stages 0-1, selective on stage 3"


# ---- places --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["tp-cp-dp-pp", "tp-cp-pp-dp"])
@pytest.mark.parametrize("degrees", [(2, 1, 4, 2), (1, 2, 2, 4), (4, 2, 1, 2), (16, 1, 1, 1)])
def test_the_rank_map_is_a_mesh(degrees, order):
    tp, cp, pp, dp = degrees
    sizes = {"tp": tp, "cp": cp, "pp": pp, "dp": dp}
    layout = Layout.model_validate({**sizes, "order": order, "stages": [{"layers": 1}] * pp})
    nodes, found = rank_map(layout, 8), dense_mesh(layout, profile())
    assert [len(n.places) for n in nodes] == [8, 8]
    assert found.dimensions == order.split("-")[::-1]
    mesh = np.arange(16).reshape([sizes[name] for name in found.dimensions])
    for place in (p for n in nodes for p in n.places):
        assert mesh[tuple(place.dense)] == place.rank
        assert place.local_rank == place.rank % 8
        assert place.expert[0] == place.dense[found.dimensions.index("pp")]
    groups = {g.name: g for g in found.groups}
    for axis, name in enumerate(found.dimensions):
        lines = np.moveaxis(mesh, axis, -1).reshape(-1, mesh.shape[axis])
        g = groups[name]
        assert (g.size, g.groups) == (mesh.shape[axis], len(lines))
        if g.size > 1:
            assert (np.diff(lines, axis=1) == g.stride).all()
            crosses = any(len({rank // 8 for rank in line}) > 1 for line in lines.tolist())
            assert (g.tier == "nics") == crosses
        else:
            assert g.tier == ""


def test_the_expert_mesh_holds_the_same_stages():
    layout = Layout.model_validate({"tp": 2, "pp": 2, "dp": 4, "ep": 4, "etp": 1, "stages": [{"layers": 1}] * 2})
    mesh = expert_mesh(layout, profile())
    assert mesh.shape == [2, 2, 4, 1]
    assert int(LayoutArray.of([layout], task().job).expert_shard[0]) == 2
    for node in rank_map(layout, 8):
        for place in node.places:
            assert place.dense[0] == place.expert[0]
    with pytest.raises(InputError, match="not a multiple"):
        expert_mesh(layout.model_copy(update={"ep": 3}), profile())
