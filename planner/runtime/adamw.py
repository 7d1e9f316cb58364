"""The arithmetic of AdamW on one tensor, in fp32: on CUDA one compiled kernel, on a CPU torch's fused one, piece by piece."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

PIECE = 1 << 16
"""Elements that a CPU updates at once: what it converts takes no memory to speak of."""


class Values(NamedTuple):
    """What a group of parameters is updated with."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    decay: float


def coefficients(values: Values, step: float, device: torch.device) -> Tensor:
    """[size of the step, 1 / sqrt(1 - beta2^step), what the weight keeps, the step]: a tensor, since a new rate or step would
    compile the kernel anew."""
    size, root = values.lr / (1 - values.beta1**step), (1 - values.beta2**step) ** -0.5
    on_cuda = device.type == "cuda"  # from pageable memory the host would wait until the device gets there
    figures = torch.tensor([size, root, 1 - values.lr * values.decay, step], dtype=torch.float32, pin_memory=on_cuda)
    return figures.to(device, non_blocking=True)


def update(
    weight: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    coefficients: Tensor,
    values: Values,
    clip: Tensor | None,
    copy: Tensor | None,
) -> None:
    """One step of `weight` [n] and its moments in place; `copy`, its value in the compute type, is written too.

    `gradient` of any type is multiplied by the scalar `clip`; where that is NaN nothing changes.
    """
    if not weight.numel():
        return
    if weight.is_cuda:
        _kernel()(weight, gradient, mean, square, coefficients, values.beta1, values.beta2, values.eps, clip, copy)
        return
    if clip is None and gradient.dtype == weight.dtype and copy is None:
        _fused(weight, gradient, mean, square, coefficients, values)
        return
    factor = 1.0 if clip is None else float(clip)
    if math.isnan(factor):
        return
    for i in range(0, weight.numel(), PIECE):
        piece = slice(i, i + PIECE)
        part = gradient[piece].to(weight.dtype) * factor
        _fused(weight[piece], part, mean[piece], square[piece], coefficients, values)
        if copy is not None:
            copy[piece] = weight[piece]


def _fused(weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, coefficients: Tensor, values: Values) -> None:
    lr, beta1, beta2, eps, decay = values
    adamw(
        [weight], [gradient], [mean], [square], [], [coefficients[3] - 1], fused=True, amsgrad=False, maximize=False,
        lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=decay,
    )  # fmt: skip


@functools.cache
def _kernel() -> Callable[..., Any]:
    return torch.compile(arithmetic, dynamic=True)


def arithmetic(
    weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, coefficients: Tensor,
    beta1: float, beta2: float, eps: float, clip: Tensor | None, copy: Tensor | None,
) -> None:  # fmt: skip
    """What is compiled; arguments as in `update`."""
    size, root, keep, _ = coefficients.unbind()
    g = gradient.float() if clip is None else gradient.float() * clip
    m = torch.lerp(g, mean.float(), beta1)
    v = square.float() * beta2 + g * g * (1 - beta2)
    w = weight.float() * keep - size * m / (v.sqrt() * root + eps)
    if clip is not None:
        good = ~clip.isnan()
        m, v, w = torch.where(good, m, mean), torch.where(good, v, square), torch.where(good, w, weight)
    mean.copy_(m)
    square.copy_(v)
    weight.copy_(w)
    if copy is not None:
        copy.copy_(w)
