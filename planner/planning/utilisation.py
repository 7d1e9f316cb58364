"""How well the devices are used: MFU in two conventions, and HFU with the recompute that a layout really has.

Comes in: a task, a layout and its tokens a second. Goes out: shares of the dense peak at the job's precision.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.cost.task import Task
from planner.specs.layout import Layout
from planner.specs.model import LayerGroup
from planner.specs.projections import training_flops


@dataclass(frozen=True)
class Utilisation:
    """Shares of the dense peak of one device."""

    model_flops: float
    """Model FLOP/s of one device, full attention."""
    mfu: float
    """Model FLOPs with full attention (PaLM, arXiv 2204.02311, appendix B; without the input embedding)."""
    mfu_causal: float
    """The same with the keys that a causal query sees."""
    hfu: float
    """`mfu` and what recompute repeats: hardware FLOPs (Korthikanti 2022, arXiv 2205.05198, section 6.3)."""


def utilisation(task: Task, layout: Layout, tokens_per_s_per_gpu: float) -> Utilisation:
    """Utilisation at a measured or predicted speed, tokens a second of one device. Raises InputError without a peak rate."""
    peak = task.peak
    full = training_flops(task.model, task.job) * tokens_per_s_per_gpu
    causal = training_flops(task.model, task.job, "causal") * tokens_per_s_per_gpu
    again = repeated_flops(task, layout) * tokens_per_s_per_gpu
    return Utilisation(full, full / peak, causal / peak, (full + again) / peak)


def repeated_flops(task: Task, layout: Layout) -> float:
    """FLOPs a token that recompute repeats, over all stages, with full attention.

    A mode repeats the shares of a layer's forward products and attention that the engine's accounting states
    (`Accounting.recomputed`), as the cost model's times do. Layers of several kinds count by their mean.
    """
    layers = [0, 0]
    for stage in layout.stages:
        layers = [n + more for n, more in zip(layers, stage.counts, strict=True)]
    shares = [task.accounting.recomputed[mode] for mode in ("selective", "full")]
    forward: dict[str, float] = {}
    for group in task.model.layers:
        for part, flops in forward_flops(task, group).items():
            forward[part] = forward.get(part, 0.0) + flops * group.count / task.model.n_layers
    return sum(
        n * sum(share.get(part, 0.0) * forward[part] for part in forward) for n, share in zip(layers, shares, strict=True)
    )


def forward_flops(task: Task, group: LayerGroup) -> dict[str, float]:
    """FLOPs a token of one layer's forward by kind of operator: `gemm`, `experts` and `attention` (full)."""
    model, length = task.model, task.job.seq_len
    tokens = group.front.tokens if group.front else length
    mlp = group.mlp
    experts = 2.0 * mlp.top_k * mlp.matrices * model.hidden_of(group) * mlp.width if mlp.routed else 0.0
    products = 2.0 * model.active_params_of(group)
    attention = model.layer_flops(group, tokens, "full") / 3.0 - products
    share = tokens / length
    return {"gemm": share * (products - experts), "experts": share * experts, "attention": share * attention}
