"""Recipes: named departures from an engine's usual accounting, combined as `megatron+2021` or `torchtitan+eager`.

The same engine is run in different eras and configurations: without overlap, with bf16 gradients, before FlashAttention.
Each trait replaces fields of the accounting and says where its values come from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from planner.cost.accounting import (
    ALONE,
    COMPUTE,
    EAGER_KERNELS,
    TP_CALL,
    Accounting,
    Elementwise,
    Held,
    Saved,
    Traffic,
    ZeroRule,
)
from planner.cost.task import GPIPE, splits_backward
from planner.engines import sharding
from planner.engines.rule import Rule
from planner.specs.layout import SCHEDULES, SPLIT_BACKWARD


@dataclass(frozen=True)
class Trait:
    """One named departure."""

    name: str
    what: str
    apply: Callable[[Accounting], Accounting]
    source: str
    zero_stages: tuple[int, ...] = ()
    """ZeRO stages that the engine has with it, where they are others."""
    schedules: tuple[str, ...] = ()
    """Schedules that torchtitan has besides with it."""
    lifts: tuple[str, ...] = ()
    """Codes of the engine's rules that no longer hold."""
    adds: tuple[Rule, ...] = ()
    """Rules that hold with it besides."""
    engines: tuple[str, ...] = ()
    """The engines that have it; any when empty."""


def _set(**fields: Any) -> Callable[[Accounting], Accounting]:
    return lambda a: replace(a, **fields)


def _eager_norms(a: Accounting) -> Accounting:
    """Norms as chains of small kernels: an fp32 copy and its square are kept, and all of it is read again."""

    def more(e: dict[str, Elementwise], rows: float, mlp: float) -> dict[str, Elementwise]:
        return {k: replace(v, norm=v.norm + rows, mlp=v.mlp + mlp) for k, v in e.items()}

    saved = (*a.saved, Saved("fp32 norm copies", "hidden", 4, "sequence", size=4))
    forward, backward = more(a.elementwise_forward, 20, 4), more(a.elementwise_backward, 24, 4)
    return replace(a, saved=saved, elementwise_forward=forward, elementwise_backward=backward)


def _unfused_attention(a: Accounting) -> Accounting:
    """Scores are written: mask and softmax output of every score are kept, unless attention is recomputed."""
    saved = (*a.saved, Saved("scores", "scores", 1, "tensor", size=5, kept=("none",)))
    return replace(a, attention="unfused", saved=saved, backward_scores=8.0)


def _bf16_gradients(a: Accounting) -> Accounting:
    """Gradients are kept and reduced in two bytes."""

    def held(items: tuple[Held, ...]) -> tuple[Held, ...]:
        return tuple(replace(h, size=2) if h.part == "grads" and h.size == 4 else h for h in items)

    def rule(z: ZeroRule) -> ZeroRule:
        traffic = tuple(replace(t, size=2) if t.size == 4 else t for t in z.traffic)
        return replace(z, backward=held(z.backward), update=held(z.update), traffic=traffic)

    return replace(a, zero={k: rule(z) for k, z in a.zero.items()})


def _states(whole: float, sharded: float) -> Callable[[Accounting], Accounting]:
    """ZeRO 1 with `whole` + `sharded` / D bytes a parameter, two of them the parameter itself; ZeRO 0 with both whole."""

    def apply(a: Accounting) -> Accounting:
        rules = dict(a.zero)
        for stage in (0, 1):
            optimizer = Held("optimizer", sharded, shard=stage == 1)
            held = (Held("params", 2, shard=False), Held("grads", whole - 2, shard=False), optimizer)
            rules[stage] = replace(rules[stage], backward=held, update=held)
        return replace(a, zero=rules)

    return apply


def _fp8_gather(a: Accounting) -> Accounting:
    """Parameters are gathered in one byte."""

    def rule(z: ZeroRule) -> ZeroRule:
        return replace(z, traffic=tuple(replace(t, size=1) if t.op == "all_gather" else t for t in z.traffic))

    return replace(a, zero={k: rule(z) for k, z in a.zero.items()})


def _eager(a: Accounting) -> Accounting:
    """PyTorch layers without compilation: norms fused, rotary positions and gated activations not."""

    def more(e: dict[str, Elementwise], rows: float, mlp: float) -> dict[str, Elementwise]:
        return {k: replace(v, q=v.q + rows, kv=v.kv + rows, mlp=v.mlp + mlp) for k, v in e.items()}

    saved = (*a.saved, Saved("silu", "mlp", 1, "tensor", only=("gated",)))
    return replace(
        a,
        saved=saved,
        kernels_forward=EAGER_KERNELS[0],
        kernels_backward=EAGER_KERNELS[1],
        reserved_ratio=a.reserved_ratio + 0.05,
        elementwise_forward=more(a.elementwise_forward, 30, 4),
        elementwise_backward=more(a.elementwise_backward, 36, 8),
    )


def _routing(routed: float, experts: float) -> Callable[[Accounting], Accounting]:
    """Other traffic of permutation and of the experts' activations."""

    def apply(a: Accounting) -> Accounting:
        def other(e: dict[str, Elementwise]) -> dict[str, Elementwise]:
            return {k: replace(v, routed=routed, experts=experts) for k, v in e.items()}

        return replace(a, elementwise_forward=other(a.elementwise_forward), elementwise_backward=other(a.elementwise_backward))

    return apply


def _era_2021(a: Accounting) -> Accounting:
    """Megatron of 2021 and 2022: scores written, fp16 gradients reduced after backward, nothing overlapped."""
    a = _unfused_attention(a)
    zero = dict(a.zero)
    zero[0] = replace(zero[0], traffic=(Traffic("all_reduce", 2, "step", "backward"),), resident=())
    # Since 2022 (Megatron-LM's and DeepSpeed's ZeRO 1) the fp16 gradients are reduced and the parameters gathered.
    zero[1] = replace(
        zero[1],
        traffic=(Traffic("reduce_scatter", 2, "step", "backward"), Traffic("all_gather", 2, "step", "forward")),
        resident=(),
    )
    return replace(
        a,
        zero=zero,
        tp_overlap=0.0,
        dp_window=0.0,
        dp_floor=1.0,
        pp_split=True,
        pp_exposed=dict.fromkeys(a.pp_exposed, 1.0),
        kernels_forward=EAGER_KERNELS[0],
        kernels_backward=EAGER_KERNELS[1],
        optimizer_bytes=50.0,
        tp_call=TP_CALL,
        logit_bytes=14.0,
        loss_traffic=48.0,
    )


def _compiled_blocks(a: Accounting) -> Accounting:
    """The bundled runtime's blocks and loss under torch.compile: silu is made again, chains of small kernels are fused."""
    gated = "gate, up, silu, product"
    saved = tuple(replace(s, name="gate, up, product", count=3) if s.name == gated else s for s in a.saved)
    return replace(
        a,
        saved=saved,
        # What kernels take in profiled steps of models 2,560 and 5,120 wide on H200 (torch 2.11), over the profile's constant.
        elementwise_forward={"gelu": Elementwise(17, 3.4, 3.7, 3.7, 28), "gated": Elementwise(17, 4.7, 3.7, 3.7, 28)},
        elementwise_backward={"gelu": Elementwise(33, 5.2, 3.2, 3.2, 51), "gated": Elementwise(33, 7.9, 3.2, 3.2, 51)},
        loss_traffic_split=0.0,
        tp_copies=(0.0, 4.3),
        kernels_narrow=(0.0, 0.0),
        loss_in_pieces=True,
        logit_bytes=2.0,  # the gradient takes the logits' place
        logit_bytes_fp32=4.0,
        logit_bytes_split=0.0,
        pipeline_logits=0.0,
        logits_wait=0.0,
        loss_traffic=8.5,  # measured on H200 (torch 2.11): its two kernels take 2.57 ms for 8,192 x 128,256 logits
        kernels_forward=60,
        kernels_backward=80,
    )


def _bf16_states(a: Accounting) -> Accounting:
    """The bundled runtime without masters: parameters, gradients and AdamW's states in the compute type."""
    states = (Held("params", COMPUTE, shard=False), Held("optimizer", 4, shard=False))
    gradient = Held("grads", COMPUTE, shard=False)
    rule = ZeroRule(
        backward=(*states, replace(gradient, when="accumulating")),
        update=(*states, gradient),
        traffic=(),
        head_reduction=(replace(gradient, when="single"),),
        own=(gradient,),
        finish=(gradient,),
    )
    return replace(a, zero={**a.zero, ALONE: rule}, optimizer_bytes=16.0, whole_sums=0.6 * a.whole_sums)


_BF16_STATES_RULES = (
    Rule(
        "PLN598", "bf16 states: one data-parallel rank",
        lambda t, x: (x.data > 1) | splits_backward(x.schedule) | (t.job.precision != "bf16") | bool(t.model.routed_mlps),
        "states in bf16 with dp {dp}, cp {cp}, schedule {schedule}, precision {precision}",
        "the runtime has them where no FSDP2 keeps masters: dense models in bf16 with dp = cp = 1 and whole backwards",
        "set dp: 1 and cp: 1 and a schedule with whole backwards, or leave out +bf16-states",
    ),
)  # fmt: skip


def _products_kept(a: Accounting) -> Accounting:
    """Selective recompute that keeps, besides attention's output, the products that are cheap to keep: those of queries, keys,
    values and the MLP's first matrix. The output projection, the second of a gated MLP's first two, norms and activations are
    computed again; the MLP's last product is needed by nothing."""
    both = {"query", "key, value"}
    saved = tuple(replace(s, kept=("none", "selective")) if s.name in both else s for s in a.saved)
    first = Saved("first product of the MLP", "mlp", 1, "tensor", kept=("selective",))
    recomputed = {**a.recomputed, "selective": {"gemm": 0.35, "elementwise": 1.0}}
    return replace(a, saved=(*saved, first), recomputed=recomputed)


_PRODUCTS_RULES = (
    Rule(
        "PLN599", "selective-products: plain layers",
        lambda t, x: np.full(len(x), bool(t.model.routed_mlps) or any(a.kind != "softmax" for a in t.model.attentions)),
        "{model} has routed experts or latent attention, with selective-products",
        "the products that selective recompute keeps are counted in layers of plain attention and dense MLPs",
        "leave out +selective-products",
        whole_job=True,
    ),
    Rule(
        "PLN569", "selective-products: no ring",
        lambda t, x: x.context == 1,
        "context {context} with selective-products",
        "what a ring keeps under selective recompute is its merged output, and products beside it are not counted",
        "leave out context, or leave out +selective-products",
        on="degrees",
    ),
)  # fmt: skip


_COMPILED_RULES = (
    Rule(
        "PLN568", "compile: no ring",
        lambda t, x: x.context == 1,
        "context {context} with compiled blocks",
        "torch's ring attention is not traced: a compiled block would be cut apart around it",
        "leave out context, or leave out +compile",
        on="degrees",
    ),
    Rule(
        "PLN516", "compile: whole backwards",
        lambda t, x: splits_backward(x.schedule),
        "schedule {schedule} with compiled blocks",
        "a compiled backward frees what it saved, and cannot run again for the weights (torch: donated buffers)",
        "use 1f1b or interleaved, or leave out +compile",
        on="pipeline",
    ),
    Rule(
        "PLN600", "compile: no gpipe",
        lambda t, x: x.schedule == GPIPE,
        "schedule gpipe with compiled blocks and loss",
        "the loss makes the head's gradient in forward, and gpipe would keep one for each micro-batch",
        "use 1f1b: the bubble is the same, the memory less; or leave out +compile",
        on="pipeline",
    ),
    Rule(
        "PLN596", "compile: dense layers",
        lambda t, x: np.full(len(x), bool(t.model.routed_mlps)),
        "{model} has routed experts, with compiled blocks",
        "the sizes of their exchanges depend on the tokens: a compiled block would be cut apart and compiled anew",
        "leave out +compile",
        whole_job=True,
    ),
)  # fmt: skip


def _megatron_fsdp(a: Accounting) -> Accounting:
    """Megatron-FSDP: parameters, gradients and states sharded, gathered and reduced for every micro-batch."""
    held = (Held("params", COMPUTE, shard=True), Held("grads", 4, shard=True), Held("optimizer", 12, shard=True))
    rule = ZeroRule(
        backward=held,
        update=held,
        traffic=sharding.GATHER_AND_REDUCE,
        unit=sharding.UNIT,
        head=sharding.HEAD,
    )
    return replace(a, zero={**a.zero, 2: rule, 3: rule}, dp_floor=0.1)


TRAITS: dict[str, Trait] = {
    t.name: t
    for t in (
        Trait("2021", "Megatron of 2021 and 2022", _era_2021, "Narayanan 2021 (scatter-gather, section 4.1), Korthikanti 2022"),
        Trait("unfused-attention", "attention writes its scores", _unfused_attention, "Korthikanti 2022: 5 a s^2 b / t bytes"),
        Trait(
            "fp32-softmax",
            "softmax of unfused attention through fp32 copies",
            _set(score_bytes=(23.0, 19.0)),
            "eager scale, mask, cast and softmax: 14 and 8 bytes more a score",
        ),
        Trait("flash-1", "FlashAttention 1 kernels", _set(attention_rate=0.72), "Dao 2023: about 0.4 of the A100's peak"),
        Trait("flash-2-hopper", "FlashAttention 2 on Hopper", _set(attention_rate=0.62), "flash against cuDNN on H200"),
        Trait(
            "older-attention",
            "attention kernels of earlier GPUs on Blackwell",
            _set(attention_rate=0.25),
            "gpt-oss 120B in Megatron-Bridge 26.06 and 26.06.01, which lost the newer kernels: 1.6 s in 36 layers",
        ),
        Trait(
            "whole-windows",
            "sliding windows are masked, not skipped",
            _set(windows=False),
            "attention kernels that loop over all keys: cudnn-frontend pull request #866",
        ),
        Trait("triton-attention", "Triton attention of 2022", _set(attention_rate=0.70), "Dao 2023, its Triton baseline"),
        Trait(
            "no-overlap",
            "all communication exposed",
            _set(tp_overlap=0.0, dp_window=0.0, dp_floor=1.0, pp_exposed=dict.fromkeys(SCHEDULES, 1.0)),
            "the overlap options of Megatron-Core switched off",
        ),
        Trait("fp8-gather", "parameters gathered in fp8", _fp8_gather, "torchtitan's enable_fsdp_float8_all_gather"),
        Trait(
            "async-tp",
            "products decomposed to hide tp collectives",
            _set(tp_overlap=0.5),
            "torch's asynchronous tensor parallel",
        ),
        Trait("no-tp-overlap", "tensor-parallel collectives exposed", _set(tp_overlap=0.0), "tp_comm_overlap: false"),
        Trait("bf16-grads", "gradients kept and reduced in bf16", _bf16_gradients, "grad_reduce_in_fp32: false"),
        Trait(
            "unfused-loss",
            "cross-entropy over fp32 copies of the logits",
            _set(logit_bytes=14.0, loss_traffic=48.0),
            "logits, and three fp32 tensors of their size",
        ),
        Trait("compiled-loss", "compiled cross-entropy", _set(logit_bytes=6.0, loss_traffic=24.0), "torchtitan since 2025"),
        Trait("eager-norms", "norms without a fused kernel", _eager_norms, "fp32 copies kept by an eager RMS norm"),
        Trait(
            "gathered-logits",
            "the logits of the whole vocabulary on every tp rank",
            _set(logits_split=False, logit_bytes=22.0, loss_traffic=48.0),
            "bf16, gathered bf16, fp32, log-softmax, its and the logits' gradient in fp32, bf16 gradient: 2+2+4+4+4+4+2",
        ),
        Trait(
            "fp16-states", "fp16 ZeRO 1: 4 + 18 / D bytes a parameter", _states(4, 18), "Megatron-DeepSpeed's fp16 optimizer"
        ),
        Trait("bf16-optimizer", "8 + 12 / D bytes a parameter", _states(8, 12), "Megatron-DeepSpeed's BF16 optimizer"),
        Trait(
            "cuda-graphs",
            "layers replayed as CUDA graphs",
            _set(kernels_forward=2, kernels_backward=2, kernels_routed=(0, 0), kernels_expert=(0, 0)),
            "a replay is one launch",
        ),
        Trait(
            "eager",
            "layers not compiled",
            _eager,
            "ten to twenty launches more for norms, rotary and activations",
            schedules=SPLIT_BACKWARD,
        ),
        Trait(
            "compile",
            "blocks and loss under torch.compile",
            _compiled_blocks,
            "A = 8h+8+4q+4kv+6f+4H bytes a token measured on the compiled block (torch 2.13); blocks and loss compiled: "
            "45.5 to 55.7 % MFU and 9 GiB less loss on an H200 (torch 2.11); launches as assumed for torchtitan",
            adds=_COMPILED_RULES,
            engines=("bundled",),
        ),
        Trait(
            "bf16-states",
            "parameters, gradients and optimizer states in bf16, no fp32 masters",
            _bf16_states,
            "8 bytes a parameter instead of 16: what torchtitan does under training.dtype = bfloat16; small updates are lost",
            adds=_BF16_STATES_RULES,
            engines=("bundled",),
        ),
        Trait(
            "selective-products",
            "selective recompute keeps products as well",
            _products_kept,
            "counted: of a llama layer's products wo and w3 are computed again, 35 % of the multiplications",
            adds=_PRODUCTS_RULES,
            engines=("bundled",),
        ),
        Trait("compiled", "layers compiled", _set(kernels_forward=30, kernels_backward=45), "fused kernels: half the launches"),
        Trait(
            "pipe-buffers",
            "a stage's input and output kept for every micro-batch in flight",
            _set(keeps_stage_output=True, boundary_copies=2.0, outside_bytes=3.0 * 2**30),
            "DeepSpeed's pipe buffers",
        ),
        Trait(
            "fsdp",
            "Megatron-FSDP",
            _megatron_fsdp,
            "Megatron-Core's custom FSDP, optim_grads_params",
            zero_stages=(2, 3),
            lifts=("PLN521",),
        ),
        Trait(
            "deep-ep",
            "a token is sent once to each rank and node, rows are permuted and padded in one pass",
            _set(ep_once=True, padding_bytes=0.0),
            "DeepEP and HybridEP dispatchers",
        ),
        Trait(
            "fused-experts",
            "grouped products with activation and quantisation fused, permutation by the dispatcher",
            lambda a: replace(_routing(3.0, 0.3)(a), kernels_routed=(5.0, 5.0), kernels_expert=(0.0, 0.0)),
            "Megatron-Core of mid 2026: fused grouped products",
        ),
        Trait(
            "static-experts",
            "experts' buffers of a fixed size, half as large again as what they hold, processed whole",
            _set(expert_slots=1.5),
            "moe_expert_rank_capacity_factor: 1.5 of Megatron-Bridge's recipes for CUDA graphs of whole iterations",
        ),
        Trait(
            "token-drop",
            "every expert gets the same number of rows, others are dropped",
            _set(kernels_padded=1.0, padding_bytes=0.0),
            "moe_expert_capacity_factor and moe_pad_expert_input_to_capacity of Megatron-Core: nothing is padded for fp8",
        ),
        Trait(
            "unfused-routing",
            "permutation and combination as chains of kernels",
            _routing(24.0, 1.5),
            "token dispatchers before fused permutation (2025): index_add takes 11 times the time of its bytes on H200",
        ),
        Trait(
            "light-recompute",
            "selective recompute of norms, activations or latent up-projections only",
            lambda a: replace(a, recomputed={**a.recomputed, "selective": {"gemm": 0.05, "elementwise": 0.5}}),
            "Megatron-Core's recompute_modules without core_attn",
        ),
        Trait(
            "hidden-experts", "expert exchanges hidden behind compute", _set(ep_overlap=0.8), "1F1B overlap of Megatron-Core"
        ),
        Trait(
            "half-hidden-experts",
            "expert exchanges hidden on Hopper, where their kernels take multiprocessors from compute",
            _set(ep_overlap=0.5),
            "Qwen3 with and without the overlap on H100: 0.44 (235B, 19.7 to 17.6 s) and 0.77 (30B, 24.7 to 21.1 s) of them",
        ),
    )
}
