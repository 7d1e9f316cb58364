"""What training takes, as a plan states it: days, device-hours, cost and energy, or how many tokens would be optimal."""

from __future__ import annotations

from typing import Literal

from planner.specs.base import Spec
from planner.specs.figures import Provenance


class Span(Spec):
    """A quantity that is proportional to the step time, with the interval that follows from the step time's."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> Span:
        """The same in other units, or of more."""
        return Span(value=self.value * factor, low=self.low * factor, high=self.high * factor)


class Rate(Spec):
    """A price or a power of one device, and where it comes from."""

    value: float
    provenance: Provenance | Literal["given"]
    """given: by whoever asked for the plan."""
    source: str


class Economy(Spec):
    """What training a number of tokens takes at the estimate's step time."""

    tokens: int
    steps: int
    """Optimizer steps: tokens over the tokens of one step, rounded up."""
    days: Span
    device_hours: Span
    cost_usd: Span | None
    """None without a price."""
    energy_mwh: Span | None
    """Of the devices at board power, times the PUE: an upper estimate. None without a power."""
    price_usd_per_device_hour: Rate | None
    power_watts: Rate | None
    """Board power of one device."""
    pue: float
    """Energy of the site over that of its devices; 1 counts the devices alone."""
    deadline_days: float | None
    notes: list[str]
    """What is missing, and how to read the energy."""


class ComputeOptimal(Spec):
    """How many tokens would be compute-optimal for a model of this size: a rule of thumb, where no budget was given."""

    tokens: int
    tokens_per_param: float
    counted: Literal["parameters", "active parameters"]
    """active parameters: of a mixture of experts."""
    days: Span
    """Training time at the estimate's step time."""
    source: str
