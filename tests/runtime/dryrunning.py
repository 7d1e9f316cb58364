"""Layouts whose dry run must agree with the planner's formulas: bytes within 3 %, collectives exactly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import plans
from machines import figure, profile

from planner.cost.task import Task
from planner.engines.registry import engine_named
from planner.planfile import Plan
from planner.planning.detail.case import case_of
from planner.planning.detail.comm import collectives_of
from planner.planning.estimate import estimate_layout
from planner.runtime.dryrun import RankReport
from planner.specs.layers import Attention, LayerGroup, Mlp
from planner.specs.model import Model

NO_WORKSPACE = profile(workspace=figure("0 GiB"))


def _llama(layers: int) -> Model:
    """Layers of Llama 3 8B."""
    group = LayerGroup(count=layers, attention=Attention(heads=32, kv_heads=8), mlp=Mlp(kind="gated", width=14336))
    return Model(name="llama", hidden=4096, vocab=128256, layers=[group])


def _gpt(layers: int) -> Model:
    """Layers of GPT-3 6.7B: layer norms and biases."""
    attention = Attention(heads=32, qkv_bias=True, out_bias=True)
    group = LayerGroup(count=layers, attention=attention, mlp=Mlp(kind="gelu", width=16384, bias=True))
    options: dict[str, Any] = {"norm": "layernorm", "positions": "learned", "max_positions": 4096}
    return Model(name="gpt", hidden=4096, vocab=50304, layers=[group], **options)


def _mixtral(layers: int) -> Model:
    """Layers of Mixtral 8x7B, half as wide."""
    mlp = Mlp(kind="gated", width=7168, experts=8, top_k=2)
    group = LayerGroup(count=layers, attention=Attention(heads=16, kv_heads=8), mlp=mlp)
    return Model(name="mixtral", hidden=2048, vocab=32000, layers=[group])


def _qwen(layers: int) -> Model:
    """Many small experts and a shared one behind a gate: layers of Qwen1.5-MoE-A2.7B with 64 experts."""
    mlp = Mlp(kind="gated", width=1408, experts=64, top_k=4, shared_width=5632, shared_gate=True)
    group = LayerGroup(count=layers, attention=Attention(heads=16, kv_heads=16), mlp=mlp)
    return Model(name="qwen", hidden=2048, vocab=151936, layers=[group])


def _deepseek(layers: int) -> Model:
    """Latent attention, one dense layer, then experts beside a shared one: DeepSeek-V2 Lite."""
    attention = Attention(kind="latent", heads=16, head_dim=192, rope_dim=64, v_head_dim=128, kv_lora_rank=512)
    routed = Mlp(kind="gated", width=1408, experts=64, top_k=6, shared_width=2816)
    groups = [
        LayerGroup(count=1, attention=attention, mlp=Mlp(kind="gated", width=10944)),
        LayerGroup(count=layers - 1, attention=attention, mlp=routed),
    ]
    return Model(name="deepseek", hidden=2048, vocab=102400, layers=groups)


def _wide(layers: int) -> Model:
    """A vocabulary beside which layers are small: the loss decides."""
    group = LayerGroup(count=layers, attention=Attention(heads=16, kv_heads=4), mlp=Mlp(kind="gated", width=1024))
    return Model(name="wide", hidden=2048, vocab=128256, layers=[group])


def _cases() -> dict[str, Plan]:
    found: dict[str, Plan] = {}

    def add(name: str, model: Model, **options: Any) -> None:
        found[name] = plans.plan(model, **{"precision": "bf16", "seq_len": 4096, "micro_batch": 1, **options})

    _add_dense(add)
    _add_experts(add)
    _add_pieces(add)
    return found


def _add_experts(add: Callable[..., None]) -> None:
    for zero in range(4):
        add(f"moe-dp4-zero{zero}", _mixtral(3), dp=4, zero=zero, global_batch=8)
        add(f"moe-dp8-ep4-zero{zero}", _mixtral(3), dp=8, ep=4, zero=zero, global_batch=16)
        add(f"moe-pp2-dp4-ep2-zero{zero}", _mixtral(6), pp=2, dp=4, ep=2, zero=zero, recompute="full", global_batch=16)
        recompute = ("none", "selective", "full", "selective")[zero]
        add(f"shared-dp4-ep4-zero{zero}", _qwen(3), dp=4, ep=4, zero=zero, recompute=recompute, global_batch=8)
    add("moe-dp8-ep8-zero3-m1", _mixtral(3), dp=8, ep=8, zero=3, recompute="full", global_batch=8)
    add("moe-tp2-dp4-zero2", _mixtral(3), tp=2, dp=4, zero=2, global_batch=8)
    add("moe-tp2-dp4-zero2-full", _mixtral(3), tp=2, dp=4, zero=2, recompute="full", global_batch=8)
    add("moe-tp2-dp4-zero2-m3", _mixtral(3), tp=2, dp=4, zero=2, global_batch=12)
    add("moe-tp2-dp16-zero2", _mixtral(6), tp=2, dp=16, zero=2, global_batch=32)
    add("moe-tp2-dp2-ep2-zero3", _mixtral(3), tp=2, dp=2, ep=2, zero=3, global_batch=4)
    add("moe-tp2-dp2-ep2-zero3-full", _mixtral(3), tp=2, dp=2, ep=2, zero=3, recompute="full", global_batch=4)
    add("moe-tp2-dp2-etp2-zero1", _mixtral(3), tp=2, dp=2, etp=2, zero=1, global_batch=4)
    add("moe-dp8-ep2-etp2-zero3", _mixtral(3), dp=8, ep=2, etp=2, zero=3, recompute="full", global_batch=16)
    add("shared-tp2-dp4-ep8-zero3", _qwen(3), tp=2, dp=4, ep=8, zero=3, recompute="full", global_batch=8)
    add("latent-dp4-ep4-zero3", _deepseek(4), dp=4, ep=4, zero=3, recompute="full", global_batch=8)
    add("latent-pp2-dp2-ep2-zero2", _deepseek(6), pp=2, dp=2, ep=2, zero=2, global_batch=8)


def _add_pieces(add: Callable[..., None]) -> None:
    """The loss in pieces: one, and several. Full recompute: a dry run makes blocks as they are without the compiler."""
    for micro_batch in (1, 4):
        options: dict[str, Any] = {"engine": "bundled+compile", "recompute": "full", "micro_batch": micro_batch}
        n = f"b{micro_batch}"
        add(f"pieces-one-{n}", _wide(4), **options, global_batch=micro_batch)
        add(f"pieces-one-{n}-m2", _wide(4), **options, global_batch=2 * micro_batch)
        for zero in range(4):
            add(f"pieces-dp4-zero{zero}-{n}", _wide(4), dp=4, zero=zero, **options, global_batch=4 * micro_batch)
        add(f"pieces-dp4-zero2-{n}-m2", _wide(4), dp=4, zero=2, **options, global_batch=8 * micro_batch)
        add(f"pieces-dp4-zero3-{n}-m2", _wide(4), dp=4, zero=3, **options, global_batch=8 * micro_batch)
        add(f"pieces-tp2-{n}", _wide(4), tp=2, **options, global_batch=micro_batch)
        add(f"pieces-tp2-dp2-zero3-{n}", _wide(4), tp=2, dp=2, zero=3, **options, global_batch=2 * micro_batch)
        add(f"pieces-pp2-{n}", _wide(4), pp=2, **options, global_batch=4 * micro_batch)
        add(f"pieces-pp2-dp2-zero2-{n}", _wide(4), pp=2, dp=2, zero=2, **options, global_batch=8 * micro_batch)


def _add_dense(add: Callable[..., None]) -> None:
    for zero in range(4):
        for recompute in ("none", "full"):
            for m in (1, 3):
                name = f"dp8-zero{zero}-{recompute}-m{m}"
                add(name, _llama(4), dp=8, zero=zero, recompute=recompute, global_batch=8 * m)
        for recompute in ("none", "selective", "full"):
            name = f"tp2-dp4-zero{zero}-{recompute}"
            add(name, _llama(3), tp=2, dp=4, zero=zero, recompute=recompute, global_batch=8)
        for recompute in ("none", "full"):
            name = f"pp4-dp4-zero{zero}-{recompute}"
            add(name, _llama(12), pp=4, dp=4, zero=zero, recompute=recompute, global_batch=24)
        add(f"gpt-dp4-zero{zero}", _gpt(4), dp=4, zero=zero, recompute="selective", global_batch=8, seq_len=2048)
        add(f"pp2-tp2-dp2-zero{zero}", _llama(6), pp=2, tp=2, dp=2, zero=zero, global_batch=8)
        name = f"gpt-pp2-tp2-dp2-zero{zero}"
        add(name, _gpt(8), pp=2, tp=2, dp=2, zero=zero, global_batch=8, seq_len=2048)
        add(f"pp4-dp4-zero{zero}-selective", _llama(12), pp=4, dp=4, zero=zero, recompute="selective", global_batch=24)
        for m in (1, 3):  # few tokens: units in reduction decide
            add(f"short-dp4-zero{zero}-m{m}", _llama(4), dp=4, zero=zero, seq_len=512, global_batch=4 * m)
    chunks: dict[str, Any] = {"schedule": "interleaved", "virtual_stages": 2}
    add("pp2-interleaved-zero2", _llama(8), pp=2, dp=2, zero=2, **chunks, global_batch=8)
    add("pp4-interleaved-zero3", _llama(16), pp=4, dp=2, zero=3, **chunks, recompute="full", global_batch=16)
    add("gpt-tp4-zero3", _gpt(4), tp=4, dp=2, zero=3, global_batch=4, seq_len=2048, recompute="full")
    for recompute in ("none", "selective", "full"):
        add(f"tp4-{recompute}", _llama(4), tp=4, recompute=recompute, global_batch=2)
        add(f"pp2-gpipe-{recompute}", _llama(6), pp=2, schedule="gpipe", recompute=recompute, global_batch=4)
        interleaved: dict[str, Any] = {"schedule": "interleaved", "virtual_stages": 2}
        add(f"pp2-interleaved-{recompute}", _llama(8), pp=2, **interleaved, recompute=recompute, global_batch=4)
    for m in (1, 3):  # without data parallelism: masters beside bf16 parameters
        add(f"one-m{m}", _llama(4), global_batch=m)
        add(f"one-short-m{m}", _llama(4), seq_len=512, global_batch=m)
    add("pp2-short", _llama(6), pp=2, seq_len=512, global_batch=4)
    add("pp2-tp2", _llama(6), pp=2, tp=2, global_batch=4)
    add("one-bf16-states", _llama(4), engine="bundled+bf16-states", global_batch=3)
    add("pp2-bf16-states", _llama(6), pp=2, engine="bundled+bf16-states", global_batch=4)
    add("dp2-products", _llama(4), dp=2, zero=3, engine="bundled+selective-products", recompute="selective", global_batch=2)
    for context in ("default", "ring"):
        for cp in (2, 4):
            options: dict[str, Any] = {"cp": cp, "context": context}
            for recompute in ("none", "selective", "full"):
                add(f"cp{cp}-{context}-{recompute}", _llama(4), **options, zero=3, recompute=recompute, global_batch=2)
        add(f"cp2-tp2-{context}", _llama(4), cp=2, tp=2, zero=1, context=context, global_batch=2)
        add(f"pp2-cp2-dp2-{context}", _llama(6), pp=2, cp=2, dp=2, zero=2, context=context, recompute="full", global_batch=8)
    add("tp8-gpt", _gpt(4), tp=8, global_batch=2, seq_len=2048)
    add("one", _llama(4), global_batch=2)
    add("fp32-one", _llama(2), precision="fp32", global_batch=2)
    add("fp32-dp4-zero2", _llama(2), precision="fp32", dp=4, zero=2, global_batch=8)


CASES = _cases()
QUICK = ("dp8-zero3-full-m3", "tp2-dp4-zero1-selective", "pp4-dp4-zero2-full", "moe-dp4-zero1")
"""For the default tier."""


def task_of(plan: Plan) -> Task:
    """The plan's costs, without what the device's libraries take."""
    return Task(plan.model, plan.job, NO_WORKSPACE, plan.cluster.gpus, engine_named(plan.engine).accounting)


def predicted_gib(plan: Plan, stage: int) -> float:
    """Peak allocated GiB of a pipeline rank."""
    return estimate_layout(task_of(plan), plan.layout).memory.stages[stage].allocated


def predicted_calls(plan: Plan, stage: int) -> Counter[tuple[str, str]]:
    """Collectives of a step of one rank, by group and operation."""
    found: Counter[tuple[str, str]] = Counter()
    for c in collectives_of(case_of(task_of(plan), plan, stage)):
        found[c.group, c.op] += round(c.calls)
    return found


def stepped_calls(report: RankReport) -> Counter[tuple[str, str]]:
    """The same of a dry run, without those of scalars and norm weights; a send and its receive are one."""
    found: Counter[tuple[str, str]] = Counter()
    for c in report.collectives:
        if not c.small and c.op != "receive":
            found[c.group, "send and receive" if c.op == "send" else c.op] += c.count
    return found
