"""Products back to back for seconds, as in training: clocks fall under sustained load, which single timings do not show."""

from __future__ import annotations

import time
from typing import Any

from planner.measure.bench import Bench
from planner.measure.gemm import Shape, compute_types, product

CHAIN = {
    "cuda": (Shape(8192, 6144, 4096), Shape(8192, 4096, 4096), Shape(8192, 28672, 4096), Shape(8192, 4096, 14336)),
    "cpu": (Shape(512, 384, 256), Shape(512, 256, 256), Shape(512, 2048, 256), Shape(512, 256, 1024)),
}
"""The projections of one layer; with their input gradients, which have the same sizes in another order."""
LEAST_SECONDS = {"cuda": 4.0, "cpu": 0.5}


def measure(b: Bench) -> None:
    """Seconds of one pass over the chain, at the end of seconds of passes; a row for each of its products' sizes."""
    calls = [product(s, compute_types(b.kind)[0], b.device) for s in both_ways(b.kind)]

    def once() -> None:
        for call in calls:
            call()

    first = b.clock.seconds(once, 0.05)
    load = max(LEAST_SECONDS[b.kind], b.each(2))
    count = max(1, int(0.25 / first)) if b.kind == "cuda" else 1
    end = time.monotonic() + load
    while time.monotonic() < end:
        last = _passes(b, once, count)
    b.record("first", first)
    b.record("hot", last)


def both_ways(kind: str) -> list[Shape]:
    """The chain and the input gradients of its products."""
    return [shape for s in CHAIN[kind] for shape in (s, Shape(s.m, s.k, s.n))]


def _passes(b: Bench, once: Any, count: int) -> float:
    """Mean seconds of a pass over `count` of them; products are long enough for the host to stay ahead."""
    start = time.perf_counter()
    for _ in range(count):
        once()
    b.clock.synchronize()
    return (time.perf_counter() - start) / count
