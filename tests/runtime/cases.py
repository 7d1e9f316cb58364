"""The plans that must compute the gradients of one process, by number of processes."""

from __future__ import annotations

from typing import Any

import moe_cases
import plans

from planner.planfile import Plan
from planner.specs.layout import SPLIT_BACKWARD
from planner.specs.model import Model

MODELS: dict[str, Model] = {
    "llama": plans.llama(),
    "gpt": plans.gpt(),
    "tied": plans.gpt(tied_embeddings=True),
    "deep": plans.llama(layers=5),
    "long": plans.llama(layers=9),
    **moe_cases.MODELS,
    "gemma": plans.gemma(),
    "olmo": plans.olmo(),
    "phi": plans.phi(),
    "cohere": plans.cohere(),
}


def _two() -> dict[str, tuple[str, dict[str, Any]]]:
    cases: dict[str, tuple[str, dict[str, Any]]] = {}
    for recompute in ("none", "full"):
        cases[f"tp2-{recompute}"] = ("llama", {"tp": 2, "recompute": recompute})
        for zero in range(4):
            cases[f"dp2-zero{zero}-{recompute}"] = ("llama", {"dp": 2, "zero": zero, "recompute": recompute})
        for schedule in ("gpipe", "1f1b"):
            cases[f"pp2-{schedule}-{recompute}"] = ("llama", {"pp": 2, "schedule": schedule, "recompute": recompute})
        interleaved = {"pp": 2, "schedule": "interleaved", "virtual_stages": 2, "recompute": recompute}
        cases[f"pp2-interleaved-{recompute}"] = ("deep", interleaved)
    for schedule in SPLIT_BACKWARD:
        cases[f"pp2-{schedule}"] = ("deep", {"pp": 2, "schedule": schedule, "virtual_stages": 2})
    cases["pp2-interleaved-zb-v3"] = ("long", {"pp": 2, "schedule": "interleaved-zb", "virtual_stages": 3})
    cases["tp2-selective"] = ("gpt", {"tp": 2, "recompute": "selective"})
    cases["tp2-one-microbatch"] = ("llama", {"tp": 2, "micro_batch": 8})
    cases["dp2-zero1-one-microbatch"] = ("gpt", {"dp": 2, "zero": 1, "micro_batch": 4})
    cases["dp2-zero3-mixed"] = ("gpt", {"dp": 2, "zero": 3, "recompute": "full:1,selective:1"})
    cases["pp2-gpt-mixed"] = ("gpt", {"pp": 2, "layers": [2, 1], "recompute": ["full:1,selective:1", "none"]})
    cases["dp2-zero3-tied"] = ("tied", {"dp": 2, "zero": 3})
    cases["tp2-tied"] = ("tied", {"tp": 2})
    compiled = {"engine": "bundled+compile", "micro_batch": 4}
    cases["tp2-compiled"] = ("llama", {"tp": 2, **compiled})
    cases["cp2-compiled-selective"] = ("gpt", {"cp": 2, "zero": 3, "recompute": "selective", **compiled})
    cases["dp2-zero3-compiled-full"] = ("llama", {"dp": 2, "zero": 3, "recompute": "full", **compiled, "micro_batch": 2})
    cases["pp2-compiled"] = ("phi", {"pp": 2, "engine": "bundled+compile"})
    cases["pp2-interleaved-compiled"] = (
        "deep",
        {"pp": 2, "schedule": "interleaved", "virtual_stages": 2, "engine": "bundled+compile"},
    )
    cases["tp2-compiled-tied"] = ("tied", {"tp": 2, "engine": "bundled+compile"})
    cases["dp2-zero2-compiled-bf16"] = ("llama", {"dp": 2, "zero": 2, "precision": "bf16", "engine": "bundled+compile"})
    cases["cp2-zero0"] = ("llama", {"cp": 2})
    cases["cp2-zero3-learned"] = ("gpt", {"cp": 2, "zero": 3, "recompute": "selective"})
    ring = {"cp": 2, "context": "ring"}
    cases["cp2-ring"] = ("llama", ring)
    cases["cp2-ring-zero3-learned"] = ("gpt", {**ring, "zero": 3, "recompute": "selective"})
    cases["cp2-ring-full"] = ("llama", {**ring, "zero": 1, "recompute": "full"})
    cases["cp2-ring-bf16"] = ("llama", {**ring, "zero": 2, "precision": "bf16", "recompute": "selective"})
    cases["cp2-ring-moe"] = ("moe", {**ring, "zero": 3})
    cases["dp2-zero2-bf16"] = ("llama", {"dp": 2, "zero": 2, "precision": "bf16"})
    cases["pp2-bf16"] = ("llama", {"pp": 2, "precision": "bf16"})
    cases["pp2-interleaved-bf16"] = (
        "deep",
        {"pp": 2, "schedule": "interleaved", "virtual_stages": 2, "precision": "bf16", "recompute": "selective"},
    )
    cases["tp2-bf16"] = ("gpt", {"tp": 2, "precision": "bf16", "recompute": "selective"})
    return cases


def _four() -> dict[str, tuple[str, dict[str, Any]]]:
    cases: dict[str, tuple[str, dict[str, Any]]] = {}
    for recompute in ("none", "full"):
        cases[f"pp4-{recompute}"] = ("deep", {"pp": 4, "recompute": recompute})
        cases[f"tp2-pp2-{recompute}"] = ("llama", {"tp": 2, "pp": 2, "recompute": recompute})
    for zero in (0, 2, 3):
        options = {"tp": 2, "dp": 2, "zero": zero, "recompute": "none" if zero == 2 else "full"}
        cases[f"tp2-dp2-zero{zero}"] = ("llama", options)
    for zero in range(4):
        options = {"pp": 2, "dp": 2, "zero": zero, "recompute": "full" if zero in (1, 3) else "none"}
        cases[f"pp2-dp2-zero{zero}"] = ("llama", options)
    cases["tp2-dp2-zero1"] = ("gpt", {"tp": 2, "dp": 2, "zero": 1, "recompute": "selective"})
    cases["tp2-dp2-tied-zero0"] = ("tied", {"tp": 2, "dp": 2, "zero": 0})
    cases["tp2-dp2-tied-zero3"] = ("tied", {"tp": 2, "dp": 2, "zero": 3})
    cases["pp2-dp2-gpt-zero3"] = ("gpt", {"pp": 2, "dp": 2, "zero": 3, "layers": [1, 2], "recompute": "selective"})
    interleaved = {"pp": 2, "schedule": "interleaved", "virtual_stages": 2}
    cases["pp2-dp2-interleaved-zero3"] = ("deep", {**interleaved, "dp": 2, "zero": 3, "recompute": "full:2"})
    cases["pp2-dp2-interleaved-zero0"] = ("deep", {**interleaved, "dp": 2, "zero": 0})
    cases["tp2-pp2-interleaved"] = ("deep", {**interleaved, "tp": 2, "recompute": ["full:1,selective:1", "none"]})
    for zero in (1, 3):
        cases[f"dp4-shard2-zero{zero}"] = ("llama", {"dp": 4, "zero": zero, "shard": 2, "micro_batch": 1})
    cases["cp2-dp2-shard2-zero2"] = ("gpt", {"cp": 2, "dp": 2, "zero": 2, "shard": 2})
    cases["cp2-dp2-zero3"] = ("llama", {"cp": 2, "dp": 2, "zero": 3, "recompute": "full"})
    cases["tp2-dp2-zero2-fp16"] = ("llama", {"tp": 2, "dp": 2, "zero": 2, "precision": "fp16"})
    cases["pp2-dp2-zero3-fp16"] = ("gpt", {"pp": 2, "dp": 2, "zero": 3, "precision": "fp16", "recompute": "selective"})
    cases["pp2-dp2-zero3-offload"] = ("llama", {"pp": 2, "dp": 2, "zero": 3, "offload": "optimizer", "recompute": "full"})
    cases["tp2-dp2-zero1-offload"] = ("llama", {"tp": 2, "dp": 2, "zero": 1, "offload": "optimizer"})
    cases["tp2-dp2-gemma-zero3"] = ("gemma", {"tp": 2, "dp": 2, "zero": 3, "recompute": "selective"})
    cases["cp2-dp2-gemma-zero2"] = ("gemma", {"cp": 2, "dp": 2, "zero": 2, "recompute": "full"})
    cases["pp2-dp2-olmo-zero2"] = ("olmo", {"pp": 2, "dp": 2, "zero": 2})
    cases["cp2-dp2-olmo-zero3"] = ("olmo", {"cp": 2, "dp": 2, "zero": 3})
    cases["tp2-pp2-phi"] = ("phi", {"tp": 2, "pp": 2, "recompute": "full"})
    cases["tp2-cp2-cohere-zero1"] = ("cohere", {"tp": 2, "cp": 2, "zero": 1, "recompute": "selective"})
    cases["cp2-dp2-zero0"] = ("llama", {"cp": 2, "dp": 2})
    cases["cp4-zero1"] = ("gpt", {"cp": 4, "zero": 1, "recompute": "selective"})
    for recompute in ("none", "selective", "full"):  # more than Ulysses has key/value heads for
        cases[f"cp4-ring-{recompute}"] = ("llama", {"cp": 4, "context": "ring", "zero": 2, "recompute": recompute})
    cases["cp2-dp2-ring-zero3"] = ("gpt", {"cp": 2, "dp": 2, "context": "ring", "zero": 3})
    cases["tp2-cp2-ring-zero1"] = ("llama", {"tp": 2, "cp": 2, "context": "ring", "zero": 1, "recompute": "selective"})
    cases["pp2-cp2-ring-zero2"] = ("llama", {"pp": 2, "cp": 2, "context": "ring", "zero": 2, "recompute": "selective"})
    for schedule in SPLIT_BACKWARD:
        split = {"pp": 2, "cp": 2, "context": "ring", "schedule": schedule, "virtual_stages": 2}
        cases[f"pp2-cp2-ring-{schedule}"] = ("deep", split)
    cases["tp2-cp2-zero2"] = ("gpt", {"tp": 2, "cp": 2, "zero": 2})
    cases["pp2-cp2-zero2"] = ("llama", {"pp": 2, "cp": 2, "zero": 2, "recompute": "full"})
    cases["pp2-dp2-gpipe-zero2"] = ("llama", {"pp": 2, "dp": 2, "zero": 2, "schedule": "gpipe"})
    cases["pp4-interleaved"] = ("long", {"pp": 4, "schedule": "interleaved", "virtual_stages": 2})
    for schedule in SPLIT_BACKWARD:
        split = {"pp": 2, "schedule": schedule, "virtual_stages": 2}
        cases[f"tp2-pp2-{schedule}"] = ("deep", {**split, "tp": 2})
        for zero in (0, 2):
            cases[f"pp2-dp2-{schedule}-zero{zero}"] = ("deep", {**split, "dp": 2, "zero": zero})
    vee = {"pp": 2, "schedule": "zbv", "virtual_stages": 2}
    cases["pp2-dp2-zbv-zero2-bf16"] = ("deep", {**vee, "dp": 2, "zero": 2, "precision": "bf16"})
    cases["pp4-dualpipev"] = ("long", {"pp": 4, "schedule": "dualpipev", "virtual_stages": 2, "micro_batch": 1})
    cases["tp4-gpt"] = ("gpt", {"tp": 4})
    cases["tp2-dp2-zero3-bf16"] = ("llama", {"tp": 2, "dp": 2, "zero": 3, "precision": "bf16"})
    cases["pp2-dp2-zero2-bf16"] = ("llama", {"pp": 2, "dp": 2, "zero": 2, "precision": "bf16", "recompute": "full"})
    return cases


def _eight() -> dict[str, tuple[str, dict[str, Any]]]:
    three = {"tp": 2, "pp": 2, "dp": 2}
    interleaved = {"schedule": "interleaved", "virtual_stages": 2}
    return {
        "tp2-dp4-shard2-zero3": ("llama", {"tp": 2, "dp": 4, "shard": 2, "zero": 3, "recompute": "full", "micro_batch": 1}),
        "pp2-dp4-shard2-zero2": ("llama", {"pp": 2, "dp": 4, "shard": 2, "zero": 2, "micro_batch": 1}),
        "pp2-cp2-dp2-zero3": ("gpt", {"pp": 2, "cp": 2, "dp": 2, "zero": 3, "recompute": "selective"}),
        "tp2-pp2-dp2-zero0": ("llama", {**three, "zero": 0}),
        "tp2-pp2-dp2-zero2": ("gpt", {**three, "zero": 2, "recompute": "selective"}),
        "tp2-pp2-dp2-zero3-interleaved": ("deep", {**three, **interleaved, "zero": 3, "recompute": "full"}),
    }


CASES = {n: {**own, **moe_cases.CASES[n]} for n, own in ((2, _two()), (4, _four()), (8, _eight()))}
QUICK = {
    2: (
        "dp2-zero0-full", "dp2-zero1-one-microbatch", "dp2-zero2-bf16", "dp2-zero3-mixed", "dp2-zero3-tied",
        "tp2-selective", "tp2-tied", "tp2-bf16", "cp2-zero3-learned", "cp2-ring-zero3-learned",
        "pp2-bf16", "pp2-interleaved-bf16", "pp2-gpipe-full", "pp2-gpt-mixed", "pp2-compiled", "pp2-interleaved-none",
        "tp2-compiled-tied",
        *(f"pp2-{schedule}" for schedule in SPLIT_BACKWARD),
        "moe-dp2-zero3", "ep2-zero2", "ep2-padded", "ep2-zero3-bf16-selective", "tp2-ep2", "tp2-etp2", "mla-ep2", "moe-pp2",
    ),
    4: (
        "tp2-pp2-full", "tp2-dp2-tied-zero3", "dp4-shard2-zero3", "cp2-dp2-gemma-zero2", "cp4-ring-none",
        "pp2-dp2-zero1", "pp2-dp2-zero3-offload", "pp2-dp2-zero3-fp16", "pp2-dp2-interleaved-zero3", "pp2-dp2-zbv-zero2",
        "pp2-dp2-olmo-zero2", "pp2-ep2-zero3-interleaved", "tp2-dp2-ep2-etp2-zero1",
    ),
}  # fmt: skip
"""The default tier: every mechanism alone on two processes, and each beside another one on four. The rest is slow."""
REFUSED: dict[int, dict[str, tuple[str, dict[str, Any]]]] = {
    2: {
        f"pp2-{schedule}-{mode}": ("deep", {"pp": 2, "schedule": schedule, "virtual_stages": 2, "recompute": mode})
        for schedule in SPLIT_BACKWARD
        for mode in ("selective", "full")
    },
    4: {
        f"pp2-dp2-{schedule}-zero3": ("deep", {"pp": 2, "schedule": schedule, "virtual_stages": 2, "dp": 2, "zero": 3})
        for schedule in SPLIT_BACKWARD
    },
}
"""Plans that the engine refuses, run all the same: to notice when torch no longer computes them wrong."""


def case(processes: int, name: str) -> tuple[str, dict[str, Any]]:
    """(model, options) of a case, refused or not."""
    return (CASES[processes] | REFUSED.get(processes, {}))[name]


def is_slow(processes: int, name: str) -> bool:
    """Whether a case belongs to the slow tier."""
    return name not in QUICK.get(processes, ())


PER_JOB = 16
"""Slow cases that share a job: a failed one must not take all night with it."""


def job_of(processes: int, name: str) -> tuple[str, ...]:
    """The cases that run in one job with this one."""
    slow = is_slow(processes, name)
    group = [other for other in CASES[processes] if is_slow(processes, other) == slow]
    first = group.index(name) // PER_JOB * PER_JOB if slow else 0
    return tuple(group[first : first + PER_JOB] if slow else group)


def build(processes: int, name: str) -> Plan:
    """The plan of a case."""
    model, options = case(processes, name)
    return plans.plan(MODELS[model], **options)


def reference(model: str) -> Plan:
    """One process, fp32, all sequences at once."""
    return plans.plan(MODELS[model], micro_batch=8)
