"""Kernels that only move memory, and copies between host and device."""

from __future__ import annotations

from typing import Any

from planner.measure.bench import Bench
from planner.measure.gemm import compute_types, torch_type

ADAMW_BYTES = 28
"""Bytes that a fused AdamW step moves for each fp32 parameter: parameter, gradient and two states read, all but the gradient
written."""
_BYTES = {"cuda": (1 << 27, 1 << 29, 1 << 31), "cpu": (1 << 24, 1 << 25)}
_HOST_BYTES = 1 << 28
_PARAMETERS = {"cuda": 1 << 27, "cpu": 1 << 21}
MOVES = {"copy": 2, "add": 3, "norm": 2}
"""Passes over a tensor's bytes."""


def measure(b: Bench) -> None:
    """copy, add and RMS norm by size; fused AdamW; pinned copies in both directions. `bytes`: all that is moved."""
    budget = b.each(3 * len(_BYTES[b.kind]) + 3)
    for size in b.cases(_BYTES[b.kind], least=2):
        for name, call in _streams(b, size).items():
            if name == "norm" and b.kind == "cpu" and size != _BYTES["cpu"][0]:
                continue  # several plain kernels there, slow enough once
            b.record(name, b.clock.seconds(call, budget), bytes=MOVES[name] * size)
    b.record("adamw", b.clock.seconds(_adamw(b), budget), bytes=ADAMW_BYTES * _PARAMETERS[b.kind])
    if b.kind == "cuda":
        for name, call in _host_copies().items():
            b.record(name, b.clock.seconds(call, budget), bytes=_HOST_BYTES)


def _streams(b: Bench, size: int) -> dict[str, Any]:
    import torch

    dtype = torch_type(compute_types(b.kind)[0])
    width = 4096 if b.kind == "cuda" else 256
    x = torch.randn(size // dtype.itemsize // width, width, device=b.device, dtype=dtype)
    y, scale = torch.empty_like(x), torch.ones(width, device=b.device, dtype=dtype)
    return {
        "copy": lambda: y.copy_(x),
        "add": lambda: torch.add(x, y, out=y),
        "norm": lambda: torch.nn.functional.rms_norm(x, (width,), scale),
    }


def _adamw(b: Bench) -> Any:
    import torch

    parameter = torch.randn(_PARAMETERS[b.kind], device=b.device, requires_grad=True)
    parameter.grad = torch.randn_like(parameter)
    return torch.optim.AdamW([parameter], fused=True).step


def _host_copies() -> dict[str, Any]:
    import torch

    host = torch.empty(_HOST_BYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(_HOST_BYTES, dtype=torch.uint8, device="cuda")
    return {
        "to device": lambda: device.copy_(host, non_blocking=True),
        "to host": lambda: host.copy_(device, non_blocking=True),
    }
