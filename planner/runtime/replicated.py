"""Modules whose parameters every tensor parallel rank holds whole and uses on its own tokens: norms, routers, latents."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate


class Replicated(nn.Module):
    """Base of such modules: tensor parallelism makes their parameters replicated DTensors, read through `whole`."""


def whole(param: Tensor) -> Tensor:
    """The local value of a parameter that every tensor parallel rank holds whole.

    Each rank uses it on its own tokens or heads, so its gradient is a part of a sum over the tp group. FSDP2 makes that sum as
    it reduces the gradient, `add_up` where there is none.
    """
    return param.to_local(grad_placements=[Partial()]) if isinstance(param, DTensor) else param


def is_part(gradient: DTensor, param: DTensor) -> bool:
    """Whether a gradient is such a part still."""
    return gradient.placements == (Partial(),) and param.placements == (Replicate(),)


def add_up(gradients: list[DTensor]) -> list[DTensor]:
    """Sums over the group of parts of one mesh and type, in one all-reduce. Collective."""
    mesh = gradients[0].device_mesh
    parts = [g.to_local() for g in gradients]
    together = torch.cat([p.flatten() for p in parts])
    dist.all_reduce(together, group=mesh.get_group())
    sums = torch.split(together, [p.numel() for p in parts])
    return [DTensor.from_local(s.view_as(p), mesh, [Replicate()]) for s, p in zip(sums, parts, strict=True)]
