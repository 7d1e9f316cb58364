"""DeepSpeed: ZeRO 0 to 3 in 16 bits, alone or under Megatron-DeepSpeed's tensor and pipeline parallelism."""

from __future__ import annotations

from dataclasses import replace

from planner.cost.accounting import COMPUTE, EAGER_KERNELS, TP_CALL, Held, Saved, TpTraffic, Traffic, ZeroRule
from planner.engines import megatron, sharding
from planner.engines.base import Engine
from planner.engines.predicates import gpipe, kv_heads_replicable, unsupported_layers
from planner.engines.rule import Rule

RULES: tuple[Rule, ...] = (
    Rule(
        "PLN530", "deepspeed: kv heads and tp",
        kv_heads_replicable,
        "tp {tp} and {kv_heads} key/value heads: neither divides the other",
        "key/value heads are split or replicated whole",
        "choose tp from the divisors or multiples of {kv_heads}",
    ),
    Rule(
        "PLN531", "deepspeed: pipeline with zero <= 1",
        lambda t, x: (x.pp > 1) & (x.zero > 1),
        "zero {zero} with pp {pp}",
        "DeepSpeed's pipeline engine accumulates gradients: it shards optimizer states only",
        "set zero: 0 or 1, or pp: 1",
    ),
    Rule(
        "PLN532", "deepspeed: 1F1B only",
        lambda t, x: gpipe(t, x) | (x.virtual_stages > 1),
        "schedule {schedule}",
        "DeepSpeed's pipeline runs 1F1B",
        "set schedule: 1f1b",
    ),
    Rule(
        "PLN533", "deepspeed: no cp",
        lambda t, x: x.cp > 1,
        "cp {cp}",
        "Ulysses sequence parallelism is not part of this accounting",
        "set cp: 1",
    ),
    Rule(
        "PLN534", "deepspeed: experts and latent attention",
        unsupported_layers,
        "{model} has routed experts or latent attention",
        "this accounting of deepspeed has neither",
        "use megatron or torchtitan",
        whole_job=True,
    ),
)  # fmt: skip

_WHOLE = (Held("params", COMPUTE, shard=False), Held("grads", COMPUTE, shard=False))
_OWN = (Held("optimizer", 12, shard=True),)
_FP32_PARTITION = (Held("grads", 4, shard=True),)

ZERO = {
    0: ZeroRule(
        backward=(*_WHOLE, Held("optimizer", 12, shard=False)),
        update=(*_WHOLE, Held("optimizer", 12, shard=False)),
        traffic=(Traffic("all_reduce", COMPUTE, "step", "backward"),),
    ),
    1: ZeroRule(
        backward=(*_WHOLE, *_OWN),
        update=(*_WHOLE, *_OWN, *_FP32_PARTITION),
        traffic=(
            Traffic("reduce_scatter", COMPUTE, "step", "backward"),
            Traffic("all_gather", COMPUTE, "step", "forward"),
        ),
    ),
    2: ZeroRule(
        backward=(Held("params", COMPUTE, shard=False), Held("grads", COMPUTE, shard=True), *_OWN),
        update=(Held("params", COMPUTE, shard=False), Held("grads", COMPUTE, shard=True), *_OWN, *_FP32_PARTITION),
        traffic=(
            Traffic("reduce_scatter", COMPUTE, "microbatch", "backward"),
            Traffic("all_gather", COMPUTE, "step", "forward"),
        ),
        unit=(Held("grads", COMPUTE, shard=False),),
        head=(Held("grads", COMPUTE, shard=False),),
    ),
    3: ZeroRule(
        backward=(Held("params", COMPUTE, shard=True), Held("grads", COMPUTE, shard=True), *_OWN),
        update=(Held("params", COMPUTE, shard=True), Held("grads", COMPUTE, shard=True), *_OWN, *_FP32_PARTITION),
        traffic=sharding.GATHER_AND_REDUCE,
        unit=sharding.UNIT,
        head=sharding.HEAD,
    ),
}

SAVED = (
    Saved("norm inputs, outputs", "hidden", 4, "sequence", feeds=(("attention", 1), ("mlp", 1))),
    # Without sequence parallelism the outputs of row-parallel products stay whole on every rank.
    Saved("row-parallel outputs", "hidden", 2, "none", only=("not_gathered",)),
    # With it the gathered inputs of the first products do.
    Saved("gathered inputs", "hidden", 2, "none", only=("gathered",)),
    Saved("layer input", "hidden", 1, "sequence", kept=("selective", "full")),
    Saved("query, attention output", "q", 2, "tensor"),
    Saved("key, value", "kv", 2, "tensor"),
    Saved("log-sum-exp", "heads", 1, "tensor", size=4),
    Saved("gate, up, silu, product", "mlp", 4, "tensor", only=("gated",), feeds=(("mlp", 1),)),
    Saved("gelu input, output", "mlp", 2, "tensor", only=("gelu",), feeds=(("mlp", 1),)),
)

ACCOUNTING = replace(
    megatron.ACCOUNTING,
    name="deepspeed",
    saved=SAVED,
    zero=ZERO,
    tp_plain=TpTraffic(
        forward={"all_reduce": 2},
        backward={"all_reduce": 2},
        recompute={"selective": {"all_reduce": 2}, "full": {"all_reduce": 2}},
    ),
    recomputed={
        "selective": {"gemm": 1.0, "attention": 1.0, "elementwise": 1.0},
        "full": {"gemm": 1.0, "attention": 1.0, "elementwise": 1.0},
    },
    logit_bytes=14.0,
    loss_traffic=48.0,
    tp_overlap=0.0,
    dp_window=0.3,
    dp_floor=0.3,
    pp_exposed={"1f1b": 1.0},
    pp_split=True,
    keeps_stage_output=True,
    kernels_forward=EAGER_KERNELS[0],
    kernels_backward=EAGER_KERNELS[1],
    tp_call=TP_CALL,
    optimizer_bytes=50.0,
    reserved_ratio=1.05,
    origin={
        "zero": "DeepSpeed's buffers: 16-bit parameters and gradients, fp32 master and moments sharded (Rajbhandari 2020)",
        "saved": "Korthikanti 2022 with flash attention; row-parallel outputs from out-of-memory labels of arXiv 2311.05610",
        "logit_bytes": "eager cross-entropy: logits and three fp32 tensors of their size",
        "kernels_forward": "assumed: as measured for the bundled runtime's eager layers",
        "dp_window": "assumed: reduction in buckets beside the last backward",
    },
)

DEEPSPEED = Engine(
    name="deepspeed",
    title="DeepSpeed / Megatron-DeepSpeed",
    rules=RULES,
    accounting=ACCOUNTING,
    zero_stages=(0, 1, 2, 3),
    schedules=("1f1b",),
    sequence_parallel=(0,),
    context_parallel=False,
    offloads=("none", "optimizer"),  # zero_optimization.offload_optimizer, with ZeRO
)
