"""Megatron-Core with Transformer Engine: distributed optimizer, fused cross-entropy, flash attention.

Memory follows measured peaks of Megatron on B200 (SimuMax's published runs) within one percent; overlap shares are
those of current NVIDIA stacks.
"""

from __future__ import annotations

import numpy as np

from planner.cost.accounting import (
    COMPUTE,
    Accounting,
    Elementwise,
    Held,
    Saved,
    TpTraffic,
    Traffic,
    ZeroRule,
)
from planner.engines.base import Engine, Rule, gpipe, kv_heads_replicable, routed_without_sequence_parallel

RULES: tuple[Rule, ...] = (
    Rule(
        "PLN520", "megatron: kv heads and tp",
        kv_heads_replicable,
        "tp {tp} and {kv_heads} key/value heads: neither divides the other",
        "Megatron splits key/value heads or replicates them whole",
        "choose tp from the divisors or multiples of {kv_heads}",
        on="degrees",
    ),
    Rule(
        "PLN521", "megatron: zero <= 1",
        lambda t, x: x.zero > 1,
        "zero {zero}",
        "the distributed optimizer shards optimizer states only; stages 2 and 3 need Megatron-FSDP",
        "set zero: 0 or 1",
    ),
    Rule(
        "PLN522", "megatron: gpipe",
        gpipe,
        "schedule gpipe",
        "Megatron runs 1F1B, plain or interleaved",
        "set schedule: 1f1b",
    ),
    Rule(
        "PLN523", "megatron: interleaved pp 2",
        lambda t, x: (x.virtual_stages > 1) & (x.pp == 2),
        "interleaved with pp 2",
        "Megatron requires pp > 2 for it when point-to-point traffic is not overlapped",
        "use 1f1b, or pp of 4 or more",
    ),
    Rule(
        "PLN525", "megatron: rank order and experts",
        lambda t, x: (x.order == 1) & (x.pp > 1) & (np.where(bool(t.model.routed_mlps), x.ep * x.etp, x.tp) != x.tp * x.cp),
        "order {order} with tp {tp}, cp {cp}, ep {ep}, etp {etp}",
        "unless pp is outermost, Megatron-Core wants the same data-parallel size for experts and the rest (parallel_state): "
        "ep x etp = tp x cp, or cp 1 without experts",
        "leave out order, or choose such degrees",
        on="degrees",
    ),
    Rule(
        "PLN524", "megatron: experts with tp",
        routed_without_sequence_parallel,
        "tp {tp} without sequence_parallel on a model with experts",
        "every tensor-parallel rank would route the same tokens",
        "set sequence_parallel: true",
    ),
)  # fmt: skip

_FULL = (Held("params", COMPUTE, shard=False), Held("grads", 4, shard=False))
# Transformer Engine keeps one weight-gradient buffer for each distinct weight shape: about one layer's weights.
_DUMMY = (Held("grads", COMPUTE, shard=False),)

ZERO = {
    0: ZeroRule(
        backward=(*_FULL, Held("optimizer", 12, shard=False)),
        update=(*_FULL, Held("optimizer", 12, shard=False)),
        traffic=(Traffic("all_reduce", 4, "step", "backward"),),
        resident=_DUMMY,
    ),
    1: ZeroRule(
        backward=(*_FULL, Held("optimizer", 12, shard=True)),
        update=(*_FULL, Held("optimizer", 12, shard=True)),
        traffic=(Traffic("reduce_scatter", 4, "step", "backward"), Traffic("all_gather", COMPUTE, "step", "forward")),
        resident=_DUMMY,
    ),
}

_KEPT = ("none", "selective")
SAVED = (
    Saved("norm inputs, outputs", "hidden", 4, "sequence", kept=_KEPT, only=("wide",), feeds=(("attention", 1), ("mlp", 1))),
    # With narrow products their inputs are kept in one byte: both norm outputs, and the attention output beside it.
    Saved("norm inputs", "hidden", 2, "sequence", kept=_KEPT, only=("narrow",)),
    Saved(
        "narrow norm outputs",
        "hidden",
        2,
        "sequence",
        size=1,
        kept=_KEPT,
        only=("narrow",),
        feeds=(("attention", 1), ("mlp", 1)),
    ),
    Saved("narrow attention output", "v", 1, "tensor", size=1, kept=_KEPT, only=("narrow",), feeds=(("attention", 1),)),
    Saved("layer input", "hidden", 1, "sequence", kept=("full",)),
    Saved("query", "q", 1, "tensor", kept=_KEPT),
    Saved("key, value", "kv", 2, "tensor", kept=_KEPT, only=("softmax",)),
    Saved("key", "q", 1, "tensor", kept=_KEPT, only=("latent",)),
    Saved("value", "v", 1, "tensor", kept=_KEPT, only=("latent",)),
    Saved("attention output", "v", 1, "tensor", kept=_KEPT),
    Saved("query latent, normed", "q_latent", 2, "sequence", kept=_KEPT, only=("latent",), feeds=(("attention", 1),)),
    Saved("key/value latent, normed", "kv_latent", 2, "sequence", kept=_KEPT, only=("latent",), feeds=(("attention", 1),)),
    Saved("log-sum-exp", "heads", 1, "tensor", size=4),
    Saved("gate, up", "mlp", 2, "tensor", only=("gated",), kept=_KEPT),
    Saved("product", "mlp", 1, "tensor", only=("gated", "wide"), kept=_KEPT, feeds=(("mlp", 1),)),
    Saved("narrow product", "mlp", 1, "tensor", size=1, only=("gated", "narrow"), kept=_KEPT, feeds=(("mlp", 1),)),
    Saved("gelu input, output", "mlp", 2, "tensor", only=("gelu",), kept=_KEPT, feeds=(("mlp", 1),)),
    Saved("router logits", "experts", 1, "sequence", size=4, kept=_KEPT),
    Saved("routed inputs, outputs", "routed", 2, "sequence", kept=_KEPT, feeds=(("experts", 1),)),
    Saved("experts' gate, up, product", "routed_mlp", 3, "sequence", only=("gated",), kept=_KEPT, feeds=(("experts", 1),)),
    Saved("experts' gelu input, output", "routed_mlp", 2, "sequence", only=("gelu",), kept=_KEPT, feeds=(("experts", 1),)),
)

ACCOUNTING = Accounting(
    name="megatron",
    saved=SAVED,
    zero=ZERO,
    tp_sequence=TpTraffic(
        forward={"all_gather": 2, "reduce_scatter": 2},
        backward={"all_gather": 4, "reduce_scatter": 2},
        recompute={"selective": {}, "full": {"all_gather": 2, "reduce_scatter": 2}},
    ),
    tp_plain=TpTraffic(
        forward={"all_reduce": 2}, backward={"all_reduce": 2}, recompute={"selective": {}, "full": {"all_reduce": 2}}
    ),
    elementwise_forward={"gelu": Elementwise(36, 5, 12, 0), "gated": Elementwise(25, 6.6, 10, 10)},
    elementwise_backward={"gelu": Elementwise(46, 6.6, 12, 0), "gated": Elementwise(40, 10.7, 16, 16)},
    # Selective is Megatron's core attention: with flash attention it repeats the kernel and saves its statistics only.
    recomputed={
        "selective": {"attention": 1.0},
        "full": {"gemm": 1.0, "attention": 1.0, "elementwise": 1.0, "experts": 1.0},
    },
    logit_bytes=2.0,
    logit_bytes_fp32=4.0,
    logits_split=True,
    logit_bytes_split=0.0,
    pipeline_logits=0.0,
    logits_wait=0.0,
    embedding_gradient_whole=False,
    head_hidden=2.0,
    head_gathered=1.0,
    loss_traffic=16.0,
    backward_mlp=3.0,
    backward_hidden=2.0,
    receive_all_microbatches=False,
    receive_count=1,
    keeps_stage_output=False,
    pp_exposed={"1f1b": 1.0, "interleaved": 0.3},
    pp_slot=50e-6,
    tp_overlap=0.8,
    dp_window=0.6,
    dp_floor=0.05,
    kernels_forward=80,
    kernels_backward=110,
    kernels_tp=(0, 0),
    kernels_expert=(25, 50),
    padding_bytes=8.0,
    kernels_gather=(0, 0),
    optimizer_bytes=36.0,
    optimizer_whole_bytes=6.0,
    step_seconds=5e-3,
    reserved_ratio=1.035,
    origin={
        "saved": "Korthikanti 2022 with flash attention and fused SwiGLU; B200 peaks within 0.6 %",
        "zero": "Megatron-Core documentation: 6 + 12 / D bytes a parameter; dummy weight-gradient buffers from B200 peaks",
        "elementwise_forward": "counted, times what real kernels take over the time of their bytes, measured on H200 (torch "
        "2.11): norms 1.4 to 2.2, bias-dropout-add 2 to 4, rotary 1.1 forward and 2 to 4 backward, activations 1.0 to 1.25",
        "logit_bytes": "fused cross-entropy works in place on bf16 logits",
        "tp_overlap": "fitted on published runs of current NVIDIA stacks",
        "kernels_expert": "grouped linears of Transformer Engine loop over experts in Python: on published runs with 16 to 40 "
        "experts a rank 0.35 ms each for a layer on H100 and B200 hosts in bf16, 0.55 ms in fp8 without token drop",
        "padding_bytes": "counted: Fp8Padding and Fp8Unpadding around the experts (Megatron-Core, transformer/moe/experts.py) "
        "each read and write a row of h",
        "kernels_forward": "assumed: Transformer Engine layers launch fewer kernels than eager ones, each with more checks",
        "optimizer_bytes": "36 to 62 on published runs; the lower end",
        "reserved_ratio": "median 1.033 over 240 rank readings on B200",
    },
)

MEGATRON = Engine(
    name="megatron",
    title="Megatron-Core",
    rules=RULES,
    accounting=ACCOUNTING,
    zero_stages=(0, 1),
    schedules=("1f1b", "interleaved"),
    sequence_parallel=(0, 1),
    context_parallel=True,
    expert_parallel=True,
    unequal_chunks=True,
    offloads=("none", "optimizer"),  # --optimizer-cpu-offload
    rank_orders=("tp-cp-dp-pp", "tp-cp-pp-dp"),  # --use-tp-pp-dp-mapping
    device_types="one program on every rank; --pipeline-model-parallel-layout gives each stage its own number of layers",
)
