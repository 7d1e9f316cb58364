"""fp32 masters beside parameters in bf16, where no FSDP2 keeps them: dense models on one data-parallel rank.

Products then read parameters without a cast, gradients come in bf16, and AdamW (`optim`) reads the gradient, updates the
master and writes the parameter in one pass. With several micro-batches gradients add up in fp32. Engine trait `bf16-states`
leaves the masters out: parameters, gradients and AdamW's states are bf16 then, as torchtitan's `training.dtype = bfloat16`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

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
    """Let the gradients of several micro-batches add up in fp32."""
    for param in params:
        param.grad_dtype = torch.float32


def values(param: Tensor) -> Tensor:
    """What is trained of a parameter: its master, or itself."""
    return getattr(param, "master", param)


def refresh(params: Iterable[Tensor]) -> None:
    """Write masters that came from somewhere else into their parameters."""
    with torch.no_grad():
        for param in params:
            if values(param) is not param:
                param.copy_(values(param))
