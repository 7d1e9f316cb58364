"""What a job trains and what it leaves frozen, each as counts that an engine's ZeRO rules apply to.

Without an adapter all parameters are trained. With one, frozen weights are counted in bytes as they are stored, under the
rule that is left of the engine's when gradients, optimizer states and masters are gone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from planner.cost import adapters, memory
from planner.cost.accounting import Held, Traffic, ZeroRule
from planner.cost.task import Floats, LayoutArray, Task


class Source(NamedTuple):
    """Parameters under one rule."""

    task: Task
    """With the accounting whose ZeRO rules hold."""
    counts: dict[str, Floats]
    """As of `memory.rank_params`: parameters, or bytes of frozen ones."""
    frozen: bool


def sources(task: Task, layouts: LayoutArray) -> tuple[Source, ...]:
    """The trained parameters, and after them the frozen ones where there are any."""
    trained = Source(task, trained_params(task, layouts), False)
    if task.job.adapter is None:
        return (trained,)
    a = task.accounting
    rules = replace(a, zero={stage: frozen_rule(rule) for stage, rule in a.zero.items()})
    return trained, Source(replace(task, accounting=rules), frozen_bytes(task, layouts), True)


def trained_params(task: Task, layouts: LayoutArray) -> dict[str, Floats]:
    """Parameters that one rank trains, by place as of `memory.rank_params`."""
    whole, adapter = memory.rank_params(task, layouts), task.job.adapter
    if adapter is None:
        return whole
    ends = {k: v if adapter.train_embeddings else np.zeros(len(layouts)) for k, v in whole.items()}
    return ends | adapters.adapter_params(task, layouts)


def frozen_bytes(task: Task, layouts: LayoutArray) -> dict[str, Floats]:
    """Bytes of what one rank leaves frozen, by place as of `memory.rank_params`: the layers' matrices as stored, norms,
    biases, router, embedding and head in the compute type."""
    whole, adapter, e = memory.rank_params(task, layouts), task.job.adapter, task.job.compute_bytes
    assert adapter is not None
    found = {k: np.zeros(len(layouts)) if adapter.train_embeddings else e * v for k, v in whole.items()}
    for place in ("layer", "experts"):
        weights, stored = adapters.matrices(task, layouts, experts=place == "experts")
        found[place] = stored + e * np.maximum(whole[place] - weights, 0.0)
    return found | {"expert": found["experts"] * layouts.ep / task.model.layer.mlp.experts}


def frozen_rule(rule: ZeroRule) -> ZeroRule:
    """What an engine's rule of a ZeRO stage is for a byte of frozen weights: held whole or sharded like its parameters, once;
    gathered where they are sharded, with the copies that the engine keeps; never reduced, never updated."""
    params = [h for h in rule.backward if h.part == "params"]
    sharded = any(h.shard for h in params)
    held = tuple(Held("params", 1, shard=s) for s in (False, True) if any(h.shard is s for h in params))
    gathers = tuple(Traffic(t.op, 1, t.per, t.under) for t in rule.traffic if sharded and t.op == "all_gather")
    return ZeroRule(backward=held, update=held, traffic=gathers, unit=_copies(rule.unit), head=_copies(rule.head))


def _copies(items: tuple[Held, ...]) -> tuple[Held, ...]:
    """Gathered parameters among what lives beside a unit."""
    return tuple(replace(h, size=1) for h in items if h.part == "params")
