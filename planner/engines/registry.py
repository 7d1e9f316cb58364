"""The engines by name."""

from __future__ import annotations

import difflib

from planner.engines.base import Engine
from planner.engines.bundled import BUNDLED
from planner.engines.megatron import MEGATRON
from planner.errors import input_error

ENGINES: dict[str, Engine] = {e.name: e for e in (BUNDLED, MEGATRON)}


def engine_named(name: str) -> Engine:
    """The engine called `name`. Raises InputError."""
    if name not in ENGINES:
        near = difflib.get_close_matches(name, list(ENGINES), n=1)
        fix = f"did you mean {near[0]}?" if near else f"use one of {', '.join(ENGINES)}"
        raise input_error("PLN501", f"no engine called '{name}'", f"engines are {', '.join(ENGINES)}", fix)
    return ENGINES[name]
