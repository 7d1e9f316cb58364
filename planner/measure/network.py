"""From timings of collectives to a tier: latency, efficiency over size, and what an all-reduce costs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.cost.collectives import collective_seconds, neighbour_seconds
from planner.cost.task import Floats
from planner.measure.fit import column, least_squares, seconds_of
from planner.measure.records import Row
from planner.specs.figures import Ratio, Seconds
from planner.specs.hardware import Curve, HardwareProfile, Tier

FITTED = ("all_gather", "reduce_scatter", "all_reduce")
"""What the curve is fitted to; exchanges and sends are compared with it."""
_STEP = 4.0
"""From one point of the curve to the next."""
_SMALLEST = 65536.0
"""Smaller tensors cost latency."""


@dataclass(frozen=True)
class TierFit:
    """A tier's constants and how well they give back the measured collectives."""

    latency: float
    all_reduce: float
    points: tuple[tuple[float, float], ...]
    errors: dict[str, float]
    """Mean signed relative error of each operation."""
    error: float
    """Mean absolute relative error of what was fitted."""
    count: int


def bus_bandwidth(rows: list[Row]) -> float:
    """The most that a rank sent or received a second in any operation, all-reduces counted as a ring."""
    ranks, sizes = column(rows, "ranks"), column(rows, "bytes")
    moved = np.array([2.0 if r.name == "all_reduce" else 1.0 for r in rows]) * (ranks - 1) / ranks * sizes
    moved = np.where([r.name == "send" for r in rows], sizes, moved)
    return float(np.max(moved / seconds_of(rows)))


def with_tier(
    profile: HardwareProfile, latency: float, all_reduce: float, points: list[list[float]], place: int = 0
) -> HardwareProfile:
    """The profile with the constants of one tier replaced."""
    old = profile.network[place]
    tier = Tier(
        name=old.name, size=old.size, bandwidth=old.bandwidth,
        latency=Seconds(value=f"{latency:.6e} s", provenance="fitted", source="fit"),
        all_reduce=Ratio(value=all_reduce, provenance="fitted", source="fit"),
        efficiency=Curve(points=points, provenance="fitted", source="fit"),
    )  # fmt: skip
    network = list(profile.network)
    network[place] = tier
    return profile.model_copy(update={"network": network})


def predicted(rows: list[Row], profile: HardwareProfile) -> Floats:
    """What the cost model says about measured operations between neighbours."""
    ranks, sizes, result = column(rows, "ranks"), column(rows, "bytes"), np.zeros(len(rows))
    for op in {r.name for r in rows}:
        at = np.array([r.name == op for r in rows])
        if op == "send":
            result[at] = neighbour_seconds(sizes[at], profile)[0]
        else:
            result[at] = collective_seconds(op, ranks[at], np.ones(int(at.sum())), sizes[at], profile)
    return result


def fit_tier(rows: list[Row], profile: HardwareProfile) -> TierFit:
    """The innermost tier from measured collectives; its bandwidth and size are the profile's.

    Between GPUs the efficiency only grows with size; between CPU processes caches make it fall again.
    """
    used = [r for r in rows if r.name in FITTED]
    measured, sizes = seconds_of(used), np.unique(column(used, "bytes"))
    knots = _knots(sizes)
    grows = profile.device.kind != "cpu"

    def shares(x: Floats) -> Floats:
        steps = np.concatenate([x[2:3], -x[3:]]) if grows else x[2:]
        return np.exp(np.cumsum(steps)[::-1] if grows else steps)

    def trial(x: Floats) -> HardwareProfile:
        points = [[float(k), float(np.clip(s, 1e-6, 1.5))] for k, s in zip(knots, shares(x), strict=True)]
        return with_tier(profile, float(np.exp(x[0])), float(np.exp(x[1])), points)

    def errors(x: Floats) -> Floats:
        return np.log(predicted(used, trial(x)) / measured)

    n = len(knots)
    ranks = column(used, "ranks")
    step = float(np.min(measured / np.minimum(ranks - 1, 2 * np.ceil(np.log2(ranks)))))
    first = np.log(0.7) if grows else np.log(0.3)
    shares_start = [first, *([0.3] * (n - 1) if grows else [first] * (n - 1))]
    low = np.array([np.log(1e-7), np.log(1.0), -8.0, *([0.0] * (n - 1) if grows else [-8.0] * (n - 1))])
    high = np.array([np.log(2 * step), np.log(2.2), 0.3, *([3.0] * (n - 1) if grows else [0.3] * (n - 1))])
    spread = np.array([2.0, 0.3, *[1.0] * n])
    starts = [
        np.array([np.log(part * step), np.log(passes), *shares_start]) for part in (0.95, 0.4, 0.05) for passes in (1.4, 1.9)
    ]
    x = min((least_squares(errors, s, low, high, spread) for s in starts), key=lambda x: float(np.mean(np.abs(errors(x)))))
    final = trial(x)
    tier = final.network[0]
    ratio = {op: [r for r in rows if r.name == op] for op in dict.fromkeys(r.name for r in rows)}
    signed = {op: float(np.mean(predicted(r, final) / seconds_of(r) - 1)) for op, r in ratio.items()}
    points = tuple((p[0], p[1]) for p in tier.efficiency.points)
    mean = float(np.mean(np.abs(np.expm1(errors(x)))))
    return TierFit(tier.latency.base, float(np.exp(x[1])), points, signed, mean, len(used))


def _knots(sizes: Floats) -> Floats:
    """Sizes at which the curve has points: every measured size from the smallest that bandwidth decides on."""
    large = sizes[sizes >= min(_SMALLEST, sizes[-1] / _STEP)]
    kept = [large[0]]
    for size in large[1:]:
        if size >= kept[-1] * _STEP * 0.99:
            kept.append(size)
    return np.array(kept)
