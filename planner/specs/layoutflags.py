"""A layout from a few named values: what a person leaves out follows from the rest."""

from __future__ import annotations

from typing import Any

from planner.errors import input_error
from planner.specs.layout import V_SHAPED, Layout, even_stages
from planner.specs.model import Model


def complete_layout(named: dict[str, Any], model: Model, gpus: int) -> Layout:
    """A full layout: dp from the device count, sequence_parallel with tp, 1F1B with pp, an even split of layers.

    `named` may hold any field of a layout, `recompute` for all stages, and `layers` (a list, one entry a stage).
    Raises InputError when a value does not make sense.
    """
    if not isinstance(named, dict):
        raise input_error("PLN107", f"layout {named!r}: not named values", "", "give a dict such as {'tp': 8}")
    values = dict(named)
    for name in ("tp", "cp", "pp", "virtual_stages"):
        value = values.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool):
            raise input_error("PLN107", f"{name}: {value!r} is not a whole number", "", "")
    recompute = str(values.pop("recompute", "none"))
    layers = values.pop("layers", None)
    if layers is not None and not isinstance(layers, (list, tuple)):
        raise input_error("PLN107", f"layers: {layers!r} is not a list", "", "give one entry a stage, such as [7, 8, 8, 7]")
    tp, cp, pp = (int(values.get(k, 1)) for k in ("tp", "cp", "pp"))
    if min(tp, cp, pp) < 1:
        raise input_error("PLN107", "degrees are at least 1", f"tp {tp}, cp {cp}, pp {pp}", "")
    values.setdefault("dp", max(gpus // (tp * cp * pp), 1))
    values.setdefault("sequence_parallel", tp > 1)
    if values.get("schedule") in V_SHAPED:
        values.setdefault("virtual_stages", 2)
    chunks = int(values.get("virtual_stages", 1))
    values.setdefault("schedule", "none" if pp == 1 else "interleaved" if chunks > 1 else "1f1b")
    if "stages" not in values:
        values["stages"] = _stages(model, pp, max(chunks, 1), None if layers is None else list(layers), recompute)
    from pydantic import ValidationError

    try:
        return Layout.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(p) for p in first["loc"]) or "layout"
        message = first["msg"].removeprefix("Value error, ")
        raise input_error("PLN107", f"{name}: {message}", f"found {first.get('input')!r}", "") from None


def _stages(model: Model, pp: int, chunks: int, layers: list[int] | None, recompute: str) -> list[dict[str, Any]]:
    if layers is None:
        if pp > model.n_layers:
            raise input_error(
                "PLN208", f"pp {pp} needs more layers than the {model.n_layers} there are", "", "choose a smaller pp"
            )
        layers = [s.layers for s in even_stages(model.n_layers, pp, virtual_stages=chunks)]
    return [{"layers": n, "recompute": recompute} for n in layers]
