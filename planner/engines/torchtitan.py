"""torchtitan: FSDP2, DTensor tensor parallelism with sequence parallelism, torch pipelining, compiled layers.

And `fsdp1`, the FSDP of PyTorch 1.13 to 2.0 under Composer: flat parameters, reduction in the compute type.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from planner.cost.accounting import COMPUTE, EAGER_KERNELS, Accounting, Held, Saved, TpTraffic, Traffic, ZeroRule
from planner.engines import bundled, megatron, sharding
from planner.engines.base import Engine
from planner.engines.fsdp2 import ZERO
from planner.engines.predicates import kv_heads_divisible, unsupported_layers
from planner.engines.rule import Rule

RULES: tuple[Rule, ...] = (
    Rule(
        "PLN540", "torchtitan: kv heads % tp",
        kv_heads_divisible,
        "tp {tp} does not divide the {kv_heads} key/value heads",
        "DTensor splits key/value heads and does not replicate them",
        "choose tp from the divisors of {kv_heads}",
        on="degrees",
    ),
    Rule(
        "PLN541", "torchtitan: zero >= 2",
        lambda t, x: (x.zero < 2) & (x.data > 1),
        "zero {zero} with dp x cp {shard}",
        "fully_shard reduces gradients into shards in every backward; it keeps parameters gathered (2) or not (3)",
        "set zero: 2 or 3",
    ),
    Rule(
        "PLN542", "torchtitan: sequence parallel with tp",
        lambda t, x: (x.tp > 1) & (x.sequence_parallel == 0),
        "tp {tp} without sequence_parallel",
        "its parallel plan always splits norms over the tp group",
        "set sequence_parallel: true",
    ),
    Rule(
        "PLN544", "torchtitan: etp 1 or tp",
        lambda t, x: (x.etp > 1) & (x.etp != x.tp),
        "etp {etp} with tp {tp}",
        "torchtitan splits an expert over the whole tp group, or not at all",
        "set etp: 1, or etp: {tp}",
        on="degrees",
    ),
    Rule(
        "PLN543", "torchtitan: tied embeddings x pp",
        lambda t, x: (x.pp > 1) & t.model.tied_embeddings,
        "pp {pp} with tied embeddings",
        "torch pipelining cannot share one parameter between two stages",
        "set pp: 1, or tied_embeddings: false in the model",
    ),
)  # fmt: skip

# Per-operator selective recompute keeps attention and every second product: 62 KiB a token of an 8B layer.
_SELECTIVE = ("none", "selective")
SAVED = (
    Saved("norm inputs", "hidden", 2, "sequence"),
    Saved("layer input, products kept", "hidden", 2, "sequence", kept=("selective",)),
    Saved("layer input", "hidden", 1, "sequence", kept=("full",)),
    Saved("norm outputs", "hidden", 2, "none"),
    Saved("query", "q", 1, "tensor", kept=_SELECTIVE),
    Saved("key, value", "kv", 2, "tensor"),
    Saved("key or value", "kv", 1, "tensor", kept=("selective",)),
    Saved("attention output", "q", 1, "tensor", kept=_SELECTIVE),
    Saved("log-sum-exp", "heads", 1, "tensor", size=4, kept=_SELECTIVE),
    Saved("gate, up, product", "mlp", 3, "tensor", only=("gated",)),
    Saved("gate or up", "mlp", 1, "tensor", only=("gated",), kept=("selective",)),
    Saved("gelu input, output", "mlp", 2, "tensor", only=("gelu",)),
    Saved("routed inputs, outputs", "routed", 2, "sequence"),
    Saved("routed inputs", "routed", 1, "sequence", kept=("selective",)),
    Saved("experts' gate, up, product", "routed_mlp", 3, "sequence"),
    Saved("experts' gate or up", "routed_mlp", 1, "sequence", kept=("selective",)),
)

DEFERRED = (
    *bundled.DEFERRED,
    Saved("of latent queries", "q_latent", 1, "none", only=("latent",)),
    Saved("of latent keys, values", "kv_latent", 1, "none", only=("latent",)),
    Saved("of experts' outputs", "routed", 1, "sequence"),
    Saved("of experts' gate, up", "routed_mlp", 2, "sequence"),
    Saved("of the router", "experts", 1, "sequence", size=4),
)

# Sharded gradients appear after the allocated peak, but stay in the allocator's pool: its reserved figure holds them.
_POOLED = Held("grads", 4, shard=True, when="single")
_ZERO = {k: replace(rule, backward=(*rule.backward, _POOLED)) if k >= 2 else rule for k, rule in ZERO.items()}

# Its constants are fitted to published runs, which have these in them.
_INSIDE = (
    "product_times", "gather_copies", "reduce_copies", "whole_sums", "tp_copies", "kernels_narrow", "loss_traffic_split",
    "step_floor", "ring_rate",
)  # fmt: skip
_FITTED: dict[str, Any] = {f.name: f.default for f in fields(Accounting) if f.name in _INSIDE}

ACCOUNTING = replace(
    bundled.ACCOUNTING,
    **_FITTED,
    name="torchtitan",
    ring_merge=((33.0, 4.0), (12.0, 25.0)),
    saved=SAVED,
    deferred=DEFERRED,
    zero=_ZERO,
    ends_exchanged=False,
    positions_split=False,
    tp_sequence=TpTraffic(
        forward={"all_gather": 2, "reduce_scatter": 2},
        backward={"all_gather": 4, "reduce_scatter": 2},
        recompute={"selective": {"all_gather": 2, "reduce_scatter": 0}, "full": {"all_gather": 2, "reduce_scatter": 1}},
    ),
    # Compiled layers fuse norms and activations like Megatron's hand-written kernels.
    elementwise_forward=megatron.ACCOUNTING.elementwise_forward,
    elementwise_backward=megatron.ACCOUNTING.elementwise_backward,
    recomputed={
        "selective": {"gemm": 0.5, "attention": 0.0, "elementwise": 1.0, "experts": 0.5},
        "full": {"gemm": 1.0, "attention": 1.0, "elementwise": 1.0, "experts": 1.0},
    },
    logit_bytes=14.0,
    loss_traffic=40.0,
    kernels_forward=60,
    kernels_backward=80,
    kernels_tp=(40, 60),
    kernels_gather=(0, 0),
    dp_window=0.9,
    dp_floor=0.05,
    optimizer_bytes=40.0,
    reserved_ratio=1.035,
    pipeline_zero=2,
    context="ring",
    windows=True,
    # NCCL sends, gathers and reduces.
    symmetric_sends=False,
    engine_copies=(0.0, 0.0),
    mask_elements=0.0,
    origin={
        "pipeline_zero": "torchtitan's reshard_after_forward: default keeps parameters gathered under a pipeline",
        "deferred": "counted like those of the bundled runtime's layers",
        "saved": "62 KiB a token and 8B layer under per-operator selective recompute, counted on the bundled runtime's block",
        "zero": "FSDP2 as in the bundled runtime",
        "ring_merge": "counted from torch's template: five passes in fp32 over an output, three over a gradient; not measured",
        "kernels_forward": "assumed: 300 and 400 us a layer",
        "optimizer_bytes": "28 measured for fused AdamW on H200; 12 counted for norm, clip and the sharded copy",
        "reserved_ratio": "1.02 to 1.05 compiled, 1.10 eager, on torchtitan's published runs",
    },
)

TORCHTITAN = Engine(
    name="torchtitan",
    title="torchtitan (FSDP2)",
    rules=RULES,
    accounting=ACCOUNTING,
    zero_stages=(2, 3),
    schedules=("gpipe", "1f1b", "interleaved"),
    schedules_note="; torch cannot split the backward of compiled layers: engine torchtitan+eager runs the zero-bubble ones",
    sequence_parallel=(1,),
    context_parallel=True,
    expert_parallel=True,
    hybrid_sharding=True,  # data_parallel_replicate_degree
    unequal_chunks=True,
)

_MASTER = (Held("params", 4, shard=True), Held("optimizer", 8, shard=True))
_GRADS = (Held("grads", 4, shard=True),)
_REDUCE = (Held("grads", COMPUTE, shard=False),)
FSDP1_ZERO = {
    0: ZERO[0],
    1: ZERO[1],
    2: ZeroRule(
        backward=(*_MASTER, *_GRADS, Held("params", COMPUTE, shard=False)),
        update=(*_MASTER, *_GRADS),
        traffic=(
            Traffic("all_gather", COMPUTE, "step", "forward"),
            Traffic("reduce_scatter", COMPUTE, "microbatch", "backward"),
        ),
        unit=_REDUCE,
        head=_REDUCE,
    ),
    3: ZeroRule(
        backward=(*_MASTER, *_GRADS),
        update=(*_MASTER, *_GRADS),
        traffic=sharding.GATHER_AND_REDUCE,
        unit=sharding.UNIT,
        head=sharding.HEAD,
    ),
}

FSDP1_ACCOUNTING = replace(
    ACCOUNTING,
    name="fsdp1",
    zero=FSDP1_ZERO,
    logit_bytes=6.0,
    loss_traffic=24.0,
    attention_rate=0.71,
    kernels_forward=EAGER_KERNELS[0],
    kernels_backward=EAGER_KERNELS[1],
    dp_window=0.7,
    dp_floor=0.25,
    reserved_ratio=1.07,
    origin={
        "zero": "FSDP with mixed precision: gathers and reductions in the compute type",
        "logit_bytes": "llm-foundry's fused cross-entropy: none of its 111 published runs exceeds memory at 6",
        "dp_floor": "a quarter of FSDP traffic stays exposed even where it would fit: fitted on llm-foundry's runs",
    },
)

FSDP1 = Engine(
    name="fsdp1",
    title="PyTorch FSDP (Composer)",
    rules=(
        Rule(
            "PLN545", "fsdp1: data parallel only",
            lambda t, x: (x.tp > 1) | (x.pp > 1) | (x.cp > 1),
            "tp {tp}, pp {pp}, cp {cp}",
            "FSDP alone shards over data-parallel ranks",
            "set tp, pp and cp to 1",
        ),
        Rule(
            "PLN546", "fsdp1: experts and latent attention",
            unsupported_layers,
            "{model} has routed experts or latent attention",
            "this accounting of fsdp1 has neither",
            "use megatron or torchtitan",
            whole_job=True,
        ),
    ),
    accounting=FSDP1_ACCOUNTING,
    zero_stages=(2, 3),
    schedules=(),
    sequence_parallel=(0,),
    context_parallel=False,
)  # fmt: skip
