"""What the cost model says about a layout: its time and memory in integers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.cost import devicetypes
from planner.cost.task import Ints, Task
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
    p2p_ns: Ints
    """Of each rank."""
    weights: Ints
    """The part of R that layers spend on weight gradients, where the schedule runs them apart, ns."""
    credit: int
    """What that takes off the pipeline's time, v-ths of ns."""
    once_ns: int
    """max D, ns."""
    constant_ns: int
    allocated: Ints
    """Peak bytes."""
    capacity: Ints
    """Bytes that each rank may allocate."""
    outside: Ints
    """Bytes outside the allocator."""
    microbatches: int


def evaluate(task: Task, layout: Layout) -> Evaluated:
    """Price a layout whose stages hold all layers."""
    found = devicetypes.layout_cost(task, layout)
    ranks, cost = found.ranks, found.stages
    layers = np.array([stage.layers for stage in layout.stages], dtype=np.int64)
    return Evaluated(
        layout,
        int(found.total.step[0]),
        cost.time,
        layers * ranks.forward,
        int(ranks.embedding[0]),
        int(ranks.head[-1]),
        ranks.p2p,
        layers * ranks.weight,
        int(found.p.credit[0]),
        int(cost.once.max()),
        int(found.p.constant[0]),
        cost.allocated,
        ranks.capacity,
        ranks.outside,
        layout.microbatches(task.job),
    )
