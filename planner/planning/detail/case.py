"""One layout with all that was computed for it: by kind of layers, and by pipeline rank."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from planner.cost import devicetypes, frozen, memory, operators, primitives, step
from planner.cost.accounting import BY_ENGINES
from planner.cost.blending import Stack
from planner.cost.primitives import Primitives
from planner.cost.task import Floats, Ints, LayoutArray, StageArray, Task
from planner.cost.traffic import DpTraffic, dp_traffic, idle_seconds, layer_compute
from planner.planfile import Plan
from planner.planning.detail.source import Book
from planner.specs.layout import Layout

OVERLAPPED = ("engine.dp_floor", "overlap_slowdown")
"""Figures of traffic that kernels carry beside compute."""


@dataclass(frozen=True)
class Kind:
    """One kind of layers, priced for the layout."""

    task: Task
    label: str
    """What its lines begin with, where there are several kinds."""
    shapes: operators.Shapes
    seconds: operators.LayerSeconds
    compute: tuple[Floats, Floats]
    traffic: DpTraffic
    sources: tuple[frozen.Source, ...]
    """Its parameters: trained, and frozen where there are any."""
    p: Primitives

    @property
    def params(self) -> dict[str, Floats]:
        """The trained parameters."""
        return self.sources[0].counts


@dataclass(frozen=True)
class Case:
    """One layout, priced."""

    task: Task
    plan: Plan
    x: LayoutArray
    stages: StageArray
    kinds: tuple[Kind, ...]
    counts: Ints
    """Layers by kind of each rank, shape (ranks, kinds)."""
    q: Primitives
    """Primitives of each rank."""
    cost: step.StageCost
    """What is allocated."""
    pooled: Ints
    """Bytes of each rank that the allocator's pools keep beside in its backward."""
    held: step.Held
    book: Book
    rank: int | None = None
    """The pipeline rank that collectives are listed for; the slowest one when left out."""

    @property
    def base(self) -> Kind:
        """The kind that embedding, head and sends between stages are priced with."""
        return self.kinds[self.task.model.text_kind]

    @property
    def layout(self) -> Layout:
        """The plan's layout."""
        return self.plan.layout

    @cached_property
    def m(self) -> int:
        """Micro-batches."""
        return int(self.x.microbatches[0])

    @cached_property
    def rule(self) -> int:
        """Key of the layout's rule among those of the engine's accounting."""
        return _rule(self.task, self.x)

    @property
    def engines(self) -> bool:
        """Whether copy engines gather and reduce."""
        return self.rule > BY_ENGINES

    @property
    def overlapped(self) -> tuple[str, ...]:
        """Figures that say what of gathers and reductions beside compute is exposed, and what compute loses by them."""
        return () if self.engines else OVERLAPPED

    @cached_property
    def slowest(self) -> int:
        """The rank that all others wait for."""
        return int(np.argmax(self.cost.time)) if self.rank is None else self.rank

    @cached_property
    def updating(self) -> int:
        """The rank whose traffic and optimizer take longest."""
        return int(np.argmax(self.cost.once)) if self.rank is None else self.rank

    def ns(self, name: str, rank: int = 0) -> float:
        """A time of the integer model, seconds."""
        return float(getattr(self.q, name)[rank]) / 1e9

    def ends(self, rank: int) -> tuple[bool, bool]:
        """Whether a rank is the first one, the last one."""
        return rank == 0, rank == self.layout.last_rank

    def at(self, rank: int) -> tuple[Primitives, Ints, Ints]:
        """(primitives, whether first, whether last) of one rank, as the functions of `step` take them."""
        first, last = self.ends(rank)
        return self.q.take(np.array([rank])), np.array([int(first)]), np.array([int(last)])


def case_of(task: Task, plan: Plan, rank: int | None = None) -> Case:
    """Price a plan's layout; `rank` as in `Case`."""
    x, stages = LayoutArray.of([plan.layout], task.job), StageArray.of([plan.layout])
    mixed = len(task.model.kinds) > 1
    kinds = [_kind(task.only(k) if mixed else task, x, f"kind {k}: " if mixed else "") for k in range(len(task.model.kinds))]
    priced = [k.p.take(stages.row) for k in kinds]
    counts = step.layers_by_kind(task, plan.layout)
    stack = Stack.of(priced, task.model.text_kind) if mixed else None
    blended = None if stack is None else step.blended_ranks(task, stack, [plan.layout], x.microbatches)
    cost = step.stage_cost(kinds[task.model.text_kind].p, x, stages, blended)
    held, book = step.held(x.take(stages.row), stages), Book(task, _rule(task, x))
    pooled = devicetypes.pooled_bytes(task, plan.layout)
    return Case(
        task, plan, x, stages, tuple(kinds), counts, blended or priced[0], cost.without(pooled), pooled, held, book, rank
    )


def _rule(task: Task, x: LayoutArray) -> int:
    return int(memory.rule_of(task, x)[0])


def _kind(task: Task, x: LayoutArray, label: str) -> Kind:
    """Price one kind of layers."""
    seconds, here = operators.layer_seconds(task, x), np.zeros(1, dtype=np.int64)
    compute = layer_compute(task, x, seconds, here)
    traffic = dp_traffic(task, x, compute, idle_seconds(task, x, seconds, here))
    shapes, sources = operators.shapes_of(task, x), frozen.sources(task, x)
    return Kind(task, label, shapes, seconds, compute, traffic, sources, primitives.price(task, x))
