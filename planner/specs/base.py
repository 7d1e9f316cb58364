"""The base class of every spec: unknown keys refused, no silent type conversion, immutable."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Spec(BaseModel):
    """A declaration read from a file. `8.0` is not an integer here, `"8"` is not one either."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
