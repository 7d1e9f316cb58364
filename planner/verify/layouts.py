"""What the cost model says about a layout: its time and memory in integers."""

from __future__ import annotations

from dataclasses import dataclass

from planner.cost import devicetypes
from planner.cost.simulated import Pieces, pieces
from planner.cost.task import Ints, Task
from planner.specs.layout import Layout


@dataclass(frozen=True)
class Evaluated:
    """A layout priced; arrays over its pipeline ranks."""

    layout: Layout
    step_ns: int
    time: Ints
    """R, ns for one micro-batch."""
    pieces: Pieces
    """What each chunk computes."""
    credit: int
    """What a split backward takes off the pipeline's time, v-ths of ns."""
    once_ns: int
    """max D, ns."""
    constant_ns: int
    held: Ints
    """Peak bytes of the allocator: allocated ones and what its pools keep."""
    allocated: Ints
    capacity: Ints
    """Bytes that each rank may allocate."""
    outside: Ints
    """Bytes outside the allocator."""
    microbatches: int


def evaluate(task: Task, layout: Layout) -> Evaluated:
    """Price a layout whose stages hold all layers."""
    found = devicetypes.layout_cost(task, layout)
    ranks, cost = found.ranks, found.stages
    return Evaluated(
        layout,
        int(found.total.step[0]),
        cost.time,
        pieces(task, layout, found),
        int(found.p.credit[0]),
        int(cost.once.max()),
        int(found.p.constant[0]),
        cost.allocated,
        cost.without(devicetypes.pooled_bytes(task, layout)).allocated,
        ranks.capacity,
        ranks.outside,
        layout.microbatches(task.job),
    )
