"""Read Hugging Face weights under several layouts and write them again: `python exporting.py DIR`, in two processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import plans
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from planner.runtime import weights
from planner.runtime.mesh import start_processes
from planner.runtime.train import Trainer
from planner.specs import files

LAYOUTS = {
    "tp2": {"tp": 2},
    "dp2-zero3": {"dp": 2, "zero": 3},
    "pp2": {"pp": 2, "schedule": "interleaved", "virtual_stages": 2},
}


def process(rank: int, directory: Path) -> None:
    """One process of the job."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    model, _ = files.load_model(str(directory / "source" / "config.json"))
    for name, layout in LAYOUTS.items():
        plan = plans.plan(model, **layout)
        trainer = Trainer(plan, start_processes(plan))
        weights.load(trainer, directory / "source")
        weights.export(trainer, directory / name)
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(process, args=(Path(sys.argv[1]),), nprocs=2)
