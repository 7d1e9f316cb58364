"""Intervals and probabilities in few characters."""

from __future__ import annotations

from planner.planfile import Certainty, TimeInterval
from planner.units import seconds

_WORDS: dict[Certainty, str] = {"fitted": "calibrated", "assumed": "assumed"}


def certainty(provenance: Certainty) -> str:
    """The word for where an interval comes from: "calibrated" or "assumed"."""
    return _WORDS[provenance]


def with_interval(value: str, low: str, high: str, provenance: Certainty) -> str:
    """A printed quantity with its interval: "2.31 s (2.1 to 2.54, calibrated)". Units stand once where all are equal."""
    units = {text.rpartition(" ")[2] for text in (value, low, high)}
    if len(units) == 1 and " " not in low.rpartition(" ")[0]:
        low, high = low.rpartition(" ")[0], high.rpartition(" ")[0]
    return f"{value} ({low} to {high}, {_WORDS[provenance]})"


def step_time(value: float, interval: TimeInterval) -> str:
    """A step time with its interval."""
    return with_interval(seconds(value), seconds(interval.low_s), seconds(interval.high_s), interval.provenance)


def probability(value: float) -> str:
    """A probability in percent that is never rounded to certainty: "<0.1%", "4.7%", "31%", ">99.9%"."""
    if value < 0.001:
        return "<0.1%"
    if value > 0.999:
        return ">99.9%"
    return f"{value:.0%}" if 0.0995 <= value <= 0.99 else f"{value:.1%}"
