"""Runs that stalled: told from measured times and configurations alone, so that the rule cannot hide errors of prediction.

Two runs are alike when nothing but the number of data-parallel ranks, the ZeRO stage and (within a factor of two) the
micro-batch tells them apart: same table source, release, model, job, machine, recipe, tp, pp, cp, ep and recompute. Of like
runs a healthy one cannot

- take `slower` times as long as one on no more devices: it has no more work, and only its data-parallel traffic grows;
- use `dearer` times the device seconds of one on more devices at the same micro-batch: it has less traffic and less bubble.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

STALLED = "stalled"
"""How the reason begins why such a run is left out."""


@dataclass(frozen=True)
class Measured:
    """One timed run."""

    name: str
    alike: Hashable
    """Equal for runs that only differ in devices, ZeRO stage and micro-batch."""
    devices: int
    micro_batch: int
    seconds: float


def stalled(runs: Iterable[Measured], slower: float, dearer: float) -> set[str]:
    """Names of the runs that stalled."""
    families: dict[Hashable, list[Measured]] = defaultdict(list)
    for run in runs:
        families[run.alike].append(run)
    return {
        run.name
        for family in families.values()
        for run in family
        if any(_proves(other, run, slower, dearer) for other in family if other is not run)
    }


def _proves(other: Measured, run: Measured, slower: float, dearer: float) -> bool:
    """Whether `other` shows that `run` stalled."""
    if other.devices <= run.devices:
        near = 0.5 <= other.micro_batch / run.micro_batch <= 2.0
        return near and run.seconds > slower * other.seconds
    same = other.micro_batch == run.micro_batch
    return same and run.seconds * run.devices > dearer * other.seconds * other.devices


def why(slower: float, dearer: float) -> str:
    """The reason, in words."""
    return f"{STALLED}: {slower:g} x the time of a like run on no more devices, or {dearer:g} x the device time of one on more"
