"""Modules whose parameters every tensor parallel rank holds whole and uses on its own tokens: norms, routers, latents."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate


class Replicated(nn.Module):
    """Base of such modules: tensor parallelism makes their parameters replicated DTensors, read through `whole`."""


def whole(param: Tensor) -> Tensor:
    """The local value of a parameter that every tensor parallel rank holds whole.

    Each rank uses it on its own tokens or heads, so its gradient is a part of a sum over the tp group; the redistribute
    makes that sum in backward.
    """
    if isinstance(param, DTensor):
        redistributed = param.redistribute(placements=[Replicate()])
        return redistributed.to_local(grad_placements=[Partial()])
    return param
