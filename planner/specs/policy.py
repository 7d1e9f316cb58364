"""What a plan must satisfy beyond being possible."""

from __future__ import annotations

from pydantic import Field

from planner.specs.base import Spec


class Policy(Spec):
    """Limits that a site sets."""

    max_memory_fraction: float = Field(default=0.92, gt=0, le=1)
    """Share of the device's usable memory that a plan may fill."""
    max_oom_probability: float | None = Field(default=None, gt=0, lt=1)
    """How likely a plan may run out of memory (see `planner.cost.risk`); no limit beside the fraction when left out."""
