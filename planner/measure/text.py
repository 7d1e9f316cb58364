"""A profile as YAML the way the shipped ones are written: one figure a line."""

from __future__ import annotations

import json
from typing import Any


def lines(data: dict[str, Any], indent: int = 0) -> list[str]:
    """Keys and values of a block; figures and lists of numbers on one line each."""
    pad, found = "  " * indent, []
    for key, value in data.items():
        if isinstance(value, dict) and "value" in value:
            inner = ", ".join(f"{k}: {_scalar(v)}" for k, v in value.items())
            found.append(f"{pad}{key}: {{{inner}}}")
        elif isinstance(value, dict):
            found += [f"{pad}{key}:", *lines(value, indent + 1)]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            found.append(f"{pad}{key}:")
            for item in value:
                block = lines(item, indent + 2)
                found += [f"{pad}  - {block[0].strip()}", *block[1:]]
        else:
            found.append(f"{pad}{key}: {_scalar(value)}")
    return found


def _scalar(value: Any) -> str:
    """Quantities and single words bare, other text quoted."""
    if isinstance(value, list):
        return f"[{', '.join(_scalar(v) for v in value)}]"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if not isinstance(value, str):
        return json.dumps(value)
    plain = value.replace(" ", "").replace("/", "").replace(".", "").replace("-", "").isalnum() and len(value) < 24
    return value if plain and value[:1].isalnum() and ":" not in value else json.dumps(value, ensure_ascii=False)


def profile_text(data: dict[str, Any], stamp: str, taken: list[str]) -> str:
    """The whole file; its head says what was not measured."""
    head = [f"# Measured by `planner measure`: {stamp}."]
    if taken:
        head.append("# Taken from other profiles: " + ", ".join(taken) + ".")
    return "\n".join([*head, *lines(data)]) + "\n"
