"""torch's all-gather and reduce-scatter of one tensor, by the names of torch 2.13, which deprecates those of 2.11; a vote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""(whole [n * ranks, ...], own [n, ...], group=, async_op=)."""
reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""(own [n, ...], whole [n * ranks, ...], op=, group=, async_op=)."""


def everywhere(ok: bool, device: torch.device, group: dist.ProcessGroup | None = None) -> bool:
    """Whether it is so on every rank of the group, of all when left out. Collective."""
    count = torch.full((), float(ok), device=device)
    dist.all_reduce(count, dist.ReduceOp.MIN, group=group)
    return bool(count.item())
