"""What a process holds and waits for before it does anything useful: context, workspaces, launches, communicators."""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Any

from planner.measure.bench import Bench

_LAUNCHES = {"cuda": 200, "cpu": 2000}


def total_memory(kind: str) -> int:
    """Bytes that the device has, as the runtime reports them; of a CPU, what this host may use."""
    if kind == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[1])
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue
    return total


def held(kind: str) -> int:
    """Bytes that this process holds outside the allocator: on a device all that is used; on a CPU its resident memory."""
    if kind == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return int(total - free - torch.cuda.memory_reserved())
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(b: Bench) -> None:
    """Memory held with nothing loaded and after the kernels of a layer, the workspace of a product, one launch."""
    import torch

    torch.ones(1, device=b.device)
    b.record("total memory", total_memory(b.kind))
    b.record("context before kernels", held(b.kind))
    dtype = torch.bfloat16 if b.kind == "cuda" else torch.float32
    size = 1024 if b.kind == "cuda" else 64
    x = torch.randn(size, size, device=b.device, dtype=dtype, requires_grad=True)
    before = torch.cuda.memory_allocated() if b.kind == "cuda" else 0
    with torch.no_grad():
        y = torch.nn.functional.linear(x, x)
    if b.kind == "cuda":
        b.record("workspace", torch.cuda.memory_allocated() - before - y.nbytes)
    heads = torch.nn.functional.rms_norm(x, (size,)).view(1, size, -1, 64).transpose(1, 2)
    total = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True).sum()
    total.backward()  # type: ignore[no-untyped-call]
    del y, heads, total
    b.record("context", held(b.kind))
    b.record("launch", _launch(b))


def _launch(b: Bench) -> float:
    """Host seconds of one small operation; on a CPU, which launches and computes at once, with autograd's part."""
    import torch

    x = torch.ones(16, device=b.device, requires_grad=b.kind == "cpu")
    out = torch.ones(16, device=b.device)
    call: Any = (lambda: x * out) if b.kind == "cpu" else (lambda: out.add_(x))
    b.clock.host_seconds(call, _LAUNCHES[b.kind])
    return statistics.median(b.clock.host_seconds(call, _LAUNCHES[b.kind]) for _ in range(7))
