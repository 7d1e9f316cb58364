"""How much compute and collectives that run beside each other slow each other down."""

from __future__ import annotations

from typing import Any

from planner.measure.bench import Bench
from planner.measure.gemm import compute_types, product
from planner.measure.sustained import both_ways

_BYTES = {"cuda": 1 << 28, "cpu": 1 << 21}
OPERATIONS = ("all_gather", "reduce_scatter", "all_reduce")


def measure(b: Bench) -> None:
    """Seconds of a layer's products alone, of a few collectives alone, and until both are done when they start together.

    The whole counts, not the products alone: products that fill the device keep collectives waiting, which costs as much.
    """
    import torch
    import torch.distributed as dist

    calls = [product(s, compute_types(b.kind)[0], b.device) for s in both_ways(b.kind)]
    whole = torch.zeros(_BYTES[b.kind] // 4 // b.world * b.world, device=b.device)
    part = torch.zeros(whole.numel() // b.world, device=b.device)
    starts = {
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part, async_op=True),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole, async_op=True),
        "all_reduce": lambda: dist.all_reduce(whole, async_op=True),
    }

    def compute() -> None:
        for call in calls:
            call()

    for name in b.cases(OPERATIONS, together=True):
        try:
            alone, traffic, both = _together(b, compute, starts[name])
        except RuntimeError:
            continue  # the library lacks the operation, on all ranks alike
        b.record(f"{name}: compute alone", alone)
        b.record(f"{name}: traffic alone", traffic)
        b.record(f"{name}: both", both)


def _together(b: Bench, compute: Any, start: Any) -> tuple[float, float, float]:
    """(compute alone, traffic alone, both), traffic as long as most of the compute; medians of five rounds in turn."""
    import torch
    import torch.distributed as dist

    def traffic(count: int, beside: Any = None) -> None:
        pending = [start() for _ in range(count)]
        if beside is not None:
            beside()
        for work in pending:
            work.wait()

    traffic(1)
    compute()
    ratio = torch.tensor([b.clock.at_once(compute) / max(b.clock.at_once(lambda: traffic(2)) / 2, 1e-7)], device=b.device)
    dist.all_reduce(ratio, op=dist.ReduceOp.MAX)
    count = max(1, min(100, int(0.8 * ratio.item())))
    rounds = []
    for _ in range(5):
        once = []
        for call in (compute, lambda: traffic(count), lambda: traffic(count, compute)):
            b.clock.synchronize()
            dist.barrier()
            once.append(b.clock.at_once(call))
        rounds.append(once)
    alone, apart, both = (sorted(values)[2] for values in zip(*rounds, strict=True))
    return alone, apart, both
