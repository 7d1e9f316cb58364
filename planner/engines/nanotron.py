"""nanotron: ZeRO 0 and 1 with an fp32 gradient accumulator, tensor parallelism in reduce-scatter mode, stages cut by cost."""

from __future__ import annotations

from dataclasses import replace

from planner.cost.accounting import COMPUTE, EAGER_KERNELS, TP_CALL, Held, Saved, Traffic, ZeroRule
from planner.engines import megatron
from planner.engines.base import Engine
from planner.engines.predicates import gpipe, kv_heads_divisible, unsupported_layers
from planner.engines.rule import Rule

RULES: tuple[Rule, ...] = (
    Rule(
        "PLN550", "nanotron: kv heads % tp",
        kv_heads_divisible,
        "tp {tp} does not divide the {kv_heads} key/value heads",
        "key/value heads are split and not replicated",
        "choose tp from the divisors of {kv_heads}",
    ),
    Rule(
        "PLN551", "nanotron: zero <= 1",
        lambda t, x: x.zero > 1,
        "zero {zero}",
        "it shards optimizer states only",
        "set zero: 0 or 1",
    ),
    Rule(
        "PLN552", "nanotron: 1F1B only",
        lambda t, x: gpipe(t, x) | (x.virtual_stages > 1),
        "schedule {schedule}",
        "its pipeline engine runs 1F1B without virtual stages in this accounting",
        "set schedule: 1f1b",
    ),
    Rule(
        "PLN553", "nanotron: no cp",
        lambda t, x: x.cp > 1,
        "cp {cp}",
        "context parallelism is not part of this accounting",
        "set cp: 1",
    ),
    Rule(
        "PLN554", "nanotron: experts and latent attention",
        unsupported_layers,
        "{model} has routed experts or latent attention",
        "this accounting of nanotron has neither",
        "use megatron or torchtitan",
        whole_job=True,
    ),
)  # fmt: skip

# bf16 parameters and gradients, and an fp32 accumulator; fp32 master and Adam moments, sharded with ZeRO 1.
_WHOLE = (Held("params", COMPUTE, shard=False), Held("grads", COMPUTE, shard=False), Held("grads", 4, shard=False))
ZERO = {
    0: ZeroRule(
        backward=(*_WHOLE, Held("optimizer", 12, shard=False)),
        update=(*_WHOLE, Held("optimizer", 12, shard=False)),
        traffic=(Traffic("all_reduce", 4, "step", "backward"),),
    ),
    1: ZeroRule(
        backward=(*_WHOLE, Held("optimizer", 12, shard=True)),
        update=(*_WHOLE, Held("optimizer", 12, shard=True)),
        traffic=(Traffic("reduce_scatter", 4, "step", "backward"), Traffic("all_gather", COMPUTE, "step", "nothing")),
    ),
}

SAVED = (
    Saved("norms, residuals, projections", "hidden", 9, "sequence"),
    Saved("whole inputs", "hidden", 3, "none"),
    Saved("layer input", "hidden", 1, "sequence", kept=("selective", "full")),
    Saved("gate, up, product, half of silu", "mlp", 3.5, "tensor", only=("gated",)),
    Saved("gelu input, output", "mlp", 2, "tensor", only=("gelu",)),
)

ACCOUNTING = replace(
    megatron.ACCOUNTING,
    name="nanotron",
    saved=SAVED,
    zero=ZERO,
    # Norms are fused (TritonRMSNorm), the gated activation is not.
    recomputed={
        "selective": {"attention": 1.0},
        "full": {"gemm": 1.0, "attention": 1.0, "elementwise": 1.0},
    },
    logit_bytes=12.0,
    loss_traffic=40.0,
    logits_wait=0.0,
    attention_rate=0.62,
    tp_overlap=0.5,
    dp_window=0.6,
    dp_floor=0.1,
    pp_exposed={"1f1b": 1.0},
    kernels_forward=EAGER_KERNELS[0],
    kernels_backward=EAGER_KERNELS[1],
    tp_call=TP_CALL,
    optimizer_bytes=50.0,
    reserved_ratio=1.05,
    balanced_stages=True,
    origin={
        "zero": "8 + 12 / D bytes a parameter: nanotron's fp32 gradient accumulation; a regression gives 9.2 + 11.4 / D",
        "saved": "24 h + 7 f bytes a token, 6 h of them on every rank: fitted on 146 runs of the ultra-scale playbook",
        "logit_bytes": "10 to 12 on the same runs",
        "kernels_forward": "assumed: as measured for the bundled runtime's eager layers",
    },
)

NANOTRON = Engine(
    name="nanotron",
    title="nanotron",
    rules=RULES,
    accounting=ACCOUNTING,
    zero_stages=(0, 1),
    schedules=("1f1b",),
    sequence_parallel=(0, 1),
    context_parallel=False,
)
