"""The loss: mean cross-entropy over a micro-batch, in fp32, with the vocabulary split under tensor parallelism."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy. logits [b, s, V] (under tp a DTensor split over V), targets [b, s] int64; a scalar.

    Where the head makes the loss in pieces (`head`), this is not called.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(0, 1))


def split_vocabulary(tp: int) -> AbstractContextManager[None]:
    """Around loss AND backward, once: the context is not re-entrant, an inner exit would disable the outer one."""
    return loss_parallel() if tp > 1 else nullcontext()


def plain(value: Tensor) -> Tensor:
    """A detached plain scalar from a loss that may be a DTensor."""
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


class _Root(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, given: Tensor) -> Tensor:
        ctx.given = given
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.given, None


def root(value: Tensor, given: Tensor) -> Tensor:
    """A loss where backward starts, with a gradient of 1: what made it gets `given`, a scalar that it knows (`Head.given`).

    torch's pipeline starts backward from what its loss function returns, and makes the 1 itself.
    """
    out: Tensor = _Root.apply(value, given)  # type: ignore[no-untyped-call]
    return out
