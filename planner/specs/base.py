"""The base class of every spec: unknown keys refused, no silent type conversion, immutable."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer


class Spec(BaseModel):
    """A declaration read from a file. `8.0` is not an integer here, `"8"` is not one either."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Sparse(Spec):
    """A spec with fields that are written only where they say something: files without them stay as they were."""

    unwritten: ClassVar[tuple[str, ...]] = ()
    """Fields left out while they have their default."""

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        silent = {n for n in self.unwritten if getattr(self, n) == fields[n].get_default(call_default_factory=True)}
        return {name: value for name, value in handler(self).items() if name not in silent}
