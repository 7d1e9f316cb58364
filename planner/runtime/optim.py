"""AdamW, gradient clipping over the whole grid, and the learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from planner.runtime.mesh import World
from planner.specs.training import Options


def build_optimizer(params: Iterable[nn.Parameter], lr: float) -> torch.optim.AdamW:
    """AdamW, decay on matrices only. Fused: the for-each variant allocates another 4 bytes a parameter."""
    params = list(params)
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


DECAY_SHARE = 0.2
"""Of all steps, the last ones in which `wsd` falls (Hu 2024, arXiv 2404.06395, uses a tenth to a fifth)."""


def learning_rate(step: int, options: Options) -> float:
    """The rate of a step: a linear warm-up, then the schedule down to `min_lr` times the peak."""
    steps = options.steps
    warmup = max(1, min(100, steps // 10)) if options.warmup_steps < 0 else options.warmup_steps
    if step < warmup:
        return options.lr * (step + 1) / warmup
    if options.lr_schedule == "constant":
        return options.lr
    begin = warmup if options.lr_schedule != "wsd" else max(warmup, steps - int(DECAY_SHARE * steps))
    done = min(1.0, max(0, step - begin) / max(1, steps - begin))
    left = (1 + math.cos(math.pi * done)) / 2 if options.lr_schedule == "cosine" else 1 - done
    return options.lr * (options.min_lr + (1 - options.min_lr) * left)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(params: list[nn.Parameter], max_norm: float, world: World) -> float:
    """Scale gradients to a global norm of at most `max_norm`; returns the norm before.

    Each parameter counts once: DTensor norms cover dp and tp, one all-reduce adds the pipeline's stages.
    """
    grads = [p.grad for p in params if p.grad is not None]
    norm = get_total_norm(grads)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if world.pp > 1:
        squared = norm**2
        dist.all_reduce(squared, group=world.mesh["pp"].get_group())
        norm = squared**0.5
    if math.isfinite(value := float(norm)):  # else the caller looks for the gradient that is not, before it is spread
        clip_grads_with_norm_(params, max_norm, norm)
    return value


def full_gradients(named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Unsharded fp32 gradients by name. Collective over the ranks that share a stage; raises when one is missing.

    A missing gradient is how some wrong combinations of parallelism show.
    """
    full: dict[str, Tensor] = {}
    for name, param in named:
        if param.grad is None:
            raise RuntimeError(f"{name} has no gradient")
        grad = param.grad.full_tensor() if isinstance(param.grad, DTensor) else param.grad
        full[name] = grad.detach().float().clone()  # clipping scales the original in place
    return full
