"""Which engine trains low-rank adapters, on which base and with which layouts: one table, and the rules that follow from it.

An engine is here only where its own documentation says that it does; the others refuse, each for its reason.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.engines.rule import Rule


@dataclass(frozen=True)
class AdapterSupport:
    """What an engine can do with an adapter."""

    bases: tuple[str, ...]
    """Types of the frozen base (`Adapter.base`)."""
    zero_stages: tuple[int, ...]
    model_parallel: bool
    """Whether it has tp and pp then."""
    source: str


SUPPORT: dict[str, AdapterSupport] = {
    "megatron": AdapterSupport(
        ("same", "fp8"), (0, 1), True, "Megatron-Bridge documentation, Parameter-Efficient Fine-Tuning; its fp8 recipes"
    ),
    "deepspeed": AdapterSupport(
        ("same", "int8", "nf4"), (0, 1, 2, 3), False, "PEFT documentation, DeepSpeed: LoRA and bitsandbytes with ZeRO 1 to 3"
    ),
}
"""By engine, for those that train adapters."""

REASONS = {
    "bundled": "this version of the runtime trains all parameters",
    "torchtitan": "its LoRA converter is new, and how it stores frozen weights is not part of this accounting",
    "fsdp1": "which type FSDP stores frozen weights in is not part of this accounting",
    "nanotron": "it has no adapters",
}
"""Why the others do not."""


def adapter_rules(engine: str) -> tuple[Rule, ...]:
    """The rules of an engine for jobs with an adapter; jobs without one break none of them."""
    support = SUPPORT.get(engine)
    if support is None:
        return (_unsupported(engine),)
    rules = [_base_rule(engine, support), _zero_rule(engine, support)]
    if not support.model_parallel:
        rules += [_alone(engine), _whole_int8(engine)]
    return tuple(rules)


def _unsupported(engine: str) -> Rule:
    return Rule(
        "PLN560", f"{engine}: adapters",
        lambda t, x: np.full(len(x), t.job.adapter is not None),
        f"an adapter (LoRA) with engine {engine}",
        REASONS[engine],
        f"use engine {' or '.join(SUPPORT)}",
        whole_job=True,
    )  # fmt: skip


def _base_rule(engine: str, support: AdapterSupport) -> Rule:
    bases = ", ".join(support.bases)
    return Rule(
        "PLN561", f"{engine}: base of adapters",
        lambda t, x: np.full(len(x), t.job.adapter is not None and t.job.adapter.base not in support.bases),
        f"a frozen base in {{base}} with engine {engine}",
        f"it keeps frozen weights as {bases}",
        f"use one of these, or engine {' or '.join(e for e in SUPPORT if e != engine)}",
        whole_job=True,
    )  # fmt: skip


def _zero_rule(engine: str, support: AdapterSupport) -> Rule:
    stages = ", ".join(map(str, support.zero_stages))
    return Rule(
        "PLN562", f"{engine}: zero with adapters",
        lambda t, x: (t.job.adapter is not None) & ~np.isin(x.zero, support.zero_stages),
        "zero {zero} with an adapter",
        f"{engine} is known to train adapters with zero {stages}",
        f"set zero to one of {stages}",
    )  # fmt: skip


def _alone(engine: str) -> Rule:
    """bitsandbytes does not split a quantised matrix, and PEFT's layers know no tensor or pipeline parallelism."""
    return Rule(
        "PLN563", f"{engine}: adapters x tp, pp",
        lambda t, x: (t.job.adapter is not None) & ((x.tp > 1) | (x.pp > 1)),
        "tp {tp}, pp {pp} with an adapter",
        "PEFT's adapters and bitsandbytes' quantised weights are split by ZeRO only",
        "set tp: 1 and pp: 1, or use engine megatron",
    )  # fmt: skip


def _whole_int8(engine: str) -> Rule:
    return Rule(
        "PLN564", f"{engine}: int8 base x zero 3",
        lambda t, x: (t.job.adapter is not None and t.job.adapter.base == "int8") & (x.zero == 3),
        "zero {zero} with a frozen base in {base}",
        "bitsandbytes packs 4-bit weights into a type that ZeRO shards (bnb_4bit_quant_storage), and not int8 ones",
        "use base nf4, or zero 2 or less",
    )  # fmt: skip
