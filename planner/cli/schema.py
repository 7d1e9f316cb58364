"""`planner schema`: JSON Schemas of the files, for editors and for readers of plans."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from planner.cli import common
from planner.errors import input_error

KINDS = ("plan", "model", "hardware", "configuration")


@common.guarded
def schema(kind: Annotated[str, typer.Argument(help="plan, model, hardware or configuration.")]) -> None:
    """Print the JSON Schema of a file."""
    if kind not in KINDS:
        raise input_error("PLN107", f"{kind}: no such schema", f"schemas are {', '.join(KINDS)}", "")
    common.write_result(common.to_json(_schema(kind)))


def _schema(kind: str) -> dict[str, Any]:
    from planner.planfile import Plan
    from planner.specs.hardware import HardwareProfile
    from planner.specs.layout import Configuration
    from planner.specs.model import Model

    specs: dict[str, Any] = {"plan": Plan, "model": Model, "hardware": HardwareProfile, "configuration": Configuration}
    result: dict[str, Any] = specs[kind].model_json_schema(mode="serialization" if kind == "plan" else "validation")
    if kind == "plan":
        result["properties"]["digest"] = {"type": "string", "description": "SHA-256 of the canonical form."}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **result}
