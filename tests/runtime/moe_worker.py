"""Two processes: count what a mixture of experts exchanges, and carry a checkpoint between expert-parallel degrees.

`python moe_worker.py DIR` writes DIR/found.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import cases
import plans
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from planner.runtime.mesh import start_processes
from planner.runtime.train import Options, Trainer


class Exchanges(TorchDispatchMode):
    """Counts all-to-alls of rows and of counts, and the bytes of rows that leave this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.found = {"exchanges": 0, "counts": 0, "sent": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        if "alltoall_base" in str(func):
            rows = args[1].is_floating_point()
            self.found["exchanges" if rows else "counts"] += 1
            self.found["sent"] += args[1].nbytes if rows else 0
        return func(*args, **(kwargs or {}))


def count(recompute: str) -> dict[str, int]:
    """Of one step of two micro-batches; bytes of both ranks."""
    plan = plans.plan(cases.MODELS["moe"], dp=2, ep=2, zero=1, recompute=recompute, micro_batch=2)
    trainer = Trainer(plan, start_processes(plan), Options())
    with Exchanges() as mode:
        trainer.forward_backward(0)
    sent = torch.tensor(mode.found["sent"])
    dist.all_reduce(sent)
    return mode.found | {"sent": int(sent)}


def trained(seed: int, **layout: Any) -> Trainer:
    """A trainer of other values than another seed's."""
    plan = plans.plan(cases.MODELS["moe"], dp=2, **layout)
    return Trainer(plan, start_processes(plan), Options(seed=seed))


def full(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Whole parameters by name."""
    return {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in trainer.named_parameters()}


def carry(directory: Path) -> dict[str, Any]:
    """Save under ep 2, read under ep 1, save that and read it under ep 2 with other ZeRO stages."""
    source = trained(0, ep=2, zero=3)
    params = dict(source.named_parameters())
    dcp.save(dict(params), checkpoint_id=directory / "a")
    middle, last = trained(1, ep=1, zero=2), trained(2, ep=2, zero=1)
    dcp.load(dict(middle.named_parameters()), checkpoint_id=directory / "a")
    dcp.save(dict(middle.named_parameters()), checkpoint_id=directory / "b")
    dcp.load(dict(last.named_parameters()), checkpoint_id=directory / "b")
    wanted = full(source)
    others = [full(middle), full(last)]
    differences = sum(int((other[n] != wanted[n]).sum()) for other in others for n in wanted)
    w2: Any = params["layers.1.mlp.experts.w2"]
    return {
        "shapes": {n: list(p.shape) for n, p in params.items()},
        "w2": [w2.device_mesh.mesh_dim_names[-1], w2.placements[-1].dim],
        "differences": differences,
    }


def process(rank: int, directory: Path) -> None:
    """One process of the job."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    found: dict[str, Any] = {mode: count(mode) for mode in ("none", "full")} | carry(directory)
    if rank == 0:
        (directory / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(process, args=(Path(sys.argv[1]),), nprocs=2)
