"""Processes and their grid: who am I, on which device, in which groups.

The mesh has the dimensions (pp, dp, tp), tp innermost: neighbours in rank order, which share the fastest links, form
a tensor parallel group.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from planner.errors import input_error
from planner.planfile import Plan


@dataclass(frozen=True)
class World:
    """This process's place in the plan's grid."""

    mesh: DeviceMesh
    """Dimensions (pp, dp, tp)."""
    device: torch.device
    pp: int
    dp: int
    tp: int
    pp_rank: int
    dp_rank: int
    tp_rank: int
    loss_rank: int
    """Pipeline rank of the head: the first one where stages make a V."""

    @property
    def rank(self) -> int:
        """Global rank."""
        return dist.get_rank()

    @property
    def size(self) -> int:
        """Processes in all."""
        return dist.get_world_size()

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the head and computes the loss."""
        return self.pp_rank == self.loss_rank


def uses_cuda(plan: Plan) -> bool:
    """Whether the plan runs on CUDA devices here."""
    return plan.cluster.device_kind != "cpu" and torch.cuda.is_available()


def start_processes(plan: Plan, timeout_s: float = 600.0) -> torch.device:
    """Join the process group that torchrun (or the caller's environment) describes; returns this rank's device.

    Raises InputError when the number of processes is not the plan's.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    check_world_size(plan, size)
    local_rank = int(os.environ.get("LOCAL_RANK", str(rank)))
    cuda = uses_cuda(plan)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if cuda else None,
        )
    return device


def check_world_size(plan: Plan, size: int) -> None:
    """Raise InputError unless `size` processes are what the layout uses."""
    layout = plan.layout
    if size == layout.world_size:
        return
    degrees = " x ".join(f"{n}{getattr(layout, n)}" for n in ("tp", "cp", "pp", "dp") if getattr(layout, n) > 1)
    raise input_error(
        "PLN590",
        f"{size} processes were started, the plan needs {layout.world_size}",
        f"its layout is {degrees or 'one device'}",
        f"start it with torchrun --nproc-per-node (times nodes) = {layout.world_size}",
    )


def build_world(plan: Plan, device: torch.device) -> World:
    """The mesh of the plan's layout over all processes. Collective."""
    layout = plan.layout
    shape = (layout.pp, layout.dp, layout.tp)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("pp", "dp", "tp"))
    pp_rank, dp_rank, tp_rank = mesh.get_coordinate() or (0, 0, 0)
    return World(mesh, device, *shape, pp_rank, dp_rank, tp_rank, layout.last_rank)
