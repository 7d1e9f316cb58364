"""How long compute takes on one device: matrix products, fused attention, memory-bound kernels. Seconds, float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.cost.task import Floats
from planner.specs.hardware import Device, GemmTiles

_TILES = ((256, 128, "large"), (128, 256, "large"), (128, 128, "medium"), (64, 64, "small"))


def gemm_seconds(
    m: Floats, n: Floats, k: Floats, device: Device, peak: float, element_bytes: float, groups: Floats | float = 1.0
) -> Floats:
    """Time of `groups` products C[m, n] = A[m, k] B[k, n] in one launch.

    The best tile of a few sizes, its waves over the compute units, under a memory roofline; see `GemmTiles`. A constant
    efficiency misses measured products by 12 to 18 %, this form by 5 to 8 % (fits to published kernel tables).
    """
    g: GemmTiles = device.gemm
    bandwidth = device.memory_bandwidth.base * g.memory_efficiency
    memory = groups * element_bytes * (m * k + k * n + m * n) / bandwidth
    best = np.full(np.broadcast(m, n, k, groups).shape, np.inf)
    for rows, columns, size in _TILES:
        waves = groups * np.ceil(m / rows) * np.ceil(n / columns) / device.compute_units
        waves = np.maximum(1.0, g.wave_rounding * waves + (1 - g.wave_rounding) * np.ceil(waves))
        rate = peak / device.compute_units * getattr(g, size)
        best = np.minimum(best, waves * (2.0 * rows * columns * k / rate + g.tile_overhead_s))
    return g.latency_s + np.maximum(best, memory)


ODD_RATE = 0.75e12
"""FLOP/s of a compute unit in 16-bit products whose rows begin at odd elements: loads of single elements. Twice that at even
ones. Rows of a multiple of 8 elements have the full rate. Vocabularies of 50257 beside 50258 and 50264: 1.0e12 and 2.0e12 on
H200 at 1.98 GHz (torch 2.11), which is 0.72e12 at the A100's 1.41 GHz."""


def unaligned_seconds(m: Floats, n: Floats, k: Floats, device: Device) -> Floats:
    """Least time of a 16-bit product whose matrices have rows of `n` and `k` elements; 0 where they are aligned."""
    rate = np.where((n % 2 == 0) & (k % 2 == 0), 2.0, 1.0) * ODD_RATE * device.compute_units
    return np.where((n % 8 == 0) & (k % 8 == 0), 0.0, 2.0 * m * n * k / rate)


@dataclass(frozen=True)
class AttentionWork:
    """What one call of attention computes; arrays broadcast."""

    sequences: Floats
    queries: Floats
    """Query positions of a sequence on this rank."""
    length: float
    """Keys of a sequence."""
    visible: float
    """Twice the mean number of keys that a causal query sees: `length` without a window."""
    heads: Floats
    head_dim: float
    """Mean width of the two products: of a query or key head, and of a value head."""

    def flops(self) -> tuple[Floats, Floats]:
        """(forward, backward) FLOPs of fused causal attention.

        0.5 * 4 * b * queries * keys * heads * head_dim forward, 2.5 times as many backward (Dao 2023, arXiv 2307.08691).
        """
        forward = 0.5 * 4.0 * self.sequences * self.queries * self.visible * self.heads * self.head_dim
        return forward, 2.5 * forward


def fused_attention_seconds(w: AttentionWork, device: Device, peak: float) -> tuple[Floats, Floats]:
    """(forward, backward) time of fused causal attention.

    The reached share of the peak grows with length and falls when there is too little work to fill the device.
    """
    a = device.attention
    forward, backward = w.flops()
    tiles = w.sequences * w.heads * np.ceil(w.queries / 128.0)
    occupied = np.minimum(1.0, np.sqrt(tiles / (2.0 * device.compute_units)))
    share = w.visible / (w.visible + a.half_length) * occupied * (1.0 if w.head_dim >= 128 else 0.8)
    rate = peak * np.maximum(share, 1e-4)
    return forward / (rate * a.forward), backward / (rate * a.backward)


UNFUSED_RATE = 0.55
"""Share of the peak of the batched products of unfused attention."""
UNALIGNED_RATE = 0.08
"""The same where head_dim is no multiple of 8: no tensor cores."""


def unfused_attention_seconds(
    w: AttentionWork, device: Device, peak: float, score_bytes: tuple[float, float]
) -> tuple[Floats, Floats]:
    """(forward, backward) time of attention that writes all scores: two batched products and passes over the scores.

    Before FlashAttention (2022): the whole square is computed, b * heads * queries * keys scores of 2 bytes.
    `score_bytes`: what scale, mask, softmax and dropout move for each score, forward and backward.
    """
    scores = w.sequences * w.heads * w.queries * w.length
    rate = peak * (UNFUSED_RATE if w.head_dim % 8 == 0 else UNALIGNED_RATE)
    product = np.maximum(2.0 * scores * w.head_dim / rate, streaming_seconds(2.0 * scores, device))
    forward, backward = (streaming_seconds(n * scores, device) for n in score_bytes)
    return 2.0 * product + forward, 4.0 * product + backward


def streaming_seconds(n_bytes: Floats, device: Device) -> Floats:
    """Time of kernels that only move memory."""
    return n_bytes / (device.memory_bandwidth.base * device.memory_efficiency.base)


def overlapped(
    compute: Floats, comm: Floats, slowdown: Floats | float, floor: Floats | float, idle: Floats | float = 0.0
) -> Floats:
    """Exposed time of communication beside compute.

    What does not fit under the compute, at least `floor` of it; and the compute runs slower while both run. `idle`: seconds
    without compute in which the communication's own network is free too.
    """
    exposed = np.maximum(comm - compute - idle, floor * comm)
    return exposed + (slowdown - 1.0) * np.minimum(compute, comm)
