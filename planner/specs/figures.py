"""Figures: numbers with a unit, where they come from, and how far to trust them."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from planner import units
from planner.specs.base import Spec

Provenance = Literal["measured", "fitted", "datasheet", "assumed"]


class Figure(Spec):
    """A number with its unit, where it comes from, and how far to trust it."""

    dimension: ClassVar[str] = "1"
    signed: ClassVar[bool] = False
    """Whether it may be zero or negative."""

    value: str | float
    provenance: Provenance
    source: str = Field(min_length=1)
    note: str = ""

    @model_validator(mode="after")
    def _value_has_the_right_unit(self) -> Figure:
        if self.base <= 0 and not (self.base == 0 and self.dimension in ("seconds", "bytes")) and not self.signed:
            raise ValueError(f"must be positive, not {self.value}")
        return self

    @cached_property
    def base(self) -> float:
        """The value in base units (bytes, bytes/s, FLOP/s, seconds)."""
        return units.parse(str(self.value), self.dimension)


class Bytes(Figure):
    """A size."""

    dimension = "bytes"


class Bandwidth(Figure):
    """Bytes a second."""

    dimension = "bytes/s"


class FlopRate(Figure):
    """Floating-point operations a second."""

    dimension = "flop/s"


class Seconds(Figure):
    """A time."""

    dimension = "seconds"


class Ratio(Figure):
    """A plain number."""

    dimension = "1"


class Number(Figure):
    """A plain number of either sign."""

    dimension = "1"
    signed = True


class UsdPerHour(Figure):
    """A price."""

    dimension = "usd/h"


class Watts(Figure):
    """A power."""

    dimension = "watts"
