"""What stands between the two products of an MLP, dense or of an expert."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from planner.specs.layers import Mlp as Spec

CLAMP = 7.0
"""Bound of `clamped_silu` (gpt-oss: gate and up are clamped, the gate's sigmoid is steeper, 1 is added to up)."""
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "clamped_silu": lambda x: x * torch.sigmoid(1.702 * x),
}


def activation_of(spec: Spec) -> str:
    """The function's name: silu in gated layers, the tanh form of gelu in others, unless the spec names one."""
    return spec.activation or ("silu" if spec.kind == "gated" else "gelu_tanh")


def activate(name: str, inner: Tensor, up: Tensor | None) -> Tensor:
    """act(inner), times `up` in a gated layer (Shazeer 2020, arXiv 2002.05202)."""
    if name == "clamped_silu":
        inner, up = inner.clamp(max=CLAMP), None if up is None else up.clamp(-CLAMP, CLAMP) + 1.0
    inner = _FUNCTIONS[name](inner)
    return inner if up is None else inner * up
