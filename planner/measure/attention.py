"""Causal attention, forward and backward, by each fused kernel that PyTorch has for the device."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

from planner.measure.bench import Bench
from planner.measure.gemm import compute_types, torch_type


class Call(NamedTuple):
    """One call: `sequences` of `length` tokens, query heads over kv heads."""

    sequences: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int


_CALLS = {
    "cuda": (
        Call(1, 8192, 32, 8, 128), Call(1, 4096, 32, 8, 128), Call(4, 2048, 32, 8, 128), Call(1, 32768, 8, 1, 128),
        Call(4, 4096, 16, 4, 128), Call(2, 16384, 8, 2, 128), Call(4, 8192, 8, 1, 128), Call(1, 8192, 16, 4, 128),
        Call(8, 1024, 32, 8, 128), Call(4, 4096, 32, 32, 64),
    ),
    "cpu": (Call(4, 256, 4, 4, 32), Call(1, 1024, 4, 4, 32), Call(2, 512, 4, 4, 32), Call(8, 128, 4, 4, 32)),
}  # fmt: skip
BACKENDS = {"cuda": ("default", "cudnn", "flash"), "cpu": ("default",)}


def measure(b: Bench) -> None:
    """Seconds of each call, forward and backward, by back end; a back end that refuses a call has no row."""
    calls = _CALLS[b.kind]
    budget = b.each(2 * len(calls) * len(BACKENDS[b.kind]))
    for call in b.cases(calls, least=3):
        for backend in BACKENDS[b.kind]:
            try:
                forward, backward = _seconds(b, call, backend, budget)
            except RuntimeError:
                continue
            b.record(f"{backend} forward", forward, **call._asdict())
            b.record(f"{backend} backward", backward, **call._asdict())


def _seconds(b: Bench, call: Call, backend: str, budget: float) -> tuple[float, float]:
    import torch

    dtype = torch_type(compute_types(b.kind)[0])

    def tensor(heads: int) -> torch.Tensor:
        shape = (call.sequences, heads, call.length, call.head_dim)
        return torch.randn(shape, device=b.device, dtype=dtype, requires_grad=True)

    q, k, v = tensor(call.heads), tensor(call.kv_heads), tensor(call.kv_heads)

    def forward() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=call.heads != call.kv_heads)

    with _only(backend):
        first = b.clock.seconds(forward, budget)
        out = forward()
        gradient = torch.randn_like(out)
        second = b.clock.seconds(lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True), budget)
    return first, second


def _only(backend: str) -> Any:
    if backend == "default":
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel({"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[backend])
