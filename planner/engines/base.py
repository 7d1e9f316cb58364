"""What an engine is: rules that accept or refuse a layout, and its accounting. Rules are data, used everywhere.

Search counts the layouts that each rule excludes, `check` and `estimate` print the same rule with its numbers, the
runtime refuses by it before it builds anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.cost.accounting import Accounting
from planner.cost.task import splits_backward
from planner.engines.common import COMMON_RULES
from planner.engines.predicates import divides, everywhere, on_a_cpu
from planner.engines.rule import Rule
from planner.specs.layout import CONTEXTS, OFFLOADS, RANK_ORDERS, SCHEDULES


@dataclass(frozen=True)
class Engine:
    """An engine: its name, what it refuses, how it counts."""

    name: str
    title: str
    rules: tuple[Rule, ...]
    accounting: Accounting
    zero_stages: tuple[int, ...]
    """ZeRO stages worth enumerating."""
    schedules: tuple[str, ...]
    """Schedules that it runs, without `none`."""
    sequence_parallel: tuple[int, ...]
    """Choices when tp > 1."""
    context_parallel: bool
    """Whether it splits the sequence (cp > 1)."""
    expert_parallel: bool = False
    """Whether it spreads experts (ep > 1)."""
    offloads: tuple[str, ...] = ("none",)
    """What it can keep in host memory."""
    offload_on_request: bool = False
    """Whether the search looks at offload only where it is pinned: not yet measured on devices."""
    rank_orders: tuple[str, ...] = ("tp-cp-dp-pp",)
    """Orders in which it can place the axes."""
    contexts: tuple[str, ...] = ("default",)
    """How its cp groups can share attention: its own way (`Accounting.context`), or a ring besides."""
    device_types: str = ""
    """Why it can run pipeline stages on devices of two types; empty where it cannot, or where nobody looked."""
    schedules_note: str = ""
    """Why it does not run the schedules that split the backward."""
    hybrid_sharding: bool = False
    """Whether a group of the data-parallel ranks can share states, with copies in the other groups."""
    unequal_chunks: bool = False
    """Whether the chunks of one rank may hold different numbers of layers."""

    @property
    def _choices(self) -> tuple[Rule, ...]:
        """Rules that follow from what it offers: offload, schedules, rank orders, contexts, device types, hybrid sharding,
        chunks."""
        offered = ((OFFLOADS, self.offloads), (RANK_ORDERS, self.rank_orders), (CONTEXTS, self.contexts))
        offloads, orders, contexts = ([names.index(n) for n in own] for names, own in offered)
        return (
            Rule(
                "PLN226", f"{self.name}: offload",
                lambda t, x: ~np.isin(x.offload, offloads) | ((x.offload == 1) & on_a_cpu(t)),
                "offload {offload}",
                f"{self.title} keeps in host memory: {', '.join(self.offloads)}; a CPU has no other",
                "set offload: none, or use another engine",
            ),
            Rule(
                "PLN580", f"{self.name}: split backward",
                lambda t, x: splits_backward(x.schedule) & ~np.isin(x.schedule, schedule_codes(self)),
                "schedule {schedule}",
                f"{self.title} runs: {', '.join(self.schedules) or 'no pipeline'}{self.schedules_note}",
                "use another schedule or engine",
                on="pipeline",
            ),
            Rule(
                "PLN227", f"{self.name}: rank order",
                lambda t, x: ~np.isin(x.order, orders),
                "order {order}",
                f"{self.title} places ranks as {' or '.join(self.rank_orders)}",
                "leave out order, or use another engine",
                on="degrees",
            ),
            Rule(
                "PLN566", f"{self.name}: context",
                lambda t, x: ~np.isin(x.context, contexts),
                "context {context}",
                f"{self.title} shares the attention of a cp group in one way, its own",
                "leave out context, or use engine bundled",
                on="degrees",
            ),
            Rule(
                "PLN508", f"{self.name}: hybrid sharding",
                lambda t, x: (x.replicas > 1) & (not self.hybrid_sharding),
                "shard {sharded} of dp x cp {shard}",
                f"{self.title} shards states over all of dp x cp here",
                "leave out shard, or use engine bundled or torchtitan",
            ),
            Rule(
                "PLN578", f"{self.name}: device types",
                lambda t, x: everywhere(x, bool(t.type_sizes) and not self.device_types),
                "two device types",
                f"{self.title} is not known to run pipeline stages of unequal depth on devices of two types",
                "use --engine bundled or megatron, or one type",
                whole_job=True,
                on="degrees",
            ),
            Rule(
                "PLN570", f"{self.name}: unequal chunks",
                lambda t, x: (x.virtual_stages > 1) & ~divides(t.model.n_layers, x.virtual_stages) & (not self.unequal_chunks),
                "{n_layers} layers with {virtual_stages} virtual stages",
                f"{self.title} cuts a rank into equal chunks only",
                "choose virtual_stages from the divisors of {n_layers}, or use another engine",
                on="pipeline",
            ),
        )  # fmt: skip

    @property
    def all_rules(self) -> tuple[Rule, ...]:
        """Rules of every engine and its own, in the order in which they are asked: those that look at least first."""
        return tuple(
            sorted(COMMON_RULES + self.rules + self._choices, key=lambda rule: ("degrees", "pipeline", "row").index(rule.on))
        )


def schedule_codes(engine: Engine) -> tuple[int, ...]:
    """Codes of the schedules that an engine runs, without `none`."""
    return tuple(SCHEDULES.index(name) for name in engine.schedules)
