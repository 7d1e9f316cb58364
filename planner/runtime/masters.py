"""fp32 masters beside parameters in bf16, where no FSDP2 keeps them: dense models on one data-parallel rank.

Products then read parameters without a cast, gradients come in bf16, and AdamW (`optim`) reads the gradient, updates the
master and writes the parameter in one pass. With several micro-batches gradients add up in fp32. Engine trait `bf16-states`
leaves the masters out: parameters, gradients and AdamW's states are bf16 then, as torchtitan's `training.dtype = bfloat16`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from planner.specs.job import Job
from planner.specs.layout import SPLIT_BACKWARD, Layout
from planner.specs.model import Model


def lowered(layout: Layout, job: Job, model: Model) -> bool:
    """Whether a job's parameters are in bf16; for the planner's arrays `cost.memory.alone` says the same.

    fp16 gradients have to lose the loss scale in fp32, experts are units of FSDP2, and a backward in two halves sets gradients
    by itself.
    """
    whole = layout.dp * layout.cp == 1 and layout.schedule not in SPLIT_BACKWARD
    return whole and job.precision == "bf16" and not model.routed_mlps


def add(params: Iterable[nn.Parameter]) -> None:
    """Give allocated parameters their masters."""
    for param in params:
        param.master = torch.empty_like(param, dtype=torch.float32, requires_grad=False)  # type: ignore[attr-defined]


def add_up_in_fp32(params: Iterable[nn.Parameter]) -> None:
    """Let the gradients of several micro-batches add up in fp32, beside parameters of another type.

    torch's own `grad_dtype` fails under torch.compile in torch 2.11.
    """
    for param in params:
        param.register_post_accumulate_grad_hook(_add_up)  # type: ignore[no-untyped-call]


def _add_up(param: Any) -> None:
    """Move a fresh gradient to the sum: as plain tensors, since a DTensor takes the host 0.1 ms for each operation."""
    fresh, total = param.grad, getattr(param, "gradient_sum", None)
    param.grad = None
    if not isinstance(fresh, DTensor):
        param.gradient_sum = fresh.float() if total is None else total.add_(fresh)
    elif total is None:
        param.gradient_sum = DTensor.from_local(
            fresh.to_local().float(), fresh.device_mesh, fresh.placements, shape=fresh.shape, stride=fresh.stride()
        )
    else:
        total.to_local().add_(fresh.to_local())


def values(param: Tensor) -> Tensor:
    """What is trained of a parameter: its master, or itself."""
    return getattr(param, "master", param)


def gradient(param: Tensor) -> Tensor | None:
    """The gradient of a parameter: its sum in fp32 where it has one."""
    total: Tensor | None = getattr(param, "gradient_sum", None)
    return param.grad if total is None else total


def set_gradient(param: Tensor, value: Tensor | None) -> None:
    """Replace the gradient, or clear it."""
    if getattr(param, "gradient_sum", None) is None:
        param.grad = value
    else:
        param.gradient_sum = value  # type: ignore[attr-defined]


def refresh(params: Iterable[Tensor]) -> None:
    """Write masters that came from somewhere else into their parameters."""
    with torch.no_grad():
        for param in params:
            if values(param) is not param:
                param.copy_(values(param))
