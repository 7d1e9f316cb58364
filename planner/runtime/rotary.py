"""Rotary positions (Su 2021, arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor

from planner.specs.model import Model


def rotary_tables(model: Model, width: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the angles that turn `width` dimensions of a head, each [s, 1, width / 2] fp32, for `positions` [s]."""
    half = width // 2
    frequency = model.rope_theta ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    angle = torch.outer(positions.float(), frequency)
    return angle.cos()[:, None, :], angle.sin()[:, None, :]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate halves of the first dimensions of each head, as many as the tables are for; x [b, s, heads, d], fp32 inside."""
    width = 2 * cos.shape[-1]
    a, b = x[..., :width].float().chunk(2, dim=-1)
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), dim=-1)
