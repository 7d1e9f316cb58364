"""RMS norm and layer norm with fp32 statistics, and how parameters that tp does not split take part in it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planner.runtime.replicated import Replicated, whole
from planner.specs.model import Model


class _RmsNormCpu(torch.autograd.Function):
    """RMSNorm that saves x, weight and one fp32 value a row, as CUDA's fused kernel does.

    `F.rms_norm` on a CPU saves two fp32 copies of x instead. Rows go in blocks, so that fp32 temporaries stay small:
    a metered CPU run then shows the bytes of a CUDA run.
    """

    ROWS_X_WIDTH = 1 << 16

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:  # type: ignore[no-untyped-def]
        width = x.shape[-1]
        rows = x.reshape(-1, width)
        out, rstd = torch.empty_like(rows), torch.empty(rows.shape[0], 1, dtype=torch.float32)
        step = max(1, _RmsNormCpu.ROWS_X_WIDTH // width)
        for i in range(0, rows.shape[0], step):
            part = rows[i : i + step].float()
            rstd[i : i + step] = torch.rsqrt(part.pow(2).mean(-1, keepdim=True) + epsilon)
            out[i : i + step] = part * rstd[i : i + step] * weight.float()
        ctx.save_for_backward(x, weight, rstd)
        return out.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        x, weight, rstd = ctx.saved_tensors
        width = x.shape[-1]
        rows, grads = x.reshape(-1, width), grad.reshape(-1, width)
        dx, dw = torch.empty_like(rows), torch.zeros(width, dtype=torch.float32)
        step = max(1, _RmsNormCpu.ROWS_X_WIDTH // width)
        for i in range(0, rows.shape[0], step):
            r = rstd[i : i + step]
            normed, g = rows[i : i + step].float() * r, grads[i : i + step].float()
            dw += (g * normed).sum(0)
            g = g * weight.float()
            dx[i : i + step] = (g - normed * (g * normed).mean(-1, keepdim=True)) * r
        return dx.view_as(x), dw.to(weight.dtype), None


class Norm(Replicated):
    """RMSNorm or LayerNorm over the last dimension, in the compute type with fp32 statistics."""

    def __init__(self, width: int, kind: str, bias: bool, epsilon: float, weight: bool = True):
        super().__init__()
        self.kind, self.epsilon, self.shape = kind, epsilon, [width]
        self.weight = nn.Parameter(torch.empty(width)) if weight else None
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else whole(self.weight)
        if self.kind == "layernorm":
            bias = None if self.bias is None else whole(self.bias)
            return F.layer_norm(x, self.shape, weight, bias, self.epsilon)
        if weight is None or x.is_cuda or torch.compiler.is_compiling():
            return F.rms_norm(x, self.shape, weight, self.epsilon)
        out: Tensor = _RmsNormCpu.apply(x, weight, self.epsilon)  # type: ignore[no-untyped-call]
        return out


def norm_of(model: Model, width: int | None = None) -> Norm:
    """A norm over the hidden width, or one of queries or keys over `width`."""
    if width is not None:  # the norm of queries and keys is always an RMS norm
        return Norm(width, "rmsnorm", False, model.norm_epsilon)
    return Norm(model.hidden, model.norm, model.has_norm_bias, model.norm_epsilon, model.norm_weight)
