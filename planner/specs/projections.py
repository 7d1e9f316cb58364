"""The matrices of a layer one by one, and what an adapter trains and computes of them. Counts are exact.

Symbols: h hidden, q = heads * head_dim, kv = kv_heads * head_dim, f MLP width, r rank.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from planner.specs.adapter import Adapter, Target
from planner.specs.job import Job
from planner.specs.layers import LayerGroup
from planner.specs.model import FlopsConvention, Model

Split = Literal["column", "row", "whole"]


class Projection(NamedTuple):
    """One matrix of a layer, or one of each routed expert."""

    name: str
    target: Target
    inputs: int
    outputs: int
    split: Split
    """What tensor parallelism (of experts: their own) splits: outputs (column), inputs (row), or nothing."""
    experts: int = 1
    """How many of it a layer has."""

    @property
    def weights(self) -> int:
        """Weights of one."""
        return self.inputs * self.outputs

    def adapter_params(self, rank: int) -> int:
        """Parameters of one A and B: r (in + out) (LoRA, arXiv 2106.09685, section 4.1)."""
        return rank * (self.inputs + self.outputs)


def projections(model: Model, group: LayerGroup) -> list[Projection]:
    """The matrices of one layer of `group` that can be adapted: all but the router and the shared experts' gate."""
    mlp, h = group.mlp, model.hidden_of(group)
    found = _latent(model, group) if group.attention.kind == "latent" else _attention(model, group)
    firsts = ("gate", "up") if mlp.kind == "gated" else ("up",)
    if width := mlp.dense_width:
        found += [Projection(name, "mlp", h, width, "column") for name in firsts]
        found.append(Projection("down", "mlp", width, h, "row"))
    if mlp.routed:
        found += [Projection(f"experts' {name}", "experts", h, mlp.width, "column", mlp.experts) for name in firsts]
        found.append(Projection("experts' down", "experts", mlp.width, h, "row", mlp.experts))
    return found


def _attention(model: Model, group: LayerGroup) -> list[Projection]:
    """Query, key, value, the gate where there is one, and output."""
    a, h, d = group.attention, model.hidden_of(group), model.head_dim_of(group)
    q, kv = a.heads * d, (a.kv_heads or a.heads) * d
    widths = {"query": q, "key": kv, "value": kv} | ({"output gate": q} if a.output_gate else {})
    firsts = [Projection(name, "attention", h, width, "column") for name, width in widths.items()]
    return [*firsts, Projection("attention output", "attention", q, h, "row")]


def _latent(model: Model, group: LayerGroup) -> list[Projection]:
    """Down to the latents, which no rank splits, up to the heads, and output (arXiv 2405.04434, section 2.1)."""
    a, h, d = group.attention, model.hidden_of(group), model.head_dim_of(group)
    q, kv, v = a.q_lora_rank, a.kv_lora_rank or 0, model.v_dim_of(group)
    query = [Projection("query", "attention", h, a.heads * d, "column")]
    if q:
        query = [
            Projection("query down", "attention", h, q, "whole"),
            Projection("query up", "attention", q, a.heads * d, "column"),
        ]
    return [
        *query,
        Projection("key/value down", "attention", h, kv + a.rope_dim, "whole"),
        Projection("key/value up", "attention", kv, a.heads * (d - a.rope_dim + v), "column"),
        Projection("attention output", "attention", a.heads * v, h, "row"),
    ]


def adapted(model: Model, group: LayerGroup, adapter: Adapter) -> list[Projection]:
    """The matrices of one layer of `group` that have an adapter."""
    return [p for p in projections(model, group) if p.target in adapter.targets]


def trained_params(model: Model, job: Job) -> int:
    """Parameters that the job trains: all of them, or those of its adapter."""
    adapter = job.adapter
    if adapter is None:
        return model.total_params
    layers = sum(g.count * p.experts * p.adapter_params(adapter.rank) for g in model.layers for p in adapted(model, g, adapter))
    return layers + (_ends(model) if adapter.train_embeddings else 0)


def _ends(model: Model) -> int:
    """Parameters outside the layers: embedding with positions and front ends, final norm, head."""
    return model.embedding_params + model.position_params + model.front_params + model.norm_params + model.head_params


def training_flops(model: Model, job: Job, convention: FlopsConvention = "full") -> float:
    """Training FLOPs a token of a job, forward and backward, without recompute.

    Of full training, `Model.flops_per_token`. With an adapter a frozen matrix has no weight gradient, so 4 FLOPs a weight
    in place of 6 (QLoRA, arXiv 2305.14314, section 2: gradients pass through the frozen weights); A and B have 6.
    """
    full = model.flops_per_token(job.seq_len, convention)
    adapter = job.adapter
    if adapter is None:
        return full
    frozen = model.product_params(job.seq_len)
    if adapter.train_embeddings:
        frozen -= model.vocab * model.hidden * (1 + model.mtp)
    added = 0.0
    for group in model.layers:
        share = group.front.tokens / job.seq_len if group.front else 1.0
        for p in adapted(model, group, adapter):
            visited = group.mlp.top_k if p.target == "experts" else 1
            added += share * group.count * visited * p.adapter_params(adapter.rank)
    return full - 2.0 * frozen + 6.0 * added
