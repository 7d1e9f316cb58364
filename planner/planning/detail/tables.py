"""The tables: lines of a step's time, of a rank's memory, of collectives, and the figures that they name."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from planner.specs.figures import Provenance

KINDS = ("time", "memory", "comm", "source")
"""What can be asked for."""

Value = float | int | str
Inputs = dict[str, Value]


@dataclass(frozen=True)
class Source:
    """One figure that an estimate used."""

    name: str
    """`device...`, `network...` (the profile), `engine...` (accounting), `constant...` (fitted), `code...` (in the source)."""
    value: Value
    provenance: Provenance
    source: str


@dataclass(frozen=True)
class Term:
    """One line of the step time."""

    part: str
    """The line of `Estimate.breakdown` that it belongs to, or `rounding`."""
    name: str
    seconds: float
    """Of one call: of one layer and micro-batch where `times` counts those."""
    times: float
    total: float
    share: float
    """Of the step."""
    formula: str
    inputs: Inputs
    bound: str
    """`device` or `host`, for a layer's compute."""
    provenance: str
    least_certain: str
    """The figure that `provenance` is about."""
    figures: tuple[str, ...]


@dataclass(frozen=True)
class Bytes:
    """One line of a rank's memory."""

    part: str
    name: str
    n_bytes: float
    inputs: Inputs
    provenance: str
    least_certain: str
    figures: tuple[str, ...]


@dataclass(frozen=True)
class Rank:
    """Memory of equal neighbouring pipeline ranks at their peak."""

    ranks: str
    moment: str
    cause: str
    parts: tuple[Bytes, ...]
    """They add up to `allocated`."""
    allocated: int
    pooled: int
    """Beside it: gradients' memory, which a stream of their own keeps through the step."""
    reserved_ratio: float
    reserved: float
    outside: tuple[Bytes, ...]
    total: float
    limit: float
    headroom: float


@dataclass(frozen=True)
class Collective:
    """One kind of collective on the slowest rank."""

    part: str
    where: str
    group: str
    op: str
    ranks: int
    stride: int
    """Distance of neighbours in the group."""
    tiers: tuple[str, ...]
    """Network tiers that it crosses, the inner one first."""
    bytes_per_call: float
    """The full (gathered) tensor."""
    calls: float
    """A step."""
    seconds_per_call: float
    busy: float
    exposed: float
    bandwidth: float
    """Bus bandwidth, bytes/s: what each rank sends in a ring, over the call's time."""
    hides: str
    """What hides it."""
    figures: tuple[str, ...]


@dataclass(frozen=True)
class Detail:
    """The tables that were asked for; the others are None."""

    step_time_s: float
    slowest_rank: int
    growth: float
    """Factor in all times: what large clusters lose (`constant.scale`)."""
    time: tuple[Term, ...] | None = None
    memory: tuple[Rank, ...] | None = None
    comm: tuple[Collective, ...] | None = None
    source: tuple[Source, ...] | None = None

    def to_data(self) -> dict[str, Any]:
        """Plain data: the tables that were asked for."""
        return {k: _plain(v) for k, v in asdict(self).items() if v is not None}


def _plain(value: Any) -> Any:
    """Tuples as lists, NumPy scalars as numbers, so that JSON and YAML take it."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value
