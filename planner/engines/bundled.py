"""The bundled runtime: PyTorch DeviceMesh, DTensor tensor parallelism, FSDP2, torch pipelining.

Byte counts were verified on the runtime itself with saved-tensor hooks and a storage meter; traffic by counting its
collectives. FSDP2 keeps fp32 masters and reduces gradients in fp32.
"""

from __future__ import annotations

import numpy as np

from planner.cost.accounting import (
    ALONE,
    COMPUTE,
    EAGER_KERNELS,
    Accounting,
    Elementwise,
    Held,
    Saved,
    TpTraffic,
    ZeroRule,
)
from planner.cost.task import splits_backward
from planner.engines.base import Engine
from planner.engines.fsdp2 import ENGINES, POOLING
from planner.engines.predicates import exchange_divisible, kv_heads_divisible, microbatches_below_pp
from planner.engines.rule import Rule
from planner.specs.features import features
from planner.specs.layers import Attention
from planner.specs.layout import SCHEDULES, SPLIT_BACKWARD


def _odd_latent(a: Attention) -> bool:
    return a.kind == "latent" and (a.qk_norm != "none" or a.output_gate or a.output_norm)


BUILT = (
    "routed experts",
    "latent attention",
    "sliding-window or chunked attention",
    "norms over the whole query",
    "norms after the sublayers",
    "parallel attention and MLP",
    "an uncommon activation",
    "several kinds of layers",
    "partial rotary positions",
    "a bias on the head",
    "norms without weights",
)
"""Features that the runtime builds (`specs.features`)."""

RULES: tuple[Rule, ...] = (
    Rule(
        "PLN510", "bundled: kv heads % tp",
        kv_heads_divisible,
        "tp {tp} does not divide the {kv_heads} key/value heads",
        "the runtime splits key/value heads and does not replicate them",
        "choose tp from the divisors of {kv_heads}",
        on="degrees",
    ),
    Rule(
        "PLN511", "bundled: 1F1B micro-batches >= pp",
        microbatches_below_pp,
        "1f1b runs {microbatches} micro-batches on pp {pp}",
        "torch's 1F1B needs at least as many micro-batches as stages, and hangs otherwise",
        "lower dp, micro_batch or pp, or use gpipe",
    ),
    Rule(
        "PLN512", "bundled: tied embeddings x pp",
        lambda t, x: (x.pp > 1) & t.model.tied_embeddings,
        "pp {pp} with tied embeddings",
        "torch pipelining cannot share one parameter between the first and the last stage: it would train two copies",
        "set pp: 1, or tied_embeddings: false in the model",
    ),
    Rule(
        "PLN513", "bundled: sequence parallel with tp",
        lambda t, x: (x.tp > 1) & (x.sequence_parallel == 0),
        "tp {tp} without sequence_parallel",
        "the runtime always splits norms and residuals over the tp group",
        "set sequence_parallel: true",
    ),
    Rule(
        "PLN514", "bundled: kv heads % (tp cp)",
        exchange_divisible,
        "cp {cp} x tp {tp} does not divide the {kv_heads} key/value heads",
        "context parallelism gives each rank the whole sequence of an equal share of a tp rank's heads",
        "choose cp x tp from the divisors of {kv_heads}, or set context: ring",
        on="degrees",
    ),
    Rule(
        "PLN567", "bundled: ring x windows",
        lambda t, x: (x.context == 1) & any(a.keys_of(t.job.seq_len) < t.job.seq_len for a in t.model.attentions),
        "context {context} on {model}, whose windows or chunks are shorter than the sequence",
        "torch's ring attention is causal over all keys: it takes no mask",
        "leave out context, or set cp: 1",
        on="degrees",
    ),
    Rule(
        "PLN518", "bundled: norms over the whole query x tp",
        lambda t, x: (x.tp > 1) & any(a.qk_norm == "width" for a in t.model.attentions),
        "tp {tp} with norms over the whole query",
        "each rank would norm over its own heads only",
        "set tp: 1",
        on="degrees",
    ),
    Rule(
        "PLN519", "bundled: fp4",
        lambda t, x: np.full(len(x), t.job.linears == "fp4"),
        "linears fp4",
        "torchao, which the runtime multiplies narrow types with, trains fp8 only",
        "set linears: fp8 or same, or use --engine megatron",
        whole_job=True,
    ),
    Rule(
        "PLN515", "bundled: fp8 x tp",
        lambda t, x: (x.tp > 1) & (t.job.linears == "fp8"),
        "tp {tp} with linears fp8",
        "scales of split matrices would be those of their pieces: results would depend on tp",
        "set tp: 1, or linears: same",
        on="degrees",
    ),
    Rule(
        "PLN517", "bundled: layers it builds",
        lambda t, x: np.full(len(x), not set(features(t.model)) <= set(BUILT)),
        "{model} has {features}",
        f"beyond plain decoders this version of the runtime builds {', '.join(BUILT)} only",
        "use another engine, such as --engine megatron",
        whole_job=True,
    ),
    Rule(
        "PLN591", "bundled: experts without biases",
        lambda t, x: np.full(len(x), any(m.bias for m in t.model.routed_mlps)),
        "{model} has biases inside its experts",
        "the runtime's grouped products have none",
        "use another engine, such as --engine megatron",
        whole_job=True,
    ),
    Rule(
        "PLN592", "bundled: plain latent attention",
        lambda t, x: np.full(len(x), any(_odd_latent(a) for a in t.model.attentions)),
        "{model} has gates, or norms over heads, in latent attention",
        "the runtime norms the latents only (DeepSeek-V2, arXiv 2405.04434)",
        "use another engine, such as --engine megatron",
        whole_job=True,
    ),
    Rule(
        "PLN594", "bundled: latent attention x cp",
        lambda t, x: (x.cp > 1) & any(a.kind == "latent" for a in t.model.attentions),
        "cp {cp} with latent attention",
        "this version of the runtime does not split the sequence of latent attention",
        "set cp: 1",
        on="degrees",
    ),
    Rule(
        "PLN597", "bundled: experts x split backward",
        lambda t, x: splits_backward(x.schedule) & bool(t.model.routed_mlps),
        "schedule {schedule} with routed experts",
        "their exchanges have one backward, which cannot be split into inputs and weights",
        "use 1f1b or interleaved",
        on="pipeline",
    ),
    Rule(
        "PLN595", "bundled: experts x offload",
        lambda t, x: (x.offload > 0) & bool(t.model.routed_mlps),
        "routed experts with offload {offload}",
        "experts are sharded over a mesh of their own, whose states stay on the device",
        "set offload: none",
    ),
)  # fmt: skip

SAVED = (
    Saved("norm inputs", "hidden", 2, "sequence"),
    Saved("norm inputs", "hidden", 1, "sequence", kept=("selective", "full")),
    Saved("rstd", "one", 2, "sequence", size=4, only=("rmsnorm",)),
    Saved("mean, rstd", "one", 4, "sequence", size=4, only=("layernorm",)),
    # With tp the gathered inputs of the first projections are saved, whole on every rank: of latent attention they are the
    # latents, and routed experts take a rank's own tokens.
    Saved("norm output", "hidden", 1, "none", only=("softmax",)),
    Saved("norm output, own tokens", "hidden", 1, "sequence", only=("latent",)),
    Saved("norm output", "hidden", 1, "none", only=("dense",)),
    Saved("norm output, own tokens", "hidden", 1, "sequence", only=("routed",)),
    Saved("gathered norm output", "hidden", 1, "none", only=("routed", "shared", "gathered")),
    Saved("query", "q", 1, "tensor"),
    Saved("key, value", "kv", 2, "tensor", only=("softmax",)),
    Saved("key", "q", 1, "tensor", only=("latent",)),
    Saved("value", "v", 1, "tensor", only=("latent",)),
    Saved("latents", "q_latent", 1, "sequence", only=("latent",)),
    Saved("normed latents", "q_latent", 1, "none", only=("latent",)),
    Saved("latents", "kv_latent", 1, "sequence", only=("latent",)),
    Saved("normed latents", "kv_latent", 1, "none", only=("latent",)),
    Saved("query, key before their norm", "q", 1, "tensor", only=("qk_norm",)),
    Saved("key before its norm", "kv", 1, "tensor", only=("qk_norm",)),
    Saved("attention output", "v", 1, "tensor", kept=("none", "selective")),
    Saved("attention output, own tokens of all heads", "q", 1, "tensor", only=("exchanged",)),
    Saved("log-sum-exp", "heads", 1, "tensor", size=4, kept=("none", "selective")),
    Saved("gate, up, silu, product", "mlp", 4, "tensor", only=("gated",)),
    Saved("gelu input, output", "mlp", 2, "tensor", only=("gelu",)),
    Saved("ungated output", "hidden", 1, "sequence", only=("shared_gate",)),
    # Scores in fp32, their experts in int64, and the row of each choice and the reverse in int32; and where rows are
    # exchanged the order of what arrived and the reverse.
    Saved("choices", "routes", 20, "sequence", size=1),
    Saved("orders of exchanged rows", "arrivals", 8, "sequence", size=1, only=("exchanged_rows",)),
    Saved("routed inputs", "routed", 1, "sequence"),
    Saved("experts' gate, up, silu, product", "routed_mlp", 4, "sequence", only=("gated",)),
    Saved("experts' gelu input, output", "routed_mlp", 2, "sequence", only=("gelu",)),
    Saved("experts' outputs", "returned", 1, "sequence"),
)

DEFERRED = (
    Saved("of norms", "hidden", 2, "sequence"),
    Saved("of attention and MLP outputs", "hidden", 2, "none"),
    Saved("of queries", "q", 1, "tensor"),
    Saved("of keys, values", "kv", 2, "tensor"),
    Saved("of normed queries", "q", 1, "tensor", only=("qk_norm",)),
    Saved("of normed keys", "kv", 1, "tensor", only=("qk_norm",)),
    Saved("of gate, up", "mlp", 2, "tensor", only=("gated",)),
    Saved("of up", "mlp", 1, "tensor", only=("gelu",)),
)
"""Gradients of what each matrix and norm puts out: kept, beside all activations, until weight gradients are computed."""

_LOWERED = ZeroRule(
    backward=(
        Held("params", 4, shard=False),
        Held("params", COMPUTE, shard=False),
        Held("optimizer", 8, shard=False),
        Held("grads", 4, shard=False, when="accumulating"),
    ),
    update=(
        Held("params", 4, shard=False),
        Held("params", COMPUTE, shard=False),
        Held("optimizer", 8, shard=False),
        Held("grads", 4, shard=False, when="accumulating"),
        Held("grads", COMPUTE, shard=False, when="single"),
    ),
    traffic=(),
    head_reduction=(Held("grads", COMPUTE, shard=False, when="single"),),
    own=(Held("grads", COMPUTE, shard=False),),
    finish=(Held("grads", COMPUTE, shard=False),),
)
"""Parameters in the compute type with fp32 masters beside; gradients in that type, added up in fp32."""

_TP = TpTraffic(
    forward={"all_gather": 2, "reduce_scatter": 2},
    backward={"all_gather": 2, "reduce_scatter": 2},
    recompute={"selective": {"all_gather": 2, "reduce_scatter": 1}, "full": {"all_gather": 2, "reduce_scatter": 1}},
    stops_early=True,
)

ACCOUNTING = Accounting(
    name="bundled",
    saved=SAVED,
    deferred=DEFERRED,
    zero={**POOLING, **ENGINES, ALONE: _LOWERED},
    tp_sequence=_TP,
    tp_plain=_TP,
    # Eager kernels: fused norms, residuals, and rotary positions in fp32, which pass over queries and keys many times.
    elementwise_forward={"gelu": Elementwise(29, 5.8, 58, 58, 28), "gated": Elementwise(29, 11.5, 58, 58, 28)},
    elementwise_backward={"gelu": Elementwise(46, 7.6, 64, 64, 51), "gated": Elementwise(46, 21, 64, 64, 51)},
    product_times=0.885,
    gather_copies=(13.9, 3.7),
    reduce_copies=(10.7, 9.7),
    engine_copies=(6.4, 4.0),
    whole_sums=8.1,
    tp_copies=(14.1, 4.3),
    kernels_narrow=(1500, 3000),
    recomputed={
        "selective": {"gemm": 1.0, "elementwise": 1.0, "experts": 1.0},
        "full": {"gemm": 1.0, "attention": 1.0, "elementwise": 1.0, "experts": 1.0},
    },
    logit_bytes=12.0,
    logit_bytes_fp32=12.0,
    logits_split=True,
    logit_bytes_split=4.0,
    pipeline_logits=1.0,
    logits_wait=6.0,
    ends_exchanged=True,
    positions_split=True,
    experts_join=True,
    etp_op="all_to_all",
    embedding_gradient_whole=True,
    head_hidden=2.0,
    head_gathered=1.0,
    loss_traffic=40.0,
    loss_traffic_split=34.0,
    backward_mlp=2.0,
    backward_hidden=2.0,
    receive_all_microbatches=True,
    receive_count=0,
    gradients_as_made=True,
    symmetric_sends=True,
    keeps_stage_output=True,
    pp_exposed=dict.fromkeys(SCHEDULES, 1.0),
    tp_overlap=0.0,
    dp_window=0.9,
    dp_floor=0.1,
    step_floor=0.5,
    kernels_forward=EAGER_KERNELS[0],
    kernels_backward=EAGER_KERNELS[1],
    kernels_tp=(565, 1075),
    kernels_gather=(145, 270),
    optimizer_bytes=34.0,
    optimizer_whole_bytes=0.0,
    step_seconds=2e-3,
    reserved_ratio=1.03,
    context="ulysses",
    ring_gradients=4,
    ring_counted=True,
    ring_merge=((75.0, 9.0), (40.0, 80.0)),
    ring_rate=(2.45e12, 2.25e12),
    kernels_ring=(30, 45),
    windows=False,
    mask_elements=1.0,
    origin={
        "windows": "windows and chunks are masks of plain SDPA: all scores are computed, and one mask [s, s] is kept a kind",
        "context": "counted on the runtime: four all-to-alls a layer forward, four backward, four in recompute",
        "ring_gradients": "counted on the runtime: torch's template adds up gradients in fp32, and sends them so",
        "ring_merge": "counted from torch's template (five passes in fp32 over an output, three over a gradient), times 2 to 3 "
        "as its kernels take them on an H200 (torch 2.11)",
        "ring_rate": "measured: torch's FlashAttention 2 kernels, which it needs, on an H200 (torch 2.11), heads of 128, "
        "over the 7 % that its profile adds to compute",
        "saved": "measured: saved-tensor hooks on the runtime's block, CPU, torch 2.13",
        "deferred": "measured: exactly these bytes between the halves of a backward, layers of 8B and 1B on H200 (torch 2.11)",
        "kernels_split": "measured beside an H200 (torch 2.11), 4 layers of 1B and 8B and of width 256; with tp assumed",
        "split_bytes": "measured: 8B layers on an H200 (torch 2.11), halves against the whole backward",
        "zero": "measured: storage meter and collective counts on the runtime, gloo, torch 2.13, fp32 and bf16",
        "elementwise_forward": "counted from the eager graph; times what kernels take on H200 beyond its constant, "
        "in profiled steps of models 2,560 and 5,120 wide and of experts (torch 2.11)",
        "product_times": "fitted to steps of five models that are in no table of runs, on one H200 (torch 2.11); in their "
        "profiles it is 0.81 to 0.89",
        "gather_copies": "measured: FSDP2's casts and copies on H200 (torch 2.11): 2.6, 2.3 and 3.8 TB/s beside products",
        "reduce_copies": "measured: FSDP2's copies into reductions on H200 (torch 2.11), 2.0 TB/s; sums counted",
        "engine_copies": "measured: the copy into a reduction in bf16 on H200 (torch 2.11), 3.2 TB/s; what is added up counted",
        "whole_sums": "counted: bf16 gradients added to fp32",
        "tp_copies": "measured on H200 (torch 2.11): DTensor's concatenations and splits of sequences, 1.2 and 4 TB/s",
        "loss_traffic_split": "measured: profiled eager step with loss_parallel on H200 (torch 2.11)",
        "kernels_narrow": "measured: 25 ms of host time a layer with torchao's eager fp8 linears beside an H200 (torch 2.11)",
        "logit_bytes": "measured: fp32 log-softmax kept, two fp32 temporaries in its backward; a third over split logits",
        "optimizer_bytes": "28 measured for AdamW on H200, which clips too; 4 counted for the norm, 2 for the copy in bf16",
        "kernels_forward": "measured: 2.5 ms of host time a layer, forward and backward, eager torch 2.11 beside an H200, "
        "at the 5 us a launch of its profile; 10.7 ms with tp (DTensor dispatch), 4.6 ms with ZeRO 3",
        "kernels_routed": "counted in a profile on H200 (torch 2.11): 98 launches more a layer, forward and backward",
        "gradients_as_made": "measured: storage meter on the runtime, and peaks on two H200 (torch 2.11)",
        "dp_window": "assumed",
        "step_floor": "measured on two H200 (torch 2.11), through NCCL: nothing is exposed where copy engines reduce",
        "reserved_ratio": "1.005 measured with expandable segments on H200, up to 1.10 without: assumed between",
    },
)

BUNDLED = Engine(
    name="bundled",
    unequal_chunks=True,
    title="bundled PyTorch runtime",
    rules=RULES,
    accounting=ACCOUNTING,
    zero_stages=(0, 1, 2, 3),
    schedules=("gpipe", "1f1b", "interleaved", *SPLIT_BACKWARD),
    sequence_parallel=(1,),
    context_parallel=True,
    hybrid_sharding=True,
    contexts=("default", "ring"),
    offloads=("none", "optimizer"),
    offload_on_request=True,
    expert_parallel=True,
    device_types="one program on every rank, NCCL or Gloo between them: any devices of one backend, stages of any depth",
)
