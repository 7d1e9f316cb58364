"""Which parameters and gradients go through copy engines: where all ranks are of one node and share one copy of the states."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from planner.runtime import gather, scatter, symmetric
from planner.runtime.model import Decoder
from planner.runtime.precision import DTYPES
from planner.specs.job import Job
from planner.specs.layout import Layout


def suits(layout: Layout) -> bool:
    """Whether all ranks are of one node and share one copy of the states: engines do not reach beyond a node, and other groups
    would wait for each other in the same memory."""
    return shares(layout) and symmetric.suits(layout.world_size)


def shares(layout: Layout) -> bool:
    """Whether all ranks share one copy of the states, which are on the device."""
    shared = layout.zero > 0 and layout.offload == "none" and layout.ep * layout.etp == 1
    return shared and layout.world_size == layout.dp * layout.cp == layout.sharded and layout.world_size > 1


def gradient_type(layout: Layout, job: Job) -> torch.dtype:
    """The type in which units hand gradients over: sums of several micro-batches (ZeRO 1) are fp32, others as backward makes
    them."""
    return torch.float32 if layout.zero == 1 and layout.microbatches(job) > 1 else DTYPES[job.precision]


def use(part: Decoder, layout: Layout, job: Job, mesh: DeviceMesh) -> None:
    """Let FSDP2 gather the blocks of `part`, and reduce all of it, by engines over the ranks of `mesh`. Collective."""
    if mesh.device_type != "cuda" or not suits(layout):
        return
    device, group = torch.device("cuda", torch.cuda.current_device()), mesh.get_group()
    dist.barrier(group)  # makes NCCL's communicator, as the first gather of the embedding would
    engine = gather.EngineGather()
    if symmetric.works(gather.trial(engine, group, device), device, group):
        gather.use(part.blocks(), engine)
    room = scatter.largest_part(part.blocks(), mesh.size())
    made: list[scatter.EngineReduction] = []

    def make() -> None:
        made.append(scatter.EngineReduction(gradient_type(layout, job), room, group, device))

    steps = [make, lambda: made[0].meet(group), lambda: scatter.trial(made[0], group, device)]
    if symmetric.works(steps, device, group):
        scatter.use(part, made[0])
