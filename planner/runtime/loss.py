"""The loss: mean cross-entropy over a micro-batch, in fp32, with the vocabulary split under tensor parallelism."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

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
