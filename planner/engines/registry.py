"""The engines by name, and their accountings by name and traits."""

from __future__ import annotations

import difflib
from dataclasses import replace
from functools import cache

from planner.cost.accounting import Accounting
from planner.engines.adapters import adapter_rules
from planner.engines.base import Engine
from planner.engines.bundled import BUNDLED
from planner.engines.deepspeed import DEEPSPEED
from planner.engines.megatron import MEGATRON
from planner.engines.nanotron import NANOTRON
from planner.engines.torchtitan import FSDP1, TORCHTITAN
from planner.engines.traits import TRAITS
from planner.errors import input_error

ENGINES: dict[str, Engine] = {
    e.name: replace(e, rules=e.rules + adapter_rules(e.name))
    for e in (BUNDLED, MEGATRON, TORCHTITAN, DEEPSPEED, NANOTRON, FSDP1)
}
"""Each with its own rules and those for adapters."""


def engine_named(name: str) -> Engine:
    """The engine called `name`, with the accounting of its traits: `megatron`, `megatron+bf16-grads`. Raises InputError."""
    base, *traits = name.split("+")
    if base not in ENGINES:
        near = difflib.get_close_matches(base, list(ENGINES), n=1)
        fix = f"did you mean {near[0]}?" if near else f"use one of {', '.join(ENGINES)}"
        raise input_error("PLN501", f"no engine called '{base}'", f"engines are {', '.join(ENGINES)}", fix)
    engine = ENGINES[base]
    if not traits:
        return engine
    accounting = accounting_named(name)
    lifted = {code for t in traits for code in TRAITS[t].lifts}
    stages = next((TRAITS[t].zero_stages for t in traits if TRAITS[t].zero_stages), engine.zero_stages)
    rules = tuple(r for r in engine.rules if r.code not in lifted) + tuple(r for t in traits for r in TRAITS[t].adds)
    more = [s for t in traits for s in TRAITS[t].schedules if base == TORCHTITAN.name]
    schedules, note = (*engine.schedules, *more), "" if more else engine.schedules_note
    return replace(
        engine, name=name, accounting=accounting, rules=rules, zero_stages=stages, schedules=schedules, schedules_note=note
    )


@cache
def accounting_named(name: str) -> Accounting:
    """The accounting of an engine with traits, joined by `+`. Raises InputError."""
    base, *traits = name.split("+")
    accounting = engine_named(base).accounting
    for trait in traits:
        if traits.count(trait) > 1:
            raise input_error("PLN502", f"engine trait '{trait}' is given twice", f"in '{name}'", "name it once")
        if trait not in TRAITS:
            near = difflib.get_close_matches(trait, list(TRAITS), n=1)
            fix = f"did you mean {near[0]}?" if near else f"use some of {', '.join(TRAITS)}"
            raise input_error("PLN502", f"no engine trait called '{trait}'", f"in '{name}'", fix)
        if (only := TRAITS[trait].engines) and base not in only:
            raise input_error(
                "PLN502", f"engine {base} has no trait '{trait}'", f"only {', '.join(only)} has it", "leave it out"
            )
        accounting = TRAITS[trait].apply(accounting)
    return replace(accounting, name=name) if traits else accounting
