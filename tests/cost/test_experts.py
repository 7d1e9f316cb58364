"""Routed experts, latent attention and unfused attention in the cost model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from machines import figure, llama, mixture, profile, task

from planner.cost import collectives, compute, memory, operators, primitives, step, traffic
from planner.cost.blending import blend
from planner.cost.task import LayoutArray
from planner.engines.registry import accounting_named, engine_named
from planner.planning.estimate import estimate_layout
from planner.specs.layout import Layout
from planner.specs.model import Model

DEVICE = profile().device


def array(*values):
    return np.array(values, dtype=float)


def layouts(t, *named):
    made = [Layout.model_validate({"stages": [{"layers": t.model.n_layers}], "dp": t.gpus, "zero": 1} | n) for n in named]
    return LayoutArray.of(made, t.job)


def test_grouped_products_take_the_time_of_their_work():
    """Eight products of an eighth of the rows: never faster than one, at most half slower where tiles still fill."""
    one = compute.gemm_seconds(array(65536), array(4096), array(4096), DEVICE, 989e12, 2.0)
    eight = compute.gemm_seconds(array(8192), array(4096), array(4096), DEVICE, 989e12, 2.0, array(8))
    small = compute.gemm_seconds(array(64), array(4096), array(4096), DEVICE, 989e12, 2.0, array(8))
    assert one[0] <= eight[0] < 1.5 * one[0]
    assert small[0] > 8 * 2 * 64 * 4096 * 4096 / 989e12  # few rows: memory-bound weights


def test_ep_spreads_experts_and_their_states():
    t = task(mixture(experts=8), 8, 1024, 16, "megatron")
    x = layouts(t, {"ep": 1}, {"ep": 2}, {"ep": 8})
    params = memory.rank_params(t, x)
    assert params["experts"].tolist() == pytest.approx([t.model.expert_params_of(t.model.layer) / e for e in (1, 2, 8)])
    p = primitives.price(t, x)
    assert p.state[0] > p.state[1] > p.state[2]
    # ZeRO 1 over the ranks that hold the same experts: 12 bytes over 8, 4 and 1 of them; 6 bytes whole
    experts = t.model.expert_params_of(t.model.layer)
    dense = p.state[0] - experts * (6 + 12 / 8)
    assert p.state[2] - dense == pytest.approx(experts / 8 * (6 + 12), rel=0.01)


def test_exchange_costs_only_across_ranks_and_repeated_rows_go_once():
    machine = profile(node_size=4, nic="5 GB/s")
    spread = collectives.collective_seconds("all_to_all", array(1, 4, 8), array(1, 1, 1), array(1e9, 1e9, 1e9), machine)
    assert spread[0] == 0
    assert spread[2] > spread[1] > 0
    once = collectives.collective_seconds("all_to_all", array(8), array(1), array(1e9), machine, copies=8)
    # eight copies to two nodes: two places (1 - 2^-8) of eight
    assert once[0] < 0.3 * spread[2]


@pytest.mark.parametrize("op", ["all_gather", "reduce_scatter", "all_reduce", "all_to_all"])
@pytest.mark.parametrize("ranks", [16, 64])
def test_no_collective_beats_the_wire(op, ranks):
    """What leaves a node goes through its adapters: eight of 50 GB/s."""
    seconds = collectives.collective_seconds(op, array(ranks), array(1), array(1e9), profile(node_size=8))
    nodes = ranks // 8
    # of a shared tensor each node takes in what it lacks; of an all-to-all each rank sends its own bytes
    wire = 1e9 * (nodes - 1) / nodes / (50e9 if op == "all_to_all" else 8 * 50e9)
    assert seconds[0] >= wire


def test_deep_ep_is_never_slower():
    model = mixture(experts=8, top_k=4)
    plain, deep = (task(model, 8, 1024, 16, e, profile(node_size=2)) for e in ("megatron", "megatron+deep-ep"))
    x = layouts(plain, {"ep": 8})
    assert primitives.price(deep, x).forward[0] < primitives.price(plain, x).forward[0]


def test_the_host_pays_for_every_expert_of_a_rank():
    """Grouped linears are loops over experts: more of them on a rank raise the floor under a small layer."""
    t = task(mixture(experts=64, top_k=2), 8, 1024, 16, "megatron")
    x = layouts(t, {"ep": 8}, {"ep": 1})
    host = operators.layer_seconds(t, x).host_forward
    forward, launch = t.accounting.kernels_expert[0], t.hardware.device.launch.base * t.constant("host")
    assert host[1] - host[0] == pytest.approx((64 - 8) * forward * launch)
    fused = replace(t, accounting=accounting_named("megatron+fused-experts"))
    assert len(set(operators.layer_seconds(fused, x).host_forward)) == 1
    narrow = replace(t, job=t.job.model_copy(update={"linears": "fp8"}))
    dropped = replace(narrow, accounting=accounting_named("megatron+token-drop"))
    floors = [operators._host(n, operators.shapes_of(n, x), 0)[1] for n in (t, narrow, dropped)]
    assert floors[1] > floors[0]
    assert floors[2] == pytest.approx(floors[0])


def test_windows_that_are_not_skipped_cost_as_much_as_none():
    whole = llama()
    data = whole.model_dump(exclude_none=True)
    data["layers"][0]["attention"]["sliding_window"] = 128
    windowed = Model.model_validate(data)
    plain, masked = (task(windowed, 8, 4096, 16, e) for e in ("megatron", "megatron+whole-windows"))
    full = task(whole, 8, 4096, 16, "megatron")
    x = layouts(full, {})
    seconds = [operators.layer_seconds(t, x).forward[0] for t in (plain, masked, full)]
    assert seconds[0] < seconds[1]
    assert seconds[1] == pytest.approx(seconds[2])


def test_blend_is_the_mean_and_peaks_are_the_largest():
    t = task(mixture(4), 8, 1024, 16, "megatron")
    x = layouts(t, {"ep": 8})
    dense = primitives.price(task(llama(4, 1024, 16, 4, 1024), 8, 1024, 16, "megatron"), x)
    routed = primitives.price(t, x)
    mixed = blend([dense, routed], np.array([[1, 3]]))
    assert mixed.forward[0] == -(-(int(dense.forward[0]) + 3 * int(routed.forward[0])) // 4)
    assert mixed.transient[0] == max(dense.transient[0], routed.transient[0])
    alone = blend([dense, routed], np.array([[4, 0]]))
    assert (alone.forward[0], alone.transient[0]) == (dense.forward[0], dense.transient[0])


def deepseek_v2(layers: int, dense: int) -> Model:
    latent = {
        "kind": "latent", "heads": 128, "head_dim": 192, "v_head_dim": 128, "rope_dim": 64,
        "q_lora_rank": 1536, "kv_lora_rank": 512,
    }  # fmt: skip
    routed = {"kind": "gated", "width": 1536, "experts": 160, "top_k": 6, "shared_width": 3072}
    groups = [
        {"count": dense, "attention": latent, "mlp": {"kind": "gated", "width": 12288}},
        {"count": layers - dense, "attention": latent, "mlp": routed},
    ]
    return Model.model_validate(
        {"name": "deepseek-v2", "hidden": 5120, "vocab": 102400, "layers": [g for g in groups if g["count"]]}
    )  # fmt: skip


def test_latent_attention_counts_deepseek_v2_exactly():
    """DeepSeek-V2's 236 B parameters of which 21 B are active (arXiv 2405.04434, section 1)."""
    model = deepseek_v2(60, 1)
    assert model.total_params == 235_741_434_880
    active = sum(n * model.active_params_of(g) for g, n in model.kinds) + 2 * model.embedding_params
    assert active / 1e9 == pytest.approx(21.4, abs=0.3)


@pytest.mark.parametrize(("named", "measured"), [({"ep": 8, "dp": 8}, 45.63), ({"ep": 4, "dp": 4, "pp": 2}, 44.70)])
def test_experts_memory_against_published_measurements(named, measured):
    """Peak allocated GiB on B200 of four layers of DeepSeek-V2, the first one dense: MooreThreads/SimuMax 4dcaae5."""
    model = deepseek_v2(4, 1)
    t = task(model, 8, 4096, 32, "megatron+no-overlap", profile(memory="178 GiB"))
    pp = named.get("pp", 1)
    layout = Layout.model_validate(
        {**named, "zero": 1, "schedule": "1f1b" if pp > 1 else "none", "stages": [{"layers": 4 // pp}] * pp}
    )
    x, kinds = LayoutArray.of([layout], t.job), [t.only(k) for k in range(2)]
    priced = [primitives.price(k, x) for k in kinds]
    from planner.cost.task import StageArray

    stages = StageArray.of([layout])
    blended = blend([p.take(stages.row) for p in priced], step.layers_by_kind(t, layout))
    cost = step.stage_cost(priced[0], x, stages, blended)
    assert max(cost.allocated) / 2**30 == pytest.approx(measured, rel=0.01)


def test_unfused_attention_writes_its_scores():
    """5 a s^2 b bytes more a layer (Korthikanti 2022, equation 1), and more time, growing with the square."""
    fused, unfused = (task(llama(4), 8, 2048, 16, e) for e in ("megatron", "megatron+unfused-attention"))
    x = layouts(fused, {})
    extra = primitives.price(unfused, x).act0 - primitives.price(fused, x).act0
    assert extra[0] == pytest.approx(5 * 16 * 2048**2, rel=1e-6)
    long = [replace(t, job=t.job.model_copy(update={"seq_len": 8192})) for t in (fused, unfused)]
    short = [primitives.price(t, x).forward[0] for t in (fused, unfused)]
    later = [primitives.price(t, x).forward[0] for t in long]
    assert later[1] / later[0] > short[1] / short[0] > 1


def test_narrow_products_are_faster_and_need_a_known_peak():
    t = task(llama(4, 4096, 32, 8, 14336), 8, 4096, 16, "megatron")
    hardware = profile(peak={"bf16": figure("989 TFLOP/s"), "fp8": figure("1979 TFLOP/s")})
    narrow = replace(t, hardware=hardware, job=t.job.model_copy(update={"linears": "fp8"}))
    x = layouts(t, {})
    wide_ns, narrow_ns = (int(primitives.price(k, x).forward[0]) for k in (t, narrow))
    assert 1.2 < wide_ns / narrow_ns < 2
    with pytest.raises(Exception, match="no peak rate for fp8"):
        primitives.price(replace(narrow, hardware=t.hardware), x)


def narrow(t):
    hardware = profile(peak={"bf16": figure("989 TFLOP/s"), "fp8": figure("1979 TFLOP/s")})
    return replace(t, hardware=hardware, job=t.job.model_copy(update={"linears": "fp8"}))


def test_narrow_rows_of_experts_are_padded_in_passes_of_their_own_unless_the_dispatcher_does():
    """Fp8Padding and Fp8Unpadding: two bytes of each element of a routed row, read and written by both."""
    engines = ("megatron", "megatron+deep-ep", "megatron+token-drop")
    wide = [task(mixture(4), 8, 1024, 16, e) for e in engines]
    x = layouts(wide[0], {"ep": 8})
    for tasks, padded in ((wide, False), ([narrow(t) for t in wide], True)):
        s = operators.shapes_of(tasks[0], x)
        for direction in (0, 1):
            seconds = [operators.layer_parts(t, s, direction)["elementwise"][0] for t in tasks]
            passes = 8.0 * s.routed[0] * tasks[0].model.hidden if padded else 0.0
            expected = tasks[0].constant("elementwise") * compute.streaming_seconds(passes, tasks[0].hardware.device)
            assert [seconds[0] - later for later in seconds[1:]] == pytest.approx([expected] * 2, abs=1e-12)


def test_buffers_of_a_fixed_size_are_computed_whole_but_neither_sent_nor_kept():
    exact, fixed = (task(mixture(4, 4096, width=4096), 8, 4096, 16, e) for e in ("megatron", "megatron+static-experts"))
    x = layouts(exact, {"ep": 8})
    parts = [operators.layer_parts(t, operators.shapes_of(t, x), 1)["experts"][0] for t in (exact, fixed)]
    assert parts[1] / parts[0] == pytest.approx(1.5, rel=0.05)
    seconds = [operators.layer_seconds(t, x) for t in (exact, fixed)]
    assert seconds[0].ep_forward[0] == seconds[1].ep_forward[0] > 0
    assert primitives.price(exact, x).act0[0] == primitives.price(fixed, x).act0[0]


def test_gathers_between_nodes_hide_under_exchanges_inside_one():
    """Experts over the eight devices of a node leave its adapters free; over two nodes, or with one node only, they do not."""
    t = task(mixture(4), 32, 1024, 32, "megatron+fsdp")
    for n_node, ep, free in ((8, 8, True), (4, 8, False), (32, 8, False)):
        there = replace(t, hardware=profile(node_size=n_node, nic="2 GB/s"))
        x = layouts(there, {"ep": ep, "zero": 3})
        seconds, here = operators.layer_seconds(there, x), np.zeros(1, dtype=np.int64)
        idle = traffic.idle_seconds(there, x, seconds, here)
        assert [float(i[0]) for i in idle] == [float(seconds.ep_forward[0]) if free else 0.0] * 2
        busy = traffic.layer_compute(there, x, seconds, here)
        alone = traffic.dp_traffic(there, x, busy, (np.zeros(1), np.zeros(1)))
        beside = traffic.dp_traffic(there, x, busy, idle)
        assert (beside.forward[0] < alone.forward[0]) == free


def test_expert_traffic_is_a_part_of_the_step():
    t = task(mixture(4), 8, 1024, 16, "megatron")
    layout = Layout.model_validate({"ep": 8, "dp": 8, "zero": 1, "stages": [{"layers": 4}]})
    e = estimate_layout(t, layout)
    assert e.breakdown.ep_comm > 0
    assert sum(e.breakdown.model_dump().values()) == pytest.approx(e.step_time_s, rel=1e-6)


def test_engines_without_experts_refuse_them():
    from planner.engines.base import job_problems

    t = task(mixture(4), 8, 1024, 16, "megatron")
    assert not job_problems(t, engine_named("megatron"))
    assert not job_problems(t, engine_named("torchtitan"))
    assert not job_problems(t, engine_named("bundled"))
    for name in ("deepspeed", "nanotron", "fsdp1"):
        assert job_problems(t, engine_named(name)), name
