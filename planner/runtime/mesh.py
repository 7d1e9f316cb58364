"""Processes and their grid: who am I, on which device, in which groups.

The mesh has the dimensions (pp, dp, cp, tp), tp innermost: neighbours in rank order, which share the fastest links, form
a tensor parallel group. The dp and cp ranks of one tp rank hold the same parameters: together they are the mesh of ZeRO.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from planner.errors import input_error
from planner.planfile import Plan
from planner.runtime import context, experts
from planner.specs.layout import Layout


@dataclass(frozen=True)
class World:
    """This process's place in the plan's grid."""

    mesh: DeviceMesh
    """Dimensions (pp, dp, cp, tp)."""
    data: DeviceMesh
    """The dp * cp ranks that hold the same parameters, one dimension, cp inside dp."""
    states: DeviceMesh
    """The same ranks as ZeRO shards over them: `data`, or (copies, ranks that share a copy) in hybrid sharding."""
    device: torch.device
    pp: int
    dp: int
    cp: int
    tp: int
    pp_rank: int
    dp_rank: int
    cp_rank: int
    tp_rank: int
    loss_rank: int
    """Pipeline rank of the head: the first one where stages make a V."""
    ring: bool = False
    """Whether the cp group shares attention around a ring."""
    experts: DeviceMesh | None = None
    """Dimensions (pp, efsdp, ep, etp): the same ranks as the experts see them. None without routed experts."""

    @property
    def rank(self) -> int:
        """Global rank."""
        return dist.get_rank()

    @property
    def size(self) -> int:
        """Processes in all."""
        return dist.get_world_size()

    def positions(self, seq_len: int) -> npt.NDArray[np.int64]:
        """Positions of each sequence that this rank sees, in the order in which it holds them, [s / cp]."""
        held = context.pieces(seq_len, self.cp, self.cp_rank, self.ring)
        return np.concatenate([np.arange(piece.start, piece.stop, dtype=np.int64) for piece in held])

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
        timeout = timedelta(seconds=timeout_s)
        store, _, _ = next(rendezvous("env://", rank, size, timeout=timeout))
        # With a static rendezvous (which keeps the order of nodes) torchrun's store lives through restarts: without a
        # prefix of its own a restarted job reads the addresses of the dead one, and hangs or is refused.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        # Offloaded gradients are in host memory: their norm is summed there.
        backend = "cpu:gloo,cuda:nccl" if plan.layout.offload == "optimizer" else "nccl"
        dist.init_process_group(
            backend if cuda else "gloo",
            store=PrefixStore(f"planner/attempt-{attempt}", store),
            rank=rank,
            world_size=size,
            timeout=timeout,
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
    shape = (layout.pp, layout.dp, layout.cp, layout.tp)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("pp", "dp", "cp", "tp"))
    data = _data_mesh(mesh, layout)
    copies = data.size() // layout.sharded
    states = data._unflatten(0, (copies, layout.sharded), ("copies", "shard")) if copies > 1 else data
    grid = experts.build_mesh(layout, device.type) if plan.model.routed_mlps else None
    pp_rank, dp_rank, cp_rank, tp_rank = mesh.get_coordinate() or (0, 0, 0, 0)
    places = (pp_rank, dp_rank, cp_rank, tp_rank)
    return World(mesh, data, states, device, *shape, *places, layout.last_rank, layout.context == "ring", grid)


def _data_mesh(mesh: DeviceMesh, layout: Layout) -> DeviceMesh:
    """The ranks that hold the same parameters; a mesh of two dimensions is joined only where both have ranks, since each
    mesh is a communicator of its own."""
    if layout.cp == 1:
        return mesh["dp"]
    return mesh["cp"] if layout.dp == 1 else mesh["dp", "cp"]._flatten("data")
