"""Bytes on one device: states, saved activations, transients. Integers, rounded up, so that nothing is understated.

The peak of a pipeline rank is the largest of three moments: the backward of a layer (or of the head, on the last rank)
while the most micro-batches are in flight, and the optimizer's update. Formulas: Rajbhandari 2020 (ZeRO), Korthikanti
2022 (activations), and the engine's accounting, which says what each engine keeps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.cost import adapters, pieces
from planner.cost.accounting import ALONE, BY_ENGINES, Accounting, Held, Saved
from planner.cost.rounding import ceil
from planner.cost.task import Bools, Floats, Ints, LayoutArray, Task, splits_backward
from planner.specs.layers import Mlp
from planner.specs.layout import RECOMPUTE_MODES
from planner.specs.pieces import piece_tokens

PARTS = ("params", "grads", "optimizer")


@dataclass(frozen=True)
class ActivationBytes:
    """Saved bytes of one micro-batch; arrays over (tp, cp, micro_batch, sequence_parallel) combinations."""

    layer: tuple[Ints, Ints, Ints]
    """One layer under (none, selective, full) recompute."""
    backward: Ints
    """Temporaries of one layer's backward."""
    boundary: Ints
    """The tensor between two stages."""
    head: Ints
    """Logits, loss and the head's inputs at their peak."""
    waiting: Ints
    """What the loss of a micro-batch keeps that waits for its backward."""
    deferred: Ints
    """Output gradients of one layer that wait for its weight gradients."""
    output: Ints
    """Logits that a pipeline's last rank keeps as its stage's output."""


def activation_bytes(task: Task, combos: LayoutArray) -> ActivationBytes:
    """Activation sizes for each combination."""
    model, a, e = task.model, task.accounting, task.job.compute_bytes
    tp = combos.tp.astype(float)
    split = np.where(combos.sequence_parallel == 1, tp, 1.0)
    tokens = combos.micro_batch * (task.job.seq_len / combos.cp)
    mlp = model.layer.mlp
    saved = [saved_bytes(task, a.saved, mode, combos) + adapter_bytes(task, mode, combos) for mode in RECOMPUTE_MODES]
    layers = tuple(ceil(tokens * each) for each in saved)
    temporaries = e * (a.backward_mlp * mlp.dense_width / tp + a.backward_hidden * model.hidden)
    temporaries = temporaries + a.backward_scores * model.heads * task.job.seq_len / tp
    if mlp.routed:
        rows = e * mlp.top_k * slots(mlp, combos.ep) / split
        temporaries = np.maximum(temporaries, rows * (a.backward_mlp * mlp.width + 2.0 * model.hidden * combos.etp))
    vocabulary = model.vocab / (tp if a.logits_split else np.ones_like(tp))
    return ActivationBytes(
        (layers[0], layers[1], layers[2]),
        ceil(tokens * temporaries),
        ceil(tokens * e * model.hidden / split),
        ceil(sum(head_bytes(task, combos).values(), np.zeros_like(tp))),
        ceil(tokens * a.logits_wait * e / 2.0 * vocabulary),
        ceil(tokens * saved_bytes(task, a.deferred, "none", combos, norms=False)),
        ceil(tokens * a.pipeline_logits * e * vocabulary),
    )


def head_bytes(task: Task, combos: LayoutArray) -> dict[str, Floats]:
    """What lives at the peak of the head and the loss of one micro-batch, by name."""
    model, a, e = task.model, task.accounting, task.job.compute_bytes
    tp, tokens = combos.tp.astype(float), combos.micro_batch * (task.job.seq_len / combos.cp)
    split = np.where(combos.sequence_parallel == 1, tp, 1.0)
    logit = (a.logit_bytes if e == 2 else a.logit_bytes_fp32) + np.where(tp > 1, a.logit_bytes_split, 0.0)
    vocabulary = model.vocab / (tp if a.logits_split else np.ones_like(tp))
    inputs = tokens * e * (a.head_hidden / split + np.where(tp > 1, a.head_gathered, 0.0)) * model.hidden
    if not a.loss_in_pieces:
        return {"logits and loss": tokens * logit * vocabulary, "inputs": inputs}
    adding, result = pieces.gradient_bytes(tokens, e * vocabulary, e)
    logits, weights = piece_tokens(tokens, e * vocabulary) * logit * vocabulary, vocabulary * model.hidden
    # The last piece is gone when the sum is converted.
    return {
        "logits of a piece": np.maximum(logits, result * weights),
        "gradient of the head": adding * weights,
        "inputs": inputs,
        "gradient of the inputs": tokens * e * model.hidden,
    }


_OF_MLP = frozenset(("mlp", "routed", "routed_mlp", "returned", "routes", "arrivals"))


def attention_bytes(task: Task, layouts: LayoutArray) -> Floats:
    """Activations of one layer and micro-batch that its backward still needs when that of its MLP is over."""
    rest = tuple(item for item in task.accounting.saved if item.width not in _OF_MLP)
    return layouts.micro_batch * (task.job.seq_len / layouts.cp) * saved_bytes(task, rest, "none", layouts)


def logit_gradient_bytes(task: Task, layouts: LayoutArray) -> Floats:
    """The logits' gradient of one micro-batch in the compute type, of which the head's own gradient is made: nothing of it is
    left where that is done piece by piece."""
    if task.accounting.loss_in_pieces:
        return np.zeros(len(layouts))
    tokens = layouts.micro_batch * (task.job.seq_len / layouts.cp)
    split = layouts.tp if task.accounting.logits_split else np.ones(len(layouts))
    return tokens * task.job.compute_bytes * task.model.vocab / split


def slots(mlp: Mlp, ep: Ints) -> Floats:
    """Rows that the busiest rank's experts process over its even share: padded to a capacity, or as uneven as the routing."""
    return np.where(ep > 1, mlp.imbalance, 1.0) if mlp.capacity is None else np.full(len(ep), mlp.capacity)


def adapter_bytes(task: Task, mode: str, combos: LayoutArray) -> Floats:
    """Bytes that one layer's adapters save for a token under a recompute mode: 0 without an adapter."""
    if task.job.adapter is None:
        return np.zeros(len(combos))
    mlp = task.model.layer.mlp
    return adapters.saved_bytes(task, mode, combos, mlp.top_k * slots(mlp, combos.ep) if mlp.routed else 0.0)


def around_a_ring(task: Task, context: Ints) -> Bools:
    """Whether cp groups send keys and values around a ring, by the code of how they share attention."""
    return (context == 1) | (task.accounting.context == "ring")


def saved_bytes(task: Task, saved: Iterable[Saved], mode: str, combos: LayoutArray, norms: bool = True) -> Floats:
    """Bytes that one layer saves for a token under a recompute mode, of the tensors `saved`; and of norms beyond two."""
    model = task.model
    attention, mlp = model.layer.attention, model.layer.mlp
    routed = mlp.top_k * slots(mlp, combos.ep) if mlp.routed else 0.0
    widths: dict[str, Any] = {
        "hidden": model.hidden,
        "q": model.q_width,
        "kv": model.kv_width,
        "v": model.heads * model.v_dim_of(model.layer),
        "mlp": mlp.dense_width,
        "heads": model.heads,
        "one": 1,
        "scores": model.heads * task.job.seq_len,
        "q_latent": attention.q_lora_rank or 0,
        "kv_latent": (attention.kv_lora_rank or 0) + attention.rope_dim / 2,
        "routed": routed * model.hidden * combos.etp,
        "returned": routed * model.hidden,
        "routes": routed,
        "arrivals": routed * combos.etp,
        "routed_mlp": routed * mlp.width,
        "experts": mlp.experts if mlp.routed else 0,
    }
    tp = combos.tp.astype(float)
    sequence = combos.sequence_parallel == 1
    divisors = {"tensor": tp, "sequence": np.where(sequence, tp, 1.0), "none": np.ones_like(tp)}
    conditions = {
        "gated": mlp.kind == "gated",
        "gelu": mlp.kind == "gelu",
        "softmax": attention.kind == "softmax",
        "latent": attention.kind == "latent",
        "routed": mlp.routed,
        "dense": not mlp.routed,
        "shared": mlp.dense_width > 0,
        "shared_gate": mlp.shared_gate,
        "exchanged_rows": combos.ep * combos.etp > 1,
        "narrow": task.job.linears != "same",
        "wide": task.job.linears == "same",
        "rmsnorm": model.norm == "rmsnorm",
        "layernorm": model.norm == "layernorm",
        "qk_norm": attention.qk_norm != "none",
        "exchanged": (combos.cp > 1) & ~around_a_ring(task, combos.context),
        "gathered": sequence & (tp > 1),
        "not_gathered": ~(sequence & (tp > 1)),
    }
    # Beyond the two norms that `saved` counts, each keeps its input; a block that shares one norm keeps one row less.
    more = (model.layer.n_norms - 2) * model.hidden * task.job.compute_bytes if norms and mode != "full" else 0.0
    total = more / divisors["sequence"]
    for item in saved:
        if mode not in item.kept:
            continue
        present = np.ones_like(tp)
        for condition in item.only:
            present = present * np.asarray(conditions[condition], float)
        size = task.accounting.size(item.size, task.job.compute_bytes)
        total = total + present * adapters.kept_rows(task, item) * widths[item.width] * size / divisors[item.split]
    return total


@dataclass(frozen=True)
class StateBytes:
    """Bytes for one parameter; arrays over (zero, D, accumulating) combinations. See `ZeroRule` for the moments."""

    backward: dict[str, Floats]
    """By part."""
    update: dict[str, Floats]
    resident: Floats
    whole_gradients: Floats
    """The part of `backward` that is gradients and not divided by D."""
    pooled: Floats
    """What the allocator keeps beside `backward`."""
    carried: Floats
    unit: Floats
    unit_reduction: Floats
    head: Floats
    head_reduction: Floats
    last_reduction: Floats
    last_unit: Floats
    own: Floats
    finish: Floats
    reduced: Floats
    released: Floats
    ahead: Floats
    again: Floats
    received: Floats
    """Of all other ranks together."""


_MOMENTS = (
    "pooled", "resident", "carried", "unit", "unit_reduction", "head", "head_reduction", "last_reduction", "last_unit",
    "own", "finish", "reduced", "released", "ahead", "again",
)  # fmt: skip


def state_bytes(task: Task, layouts: LayoutArray, shard: Ints) -> StateBytes:
    """State sizes a parameter for each layout, under the engine's rule of its ZeRO stage, over `shard` ranks."""
    zero, microbatches = rule_of(task, layouts), layouts.microbatches
    here = layouts.offload == 0
    a, e = task.accounting, task.job.compute_bytes
    present = {
        "always": np.ones(len(zero), dtype=bool),
        "accumulating": microbatches > 1,
        "single": microbatches <= 1,
        "single_sharded": (microbatches <= 1) & (shard > 1),
        "sharded": shard > 1,
        "copied": (shard > 1) | (e < 4),
    }

    stages = set(np.unique(zero).tolist())

    def total(field: str, part: str | None = None, whole: bool = False) -> Floats:
        result = np.zeros(len(zero))
        for stage, rule in a.zero.items():
            if stage not in stages:
                continue
            items: tuple[Held, ...] = getattr(rule, field)
            for item in items:
                if (part is None or item.part == part) and not (whole and item.shard):
                    size = a.size(item.size, e) / (shard if item.shard else 1.0)
                    kept = here if item.part == "optimizer" or item.host else True
                    result += np.where((zero == stage) & present[item.when] & kept, size, 0.0)
        return result

    return StateBytes(
        {part: total("backward", part) for part in PARTS},
        {part: total("update", part) for part in PARTS},
        whole_gradients=total("backward", "grads", whole=True),
        received=total("received") * (shard - 1),
        **{moment: total(moment) for moment in _MOMENTS},
    )


def rule_of(task: Task, layouts: LayoutArray) -> Ints:
    """Key of each layout's rule among those of the accounting: its ZeRO stage as it runs, or `ALONE`, or with `BY_ENGINES`."""
    stage, engines = layouts.kept_zero, by_engines(task, layouts)
    once = engines & (stage == 1) & (layouts.microbatches == 1)  # as stage 2: gradients are reduced as they come
    return np.where(alone(task, layouts), ALONE, stage + once + np.where(engines, BY_ENGINES, 0))


def by_engines(task: Task, layouts: LayoutArray) -> Bools:
    """Whether copy engines gather and reduce: under an engine with rules for that, where all ranks are GPUs of one node and
    share one copy of the states (the runtime's `copies.suits` says why)."""
    x, machine = layouts, task.hardware
    there = BY_ENGINES + 1 in task.accounting.zero and machine.device.kind == "cuda" and task.gpus <= machine.node_size
    shared = (x.zero > 0) & (x.offload == 0) & (x.ep * x.etp == 1)
    return shared & (x.tp * x.pp == 1) & (x.data > 1) & (x.shard == x.data) & there


def alone(task: Task, layouts: LayoutArray) -> Bools:
    """Whether a rank shares its parameters with no other, under an engine with a rule of its own for that: dense bf16 models
    whose backward is whole (the runtime's `masters.lowered` says why)."""
    job, has = task.job, ALONE in task.accounting.zero
    possible = has and job.precision == "bf16" and job.adapter is None and not task.model.routed_mlps
    return (layouts.data == 1) & ~splits_backward(layouts.schedule) & possible


def joined(a: Accounting, x: LayoutArray) -> Bools:
    """Whether routed experts are exchanged with the rest of their layer: they are on the same ranks."""
    return (x.ep * x.etp == 1) & (x.tp == 1) & a.experts_join


def rank_params(task: Task, layouts: LayoutArray) -> dict[str, Floats]:
    """Parameters that one rank holds: of a layer (without routed experts), its local experts, one expert, the embedding
    (with positions and front ends), the head, the final norm, multi-token modules beside their layers.

    `own_head` is the head as parameters of its own: a tied head on the embedding's own rank has none, on another rank
    it is a copy.
    """
    model, tp = task.model, layouts.tp
    group = model.layer
    split = model.matmul_params_of(group) + model.split_bias_params_of(group)
    bias = model.vocab / tp if model.head_bias else 0.0
    positions = model.position_params / (tp if task.accounting.positions_split else np.ones(len(tp)))
    return {
        "layer": split / tp + model.whole_params_of(group),
        "experts": model.expert_params_of(group) / (layouts.ep * layouts.etp),
        "expert": model.expert_params_of(group) / (group.mlp.experts * layouts.etp),
        "embedding": model.embedding_params / tp + positions + sum(f.params(model.hidden) for f in task.fronts),
        "head": model.embedding_params / tp,
        "own_head": np.where((layouts.pp == 1) & model.tied_embeddings, 0.0, model.embedding_params / tp) + bias,
        "norm": np.full(len(tp), float(model.norm_params)),
        "modules": np.full(len(tp), model.mtp * float(2 * model.hidden**2 + 3 * model.norm_params)),
    }


def communicators(layouts: LayoutArray) -> Ints:
    """Process groups over more than one rank that a device belongs to: tp, cp, dp (with cp), pp, ep, etp, and the world."""
    world = layouts.tp * layouts.cp * layouts.dp * layouts.pp
    groups = (layouts.tp, layouts.cp, layouts.data, layouts.pp, layouts.ep, layouts.etp, world)
    hybrid = 2 * (layouts.replicas > 1)  # those that share a copy, and those that keep copies equal
    return np.sum([(g > 1).astype(np.int64) for g in groups], axis=0) + hybrid
