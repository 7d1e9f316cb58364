"""What the cost model says about a layout: its time and memory in integers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.cost import primitives, step
from planner.cost.blending import Stack
from planner.cost.primitives import Primitives
from planner.cost.task import Ints, LayoutArray, StageArray, Task
from planner.specs.layout import Layout


@dataclass(frozen=True)
class Evaluated:
    """A layout priced; arrays over its pipeline ranks."""

    layout: Layout
    step_ns: int
    time: Ints
    """R, ns for one micro-batch."""
    forward: Ints
    """The part of R that layers spend in forward, ns."""
    embedding_ns: int
    head_ns: int
    p2p_ns: int
    once_ns: int
    """max D, ns."""
    constant_ns: int
    allocated: Ints
    """Peak bytes."""
    capacity: int
    """Bytes that may be allocated."""
    outside: int
    """Bytes outside the allocator."""
    microbatches: int


def evaluate(task: Task, layout: Layout) -> Evaluated:
    """Price a layout whose stages hold all layers."""
    x, stages = LayoutArray.of([layout], task.job), StageArray.of([layout])
    if task.model.homogeneous:
        p, blended = primitives.price(task, x), None
        ranks: Primitives = p.take(stages.row)
    else:
        kinds = [primitives.price(task.only(k), x) for k in range(len(task.model.kinds))]
        p, stack = kinds[task.model.text_kind], Stack.of([k.take(stages.row) for k in kinds], task.model.text_kind)
        ranks = blended = step.blended_ranks(task, stack, [layout], x.microbatches)
    cost = step.stage_cost(p, x, stages, blended)
    return Evaluated(
        layout,
        int(step.step_cost(p, x, stages, blended).step[0]),
        cost.time,
        np.asarray(stages.layers * ranks.forward),
        int(p.embedding[0]),
        int(p.head[0]),
        int(ranks.p2p[0]),
        int(cost.once.max()),
        int(p.constant[0]),
        cost.allocated,
        int(p.capacity[0]),
        int(p.outside[0]),
        int(x.microbatches[0]),
    )
