"""AdamW, gradient clipping over the whole grid, and the learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from planner.runtime import adamw, masters
from planner.runtime.mesh import World
from planner.specs.training import Options


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov 2019, arXiv 1711.05101) of fp32 masters or of the parameters themselves, with clipping inside.

    Each tensor is read and written once: gradient, weight, both moments, and the parameter where a master stands beside it.
    States have the names of torch's AdamW, `step`, `exp_avg` and `exp_avg_sq`, in the type of the weights.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float):
        super().__init__(groups, {"lr": lr, "betas": (0.9, 0.95), "eps": 1e-8})
        self.clip: Tensor | None = None
        """What gradients are multiplied by, a scalar; `clip_gradients` sets it for one step. NaN lets the step do nothing."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and their sums."""
        for group in self.param_groups:
            for param in group["params"]:
                masters.set_gradient(param, None)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            values = adamw.Values(group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
            coefficients: dict[tuple[float, torch.device], Tensor] = {}
            for param in group["params"]:
                slope = masters.gradient(param)
                if slope is None:
                    continue
                weight, state = masters.values(param), self._state(param)
                state["step"] += 1
                at = float(state["step"]), param.device
                if at not in coefficients:
                    coefficients[at] = adamw.coefficients(values, *at)
                gradient, mean, square = (_flat(t) for t in (slope, state["exp_avg"], state["exp_avg_sq"]))
                copy = None if weight is param else _flat(param)
                adamw.update(_flat(weight), gradient, mean, square, coefficients[at], values, self.clip, copy)
        self.clip = None

    def _state(self, param: nn.Parameter) -> dict[str, Tensor]:
        state, weight = self.state[param], masters.values(param)
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(weight, requires_grad=False) for _ in range(2))
        return state


def _flat(value: Tensor) -> Tensor:
    """A rank's own elements in one row."""
    return (value.to_local() if isinstance(value, DTensor) else value).data.view(-1)  # a view of `data` is none of a parameter


def build_optimizer(params: Iterable[nn.Parameter], lr: float) -> AdamW:
    """AdamW, decay on matrices only."""
    params = list(params)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW([g for g in groups if g["params"]], lr)


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


def _by_mesh(params: list[nn.Parameter]) -> list[list[Tensor]]:
    """Gradients, those of one mesh together."""
    groups: dict[object, list[Tensor]] = {}
    for param in params:
        if (slope := masters.gradient(param)) is not None:
            groups.setdefault(slope.device_mesh if isinstance(slope, DTensor) else None, []).append(slope)
    return list(groups.values())


def global_norm(params: list[nn.Parameter], world: World) -> Tensor:
    """Norm of all gradients of the grid, the same on every rank. Collective.

    Each parameter counts once: DTensor norms cover the ranks of their own mesh (experts have another one than the rest, and
    one operation takes tensors of one mesh only), and one all-reduce adds the pipeline's stages.
    """
    norms = []
    for group in _by_mesh(params):
        each = torch._foreach_norm(group, 2.0, dtype=torch.float32)
        norm = torch.stack(list(each)).norm()
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    if world.pp > 1:
        squared = norm**2
        dist.all_reduce(squared, group=world.mesh["pp"].get_group())
        norm = squared**0.5
    return norm


def clip_gradients(optimizer: AdamW, max_norm: float, norm: Tensor) -> None:
    """Let the next step scale gradients of global norm `norm` to at most `max_norm`; one that is not finite changes nothing."""
    optimizer.clip = torch.where(norm.isfinite(), (max_norm / (norm + 1e-6)).clamp(max=1.0), torch.nan)


def full_gradients(named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Unsharded fp32 gradients by name. Collective over the ranks that share a stage; raises when one is missing.

    A missing gradient is how some wrong combinations of parallelism show.
    """
    full: dict[str, Tensor] = {}
    for name, param in named:
        slope = masters.gradient(param)
        if slope is None:
            raise RuntimeError(f"{name} has no gradient")
        grad = slope.full_tensor() if isinstance(slope, DTensor) else slope
        full[name] = grad.detach().float().clone()  # clipping scales the original in place
    return full
