"""Matrix products over the shapes that plans use: projections of real widths, split over tp, and experts' grouped products."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, NamedTuple

from planner.measure.bench import Bench

if TYPE_CHECKING:
    import torch


class Shape(NamedTuple):
    """C[m, n] = A[m, k] B[k, n], `groups` of them in one launch."""

    m: int
    n: int
    k: int
    groups: int = 1


_WIDTHS = {
    "cuda": ((2048, 8192, 512), (4096, 14336, 1024), (8192, 28672, 1024), (16384, 53248, 1024)),
    "cpu": ((128, 512, 64), (256, 1024, 128), (512, 2048, 256)),
}
"""(hidden, MLP, key and value width): 1B, 8B, 70B and 405B Llama layers; of a CPU, what runs there in seconds."""
_TOKENS = {"cuda": (2048, 4096, 8192, 16384), "cpu": (256, 1024, 4096)}
_DEGREES = {"cuda": (1, 2, 4, 8), "cpu": (1, 2, 4)}
_MOST_FLOPS = {"cuda": 1.2e13, "cpu": 2.5e9}
_SKINNY = {"cuda": ((64, 8192, 8192), (256, 8192, 8192), (16384, 16384, 64), (4096, 128256, 4096)), "cpu": ((16, 1024, 1024),)}
"""Products bound by memory, and the head's."""
_EXPERTS = {
    "cuda": (Shape(1024, 14336, 4096, 8), Shape(512, 1536, 2048, 64), Shape(512, 2048, 768, 64), Shape(1024, 4096, 7168, 16)),
    "cpu": (Shape(64, 256, 128, 4),),
}
"""Of Mixtral, Qwen3-30B and DeepSeek-V3, as ep leaves them."""
LARGE = {"cuda": Shape(8192, 8192, 8192), "cpu": Shape(1024, 1024, 1024)}


def shapes(kind: str) -> list[Shape]:
    """Every product, in an order whose beginning stands for the whole: what time is left out is left out evenly."""
    found = {
        Shape(m, n, k)
        for h, f, kv in _WIDTHS[kind]
        for tp in _DEGREES[kind]
        for m in _TOKENS[kind]
        for n, k in (((h + 2 * kv) // tp, h), (h, h // tp), (2 * f // tp, h), (h, f // tp))
        if 2.0 * m * n * k <= _MOST_FLOPS[kind]
    }
    ordered = sorted(found)
    random.Random(0).shuffle(ordered)
    return [LARGE[kind], *(Shape(*s) for s in _SKINNY[kind]), *ordered]


def compute_types(kind: str) -> tuple[str, ...]:
    """The type that the fit is for, first, and others whose peak is only looked at."""
    return ("bf16", "fp16", "fp32") if kind == "cuda" else ("fp32", "bf16", "fp16")


def torch_type(name: str) -> torch.dtype:
    """torch's type of a precision."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def measure(b: Bench) -> None:
    """Products of layers, weight gradients, grouped products, and the best rate of each type."""
    main = compute_types(b.kind)[0]
    listed = shapes(b.kind)
    budget = b.each(min(len(listed), 100))
    for name in compute_types(b.kind):
        s = LARGE[b.kind]
        if name != main and b.kind == "cpu":  # emulated on many CPUs: a hundred times slower
            s = Shape(256, 256, 256)
        b.record(f"best {name}", b.clock.seconds(product(s, name, b.device), budget), **_sizes(s))
    for s in _EXPERTS[b.kind]:
        b.record("grouped", b.clock.seconds(_grouped(s, main, b.device), budget), **_sizes(s))
    for i, s in enumerate(b.cases(listed, least=8)):
        b.record("product", b.clock.seconds(product(s, main, b.device), budget), **_sizes(s))
        if i % 8 == 0:
            weight = Shape(s.k, s.n, s.m)
            b.record("weight gradient", b.clock.seconds(_weight_gradient(weight, main, b.device), budget), **_sizes(weight))


def _sizes(s: Shape) -> dict[str, int]:
    return s._asdict()


def product(s: Shape, name: str, device: str) -> Any:
    """A projection: inputs of a layer by a weight that is stored by rows of outputs."""
    import torch

    a = torch.randn(s.m, s.k, device=device, dtype=torch_type(name))
    w = torch.randn(s.n, s.k, device=device, dtype=torch_type(name))
    return lambda: torch.nn.functional.linear(a, w)


def _weight_gradient(s: Shape, name: str, device: str) -> Any:
    """Inputs by output gradients, both stored by rows of tokens: `s.k` tokens."""
    import torch

    x = torch.randn(s.k, s.m, device=device, dtype=torch_type(name))
    g = torch.randn(s.k, s.n, device=device, dtype=torch_type(name))
    return lambda: x.t() @ g


def _grouped(s: Shape, name: str, device: str) -> Any:
    """Experts with equal rows: torch's grouped kernel where the device has one, else a batched product."""
    import torch

    a = torch.randn(s.groups * s.m, s.k, device=device, dtype=torch_type(name))
    w = torch.randn(s.groups, s.k, s.n, device=device, dtype=torch_type(name))
    kernel = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if kernel is not None and device == "cuda":
        ends = torch.arange(1, s.groups + 1, device=device, dtype=torch.int32) * s.m
        stored = w.transpose(1, 2).contiguous().transpose(1, 2)
        try:
            kernel(a, stored, offs=ends)
            return lambda: kernel(a, stored, offs=ends)
        except (RuntimeError, TypeError):
            pass  # an older device or version
    stacked = a.view(s.groups, s.m, s.k)
    return lambda: torch.bmm(stacked, w)
