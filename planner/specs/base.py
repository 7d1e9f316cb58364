"""The base class of every spec: unknown keys refused, no silent type conversion, immutable."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, SerializerFunctionWrapHandler, model_serializer
from pydantic.json_schema import JsonSchemaValue


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

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The schema of the fields, which the serializer's own type does not show; what may be left out is not required."""
        fields = handler({k: v for k, v in schema.items() if k != "serialization"})
        own = handler.resolve_ref_schema(fields)
        own["required"] = [name for name in own.get("required", ()) if name not in cls.unwritten]
        return fields
