"""The bundled runtime: PyTorch DeviceMesh, DTensor tensor parallelism, FSDP2, torch pipelining.

Byte counts were verified on the runtime itself with saved-tensor hooks and a storage meter; traffic by counting its
collectives. FSDP2 keeps fp32 masters and reduces gradients in fp32.
"""

from __future__ import annotations

import numpy as np

from planner.cost.accounting import (
    EAGER_KERNELS,
    Accounting,
    Elementwise,
    Saved,
    TpTraffic,
)
from planner.engines.base import Engine, Rule, kv_heads_divisible, microbatches_below_pp
from planner.engines.fsdp2 import ZERO
from planner.specs.features import features

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
        "PLN514", "bundled: cp",
        lambda t, x: x.cp > 1,
        "cp {cp}",
        "this version of the runtime does not split the sequence of attention",
        "set cp: 1",
    ),
    Rule(
        "PLN516", "bundled: fp16",
        lambda t, x: np.full(len(x), t.job.precision == "fp16"),
        "precision fp16",
        "this version of the runtime has no loss scaling",
        "use bf16 or fp32",
        whole_job=True,
    ),
    Rule(
        "PLN517", "bundled: plain decoders",
        lambda t, x: np.full(len(x), bool(features(t.model))),
        "{model} has {features}",
        "this version of the runtime builds plain dense decoders only",
        "use another engine, such as --engine megatron",
        whole_job=True,
    ),
)  # fmt: skip

SAVED = (
    Saved("norm inputs", "hidden", 2, "sequence"),
    Saved("norm inputs", "hidden", 1, "sequence", kept=("selective", "full")),
    Saved("rstd", "one", 2, "sequence", size=4, only=("rmsnorm",)),
    Saved("mean, rstd", "one", 4, "sequence", size=4, only=("layernorm",)),
    # With tp the gathered inputs of the first projections are saved, whole on every rank.
    Saved("norm outputs", "hidden", 2, "none"),
    Saved("query", "q", 1, "tensor"),
    Saved("key, value", "kv", 2, "tensor"),
    Saved("query, key before their norm", "q", 1, "tensor", only=("qk_norm",)),
    Saved("key before its norm", "kv", 1, "tensor", only=("qk_norm",)),
    Saved("attention output", "q", 1, "tensor", kept=("none", "selective")),
    Saved("log-sum-exp", "heads", 1, "tensor", size=4, kept=("none", "selective")),
    Saved("gate, up, silu, product", "mlp", 4, "tensor", only=("gated",)),
    Saved("gelu input, output", "mlp", 2, "tensor", only=("gelu",)),
)

_TP = TpTraffic(
    forward={"all_gather": 2, "reduce_scatter": 2},
    backward={"all_gather": 2, "reduce_scatter": 2},
    recompute={"selective": {"all_gather": 2, "reduce_scatter": 1}, "full": {"all_gather": 2, "reduce_scatter": 1}},
)

ACCOUNTING = Accounting(
    name="bundled",
    saved=SAVED,
    zero=ZERO,
    tp_sequence=_TP,
    tp_plain=_TP,
    # Eager kernels: fused norms, residuals, and rotary positions in fp32, which pass over queries and keys many times.
    elementwise_forward={"gelu": Elementwise(25, 5, 50, 50), "gated": Elementwise(25, 10, 50, 50)},
    elementwise_backward={"gelu": Elementwise(40, 6.6, 56, 56), "gated": Elementwise(40, 18, 56, 56)},
    recomputed={
        "selective": {"gemm": 1.0, "elementwise": 1.0},
        "full": {"gemm": 1.0, "attention": 1.0, "elementwise": 1.0},
    },
    logit_bytes=12.0,
    logit_bytes_fp32=12.0,
    logits_split=True,
    logit_bytes_split=4.0,
    pipeline_logits=1.0,
    logits_wait=6.0,
    ends_exchanged=True,
    positions_split=True,
    embedding_gradient_whole=True,
    head_hidden=2.0,
    head_gathered=1.0,
    loss_traffic=40.0,
    backward_mlp=2.0,
    backward_hidden=2.0,
    receive_all_microbatches=True,
    receive_count=0,
    keeps_stage_output=True,
    pp_exposed={"gpipe": 1.0, "1f1b": 1.0, "interleaved": 1.0},
    tp_overlap=0.0,
    dp_window=0.9,
    dp_floor=0.1,
    kernels_forward=EAGER_KERNELS[0],
    kernels_backward=EAGER_KERNELS[1],
    kernels_tp=(565, 1075),
    kernels_gather=(145, 270),
    optimizer_bytes=40.0,
    optimizer_whole_bytes=0.0,
    step_seconds=2e-3,
    reserved_ratio=1.03,
    origin={
        "saved": "measured: saved-tensor hooks on the runtime's block, CPU, torch 2.13",
        "zero": "measured: storage meter and collective counts on the runtime, gloo, torch 2.13, fp32 and bf16",
        "elementwise_forward": "counted from the eager graph; norms as measured on H200 (1.4 to 2.2 times their bytes)",
        "logit_bytes": "measured: fp32 log-softmax kept, two fp32 temporaries in its backward; a third over split logits",
        "optimizer_bytes": "28 measured for fused AdamW on H200; 12 counted for norm, clip and the sharded copy",
        "kernels_forward": "measured: 2.5 ms of host time a layer, forward and backward, eager torch 2.11 beside an H200, "
        "at the 5 us a launch of its profile; 10.7 ms with tp (DTensor dispatch), 4.6 ms with ZeRO 3",
        "dp_window": "assumed",
        "reserved_ratio": "1.005 measured with expandable segments on H200, up to 1.10 without: assumed between",
    },
)

BUNDLED = Engine(
    name="bundled",
    title="bundled PyTorch runtime",
    rules=RULES,
    accounting=ACCOUNTING,
    zero_stages=(0, 1, 2, 3),
    schedules=("gpipe", "1f1b", "interleaved"),
    sequence_parallel=(1,),
    context_parallel=False,
)
