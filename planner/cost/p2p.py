"""Sends between neighbouring stages of a pipeline: their bytes, their time over each tier, and what of it is exposed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planner.cost.collectives import neighbour_seconds
from planner.cost.rounding import ceil
from planner.cost.task import Floats, Ints, LayoutArray, Task
from planner.specs.layout import SCHEDULES


def sent_bytes(task: Task, layouts: LayoutArray, boundary: Ints) -> Floats:
    """What one device sends of the tensor of `boundary` bytes between two stages."""
    return np.where(task.accounting.pp_split & (layouts.sequence_parallel == 0), boundary / layouts.tp, boundary)


def hop_seconds(task: Task, sent: Floats) -> tuple[Floats, ...]:
    """Time of one send to the next stage over each tier, before the growth of the cluster."""
    return tuple(task.constant("pp") * (t + task.accounting.pp_slot) for t in neighbour_seconds(sent, task.hardware))


def exposed(task: Task, layouts: LayoutArray, hops: Sequence[Ints]) -> Ints:
    """Exposed ns of one micro-batch: both directions through each of the v chunks; 0 without a pipeline.

    `hops`: ns of one send, by network tier, for each layout.
    """
    span, once = layouts.span, hops[0]
    for tier, hop in zip(task.hardware.network, hops[1:], strict=False):
        once = np.where(span > (tier.size or np.inf), hop, once)
    shares = np.array([task.accounting.pp_exposed.get(name, 1.0) for name in SCHEDULES])
    both = ceil(2.0 * shares[layouts.schedule] * once)
    return np.where(layouts.pp > 1, layouts.virtual_stages * both, 0)
