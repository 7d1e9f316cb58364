"""From timings of kernels to a profile's constants: least squares over the cost model's own formulas, so that both agree.

Residuals are logarithms of predicted over measured, with a robust loss; few-percent pulls towards plausible values keep
constants in place that the timings say nothing about.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.cost.compute import AttentionWork, fused_attention_seconds, gemm_seconds
from planner.cost.task import Floats
from planner.measure.records import Measurements, Row
from planner.specs.hardware import Device, FlashAttention, GemmTiles

_SHORT = 20e-6
"""Products much shorter than this hardly count: launches hide them in training."""
_PULL = 0.02
"""Weight of the pull towards the start, in relative errors a standard deviation."""
ELEMENT_BYTES = {"cuda": 2.0, "cpu": 4.0}
STREAMS = ("copy", "add")


@dataclass(frozen=True)
class Fitted:
    """Constants and how well they give back what was measured."""

    values: dict[str, float]
    error: float
    """Mean absolute relative error."""
    count: int


def column(rows: list[Row], name: str, default: int = 1) -> Floats:
    """One size of all rows."""
    return np.array([float(r.sizes.get(name, default)) for r in rows])


def seconds_of(rows: list[Row]) -> Floats:
    """The measured times."""
    return np.array([r.value for r in rows])


def least_squares(
    errors: Callable[[Floats], Floats], start: Floats, low: Floats, high: Floats, spread: Floats, weights: Floats | float = 1.0
) -> Floats:
    """Bounded robust fit of logarithmic errors, pulled weakly to `start` on the scale of `spread`."""
    from scipy.optimize import least_squares as solve

    def residuals(x: Floats) -> Floats:
        e = errors(x) * weights / 0.05
        soft = np.sign(e) * np.sqrt(2.0 * (np.sqrt(1.0 + e**2) - 1.0))  # soft L1: a few odd timings do not steer the fit
        return np.concatenate([soft, _PULL / 0.05 * (x - start) / spread])

    return solve(residuals, np.clip(start, low, high), bounds=(low, high), x_scale=spread, max_nfev=200).x


# ---- products ------------------------------------------------------------------------------------------------------

_TILES = ("latency", "large", "medium", "small", "tile_overhead", "memory_efficiency", "wave_rounding")
_LOW = np.array([0.0, 0.05, 0.05, 0.05, 0.0, 0.05, 0.0])
_HIGH = np.array([1e-3, 1.2, 1.2, 1.2, 1e-4, 1.2, 1.0])
_SPREAD = np.array([5e-6, 0.3, 0.3, 0.3, 3e-6, 0.3, 0.5])
_STARTS = ((2e-6, 0.75, 0.75, 0.7, 1e-6, 0.75, 0.8), (2e-6, 0.85, 0.6, 0.5, 1e-6, 0.6, 0.3))


def tiles(values: dict[str, float], provenance: str = "fitted", source: str = "fit") -> GemmTiles:
    """The seven constants as the profile's."""
    whole = {k: float(v) for k, v in values.items()}
    times = {k: f"{whole.pop(k):.6e} s" for k in ("latency", "tile_overhead")}
    return GemmTiles(**times, **whole, provenance=provenance, source=source)  # type: ignore[arg-type]


def predicted_gemm(rows: list[Row], device: Device, peak: float, element_bytes: float) -> Floats:
    """What the cost model says about measured products."""
    m, n, k, groups = (column(rows, name) for name in ("m", "n", "k", "groups"))
    return gemm_seconds(m, n, k, device, peak, element_bytes, groups)


def fit_gemm(rows: list[Row], device: Device, peak: float, element_bytes: float) -> Fitted:
    """The seven constants of `GemmTiles` from products; the best of several starts, the formula has kinks."""
    measured = seconds_of(rows)
    weights = measured / (measured + _SHORT)

    def errors(x: Floats) -> Floats:
        trial = device.model_copy(update={"gemm": tiles(dict(zip(_TILES, x, strict=True)))})
        return np.log(predicted_gemm(rows, trial, peak, element_bytes) / measured)

    starts = [np.array(s) for s in _STARTS]
    found = [least_squares(errors, s, _LOW, _HIGH, _SPREAD, weights) for s in starts]
    best = min(found, key=lambda x: float(np.mean(weights * np.abs(errors(x)))))
    long = measured >= min(3 * _SHORT, float(np.median(measured)))
    error = float(np.mean(np.abs(np.expm1(errors(best)[long]))))
    return Fitted(dict(zip(_TILES, map(float, best), strict=True)), error, int(long.sum()))


# ---- attention -----------------------------------------------------------------------------------------------------


def best_backend(measurements: Measurements) -> str:
    """The back end with the least time over the calls that every candidate has; torch's own choice when it is as fast."""
    totals: dict[str, dict[Any, float]] = defaultdict(lambda: defaultdict(float))
    for row in measurements.of("attention"):
        totals[row.name.split()[0]][tuple(row.sizes.values())] += row.value
    widest = max(len(v) for v in totals.values())
    full = {name: v for name, v in totals.items() if len(v) == widest}
    sums = {name: float(np.mean(np.log(list(v.values())))) for name, v in full.items()}
    least = min(sums.values())
    return "default" if sums.get("default", np.inf) <= least + 0.03 else min(sums, key=lambda name: sums[name])


def predicted_attention(rows: list[Row], device: Device, peak: float) -> Floats:
    """What the cost model says about measured calls."""
    found = []
    for r in rows:
        s = r.sizes
        length = float(s["length"])
        one = np.ones(1)
        work = AttentionWork(one * s["sequences"], one * length, length, length, one * s["heads"], float(s["head_dim"]))
        both = fused_attention_seconds(work, device, peak)
        found.append(float(both[0 if r.name.endswith("forward") else 1][0]))
    return np.array(found)


def fit_attention(rows: list[Row], device: Device, peak: float) -> Fitted:
    """Shares of the peak forward and backward, and the length at which half is reached."""
    measured = seconds_of(rows)

    def errors(x: Floats) -> Floats:
        trial = FlashAttention(
            forward=float(x[0]), backward=float(x[1]), half_length=float(x[2]), provenance="fitted", source="fit"
        )
        return np.log(predicted_attention(rows, device.model_copy(update={"attention": trial}), peak) / measured)

    start = np.array([0.5, 0.4, 700.0])
    x = least_squares(errors, start, np.array([0.005, 0.005, 0.0]), np.array([1.0, 1.0, 8000.0]), np.array([0.3, 0.3, 1000.0]))
    values = dict(zip(("forward", "backward", "half_length"), map(float, x), strict=True))
    return Fitted(values, float(np.mean(np.abs(np.expm1(errors(x))))), len(rows))


# ---- memory and sustained load -------------------------------------------------------------------------------------


def stream_rates(measurements: Measurements, name: str) -> list[float]:
    """Bytes a second of a memory-bound kernel, by size."""
    return [r.sizes["bytes"] / r.value for r in measurements.of("memory", name)]


def stream_rate(measurements: Measurements) -> float:
    """What large copies and adds reach: the median over kinds and sizes, small sizes left out as caches hold them."""
    largest = sorted({r.sizes["bytes"] for r in measurements.of("memory", *STREAMS)})
    rows = [r for r in measurements.of("memory", *STREAMS) if r.sizes["bytes"] >= largest[len(largest) // 3]]
    return statistics.median(r.sizes["bytes"] / r.value for r in rows)


def sustained(measurements: Measurements, chain: list[Row], device: Device, peak: float, element_bytes: float) -> float | None:
    """Seconds of a layer's products under lasting load over what the fitted constants say; None when not measured."""
    hot = measurements.value("sustained", "hot")
    return None if hot is None else hot / float(np.sum(predicted_gemm(chain, device, peak, element_bytes)))


def overlap_slowdown(measurements: Measurements) -> float | None:
    """Factor on compute time while a collective runs, as `compute.overlapped` means it; None when not measured.

    It says that both together take the longer of the two, and the factor less one of the shorter.
    """
    names = {r.name.partition(":")[0] for r in measurements.of("overlap")}
    factors = []
    for name in sorted(names):
        alone, traffic, both = (
            measurements.value("overlap", f"{name}: {what}") or 0.0 for what in ("compute alone", "traffic alone", "both")
        )
        factors.append(1.0 + (both - max(alone, traffic)) / min(alone, traffic))
    return statistics.mean(factors) if factors else None
