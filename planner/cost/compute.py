"""How long compute takes on one device: matrix products, fused attention, memory-bound kernels. Seconds, float64."""

from __future__ import annotations

import numpy as np

from planner.cost.task import Floats
from planner.specs.hardware import Device, GemmTiles

_TILES = ((256, 128, "large"), (128, 256, "large"), (128, 128, "medium"), (64, 64, "small"))


def gemm_seconds(m: Floats, n: Floats, k: Floats, device: Device, peak: float, element_bytes: int) -> Floats:
    """Time of C[m, n] = A[m, k] B[k, n].

    The best tile of a few sizes, its waves over the compute units, under a memory roofline; see `GemmTiles`. A constant
    efficiency misses measured products by 12 to 18 %, this form by 5 to 8 % (fits to published kernel tables).
    """
    g: GemmTiles = device.gemm
    bandwidth = device.memory_bandwidth.base * g.memory_efficiency
    memory = element_bytes * (m * k + k * n + m * n) / bandwidth
    best = np.full(np.broadcast(m, n, k).shape, np.inf)
    for rows, columns, size in _TILES:
        waves = np.ceil(m / rows) * np.ceil(n / columns) / device.compute_units
        waves = np.maximum(1.0, g.wave_rounding * waves + (1 - g.wave_rounding) * np.ceil(waves))
        rate = peak / device.compute_units * getattr(g, size)
        best = np.minimum(best, waves * (2.0 * rows * columns * k / rate + g.tile_overhead_s))
    return g.latency_s + np.maximum(best, memory)


def attention_seconds(
    sequences: Floats, length: Floats, queries: Floats, heads: Floats, head_dim: int, device: Device, peak: float
) -> tuple[Floats, Floats]:
    """(forward, backward) time of fused causal attention: `queries` positions against up to `length` keys each.

    Forward is 0.5 * 4 * b * queries * length * heads * head_dim FLOPs, backward 2.5 times as many (Dao 2023,
    arXiv 2307.08691). The reached share of the peak grows with length and falls when there is too little work to
    fill the device.
    """
    a = device.attention
    flops = 0.5 * 4.0 * sequences * queries * length * heads * head_dim
    tiles = sequences * heads * np.ceil(queries / 128.0)
    occupied = np.minimum(1.0, np.sqrt(tiles / (2.0 * device.compute_units)))
    share = length / (length + a.half_length) * occupied * (1.0 if head_dim >= 128 else 0.8)
    rate = peak * np.maximum(share, 1e-4)
    return flops / (rate * a.forward), 2.5 * flops / (rate * a.backward)


def streaming_seconds(n_bytes: Floats, device: Device) -> Floats:
    """Time of kernels that only move memory."""
    return n_bytes / (device.memory_bandwidth.base * device.memory_efficiency.base)


def overlapped(compute: Floats, comm: Floats, slowdown: float, floor: float) -> Floats:
    """Exposed time of communication beside compute.

    What does not fit under the compute, at least `floor` of it; and the compute runs slower while both run.
    """
    exposed = np.maximum(comm - compute, floor * comm)
    return exposed + (slowdown - 1.0) * np.minimum(compute, comm)
