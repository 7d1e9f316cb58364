"""The integer cost model: one implementation for one layout and for many, terms that behave as physics says."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from machines import gpt, llama, llama_70b, profile, task

from planner.cost import memory, primitives, step
from planner.cost.collectives import collective_seconds, neighbour_seconds
from planner.cost.compute import gemm_seconds
from planner.cost.task import LayoutArray, StageArray, even_runs
from planner.engines.registry import engine_named
from planner.planning.estimate import estimate_layout
from planner.search.space import declared_space, enumerate_rows
from planner.specs.layout import Layout
from planner.specs.layoutflags import complete_layout


def price(t, **named):
    layout = complete_layout(named, t.model, t.gpus)
    x, s = LayoutArray.of([layout], t.job), StageArray.of([layout])
    return step.step_cost(primitives.price(t, x), x, s)


@pytest.mark.parametrize("engine", ["bundled", "megatron"])
def test_an_array_equals_its_entries(engine):
    t = task(llama_70b(), 64, 4096, 256, engine)
    x = enumerate_rows(t, engine_named(engine), declared_space(t, engine_named(engine), {}, [])).layouts
    chosen = x.take(np.random.default_rng(0).choice(len(x), 60, replace=False))
    p, runs = primitives.price(t, chosen), even_runs(chosen, 80, 2)
    together = step.step_cost(p, chosen, runs)
    for row in range(len(chosen)):
        alone = chosen.take(np.array([row]))
        q = primitives.price(t, alone)
        for f in dataclasses.fields(q):
            assert getattr(q, f.name)[0] == getattr(p, f.name)[row], f.name
        single = step.step_cost(q, alone, even_runs(alone, 80, 2))
        assert (single.step[0], single.allocated[0]) == (together.step[row], together.allocated[row])


def test_runs_equal_explicit_stages():
    """Folding equal ranks into runs changes neither time nor peak memory."""
    t = task(llama_70b(), 64, 4096, 256)
    for pp, mode in ((1, 0), (2, 1), (4, 2), (8, 0), (16, 2), (32, 1)):
        layout = complete_layout({"pp": pp, "tp": 2, "recompute": ("none", "selective", "full")[mode]}, t.model, 64)
        x = LayoutArray.of([layout], t.job)
        p = primitives.price(t, x)
        explicit, folded = step.step_cost(p, x, StageArray.of([layout])), step.step_cost(p, x, even_runs(x, 80, mode))
        assert (explicit.step[0], explicit.allocated[0]) == (folded.step[0], folded.allocated[0])


def test_breakdown_and_parts_add_up():
    t = task(llama_70b(), 64, 8192, 256)
    for named in (
        {"tp": 8, "pp": 4, "zero": 1, "recompute": "full"},
        {"tp": 4, "zero": 3, "recompute": "selective"},
        {"tp": 8, "pp": 8, "virtual_stages": 2},
        {"tp": 2, "pp": 2, "zero": 2, "recompute": "full:3,selective:5"},
    ):
        e = estimate_layout(t, complete_layout(named, t.model, 64))
        assert sum(e.breakdown.model_dump().values()) == pytest.approx(e.step_time_s, rel=1e-6)
        assert all(v >= 0 for v in e.breakdown.model_dump().values())
        for s in e.memory.stages:
            parts = s.params + s.grads + s.optimizer + s.activations + s.buffers + s.transient
            assert parts == pytest.approx(s.allocated, rel=1e-9)
            assert s.total == pytest.approx(s.reserved + s.outside, rel=1e-9)
            assert min(s.params, s.grads, s.optimizer, s.activations, s.buffers, s.transient) >= -1e-6
        assert e.memory.peak_gib == max(s.total for s in e.memory.stages)
        assert e.tokens_per_s == pytest.approx(256 * 8192 / e.step_time_s)


def test_more_recompute_saves_memory_and_costs_time():
    t = task(llama_70b(), 64, 8192, 256)
    costs = [price(t, tp=8, pp=4, recompute=r) for r in ("none", "selective", "full")]
    assert costs[0].allocated[0] > costs[1].allocated[0] > costs[2].allocated[0]
    assert costs[0].step[0] < costs[1].step[0] < costs[2].step[0]


def test_zero_stages_shard_what_they_say():
    t = task(llama(8, 2048, 16, 16, 5632), 8, 1024, 64)
    allocated = [int(price(t, zero=z, recompute="full").allocated[0]) for z in range(4)]
    assert allocated == sorted(allocated, reverse=True)
    layouts = [Layout.model_validate({"dp": 8, "zero": z, "micro_batch": 2, "stages": [{"layers": 8}]}) for z in range(4)]
    each = [LayoutArray.of([x], t.job) for x in layouts]
    states = [memory.state_bytes(t, x, np.array([8])).backward for x in each]
    assert [s["optimizer"][0] for s in states] == [8, 1, 1, 1]
    assert [s["params"][0] for s in states] == [6, 2.5, 2.5, 0.5]
    assert [s["grads"][0] for s in states] == [4, 4, 0.5, 0.5]


def test_faster_hardware_is_never_slower():
    base = {"tp": 4, "pp": 2, "zero": 1, "recompute": "full"}
    slow = task(llama_70b(), 32, 4096, 64, hardware=profile(nic="10 GB/s"))
    fast = task(llama_70b(), 32, 4096, 64, hardware=profile(nic="50 GB/s"))
    assert price(fast, **base).step[0] < price(slow, **base).step[0]


def test_collectives_follow_their_tiers():
    h = profile()
    one = np.ones(1)
    big = 256.0 * 2**20 * one
    inside = collective_seconds("all_gather", 8 * one, one, big, h)
    outside = collective_seconds("all_gather", 8 * one, 8 * one, big, h)
    mixed = collective_seconds("all_gather", 64 * one, one, big, h)
    assert inside < mixed < outside
    assert collective_seconds("all_gather", one, one, big, h) == 0
    assert collective_seconds("all_reduce", 8 * one, one, big, h) == pytest.approx(2 * inside, rel=0.01)
    near, far = neighbour_seconds(big, h)
    assert near < far


def test_gemm_time_is_near_the_roofline_for_large_products():
    device, peak = profile().device, 989e12
    n = np.array([8192.0])
    seconds = gemm_seconds(n, n, n, device, peak, 2)
    assert 0.6 < 2 * 8192.0**3 / seconds[0] / peak < 0.85
    tiny = gemm_seconds(np.array([16.0]), np.array([16.0]), np.array([16.0]), device, peak, 2)
    assert tiny[0] >= device.gemm.latency_s


def test_tied_head_is_counted_once_on_one_rank():
    tied, untied = task(gpt(tied=True), 1, 1024, 4), task(gpt(tied=False), 1, 1024, 4)
    difference = price(untied, micro_batch=1).allocated[0] - price(tied, micro_batch=1).allocated[0]
    assert difference == pytest.approx(18 * 51200 * 1024, rel=0.01)


# Peak allocated GiB on B200 of a 12-layer Llama-3-70B at sequence 4096, micro-batch 1, Megatron-Core with fused
# cross-entropy: MooreThreads/SimuMax 4dcaae5, docs/b200/b200_release_v1.2_summary.json.
B200 = [({"pp": 2}, [66.55, 62.97]), ({"tp": 2}, [60.68]), ({"tp": 4}, [39.07]), ({"tp": 8}, [28.29])]


@pytest.mark.parametrize(("named", "measured"), B200)
def test_megatron_memory_against_published_measurements(named, measured):
    model = llama(12, 8192, 64, 8, 28672, 128256)
    dp = 8 // (named.get("tp", 1) * named.get("pp", 1))
    t = task(model, 8, 4096, 8 * dp, "megatron", profile(memory="178 GiB"))
    zero = 1 if dp > 1 else 0
    e = estimate_layout(t, complete_layout({**named, "zero": zero}, model, 8))
    assert [s.allocated for s in e.memory.stages] == pytest.approx(measured, rel=0.01)
