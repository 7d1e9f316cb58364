"""Save under one plan and resume under others, in one job: `python resuming.py N DIR NAME...`.

Writes DIR/losses-N.json: {name: losses of the steps after the resume, with an evaluation before the last}. `save:NAME`
saves after 3 steps and trains on.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import plans
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from planner.planfile import Plan
from planner.runtime.checkpoint import Checkpoints
from planner.runtime.evaluate import Evaluation
from planner.runtime.mesh import start_processes
from planner.runtime.storage import Progress
from planner.runtime.train import Trainer
from planner.specs.training import Options

LLAMA = plans.llama(layers=5)
SAVED, STEPS = 3, 6
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "dp2-zero3": {"dp": 2, "zero": 3},
    "dp2-zero0": {"dp": 2, "zero": 0},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "pp2-interleaved": {"pp": 2, "schedule": "interleaved", "virtual_stages": 2},
    "dp4-zero3": {"dp": 4, "zero": 3},
    "tp2-dp2-zero2": {"tp": 2, "dp": 2, "zero": 2},
    "pp4": {"pp": 4},
    "pp2-dp2-zero3": {"pp": 2, "dp": 2, "zero": 3},
    "tp2-pp2-dp2-interleaved-zero3": {
        "tp": 2, "pp": 2, "dp": 2, "zero": 3, "schedule": "interleaved", "virtual_stages": 2, "recompute": "full",
    },
}  # fmt: skip


def build(name: str) -> Plan:
    """The plan of a layout."""
    return plans.plan(LLAMA, **LAYOUTS[name])


def losses(name: str, directory: Path, save: bool) -> list[float]:
    """Train, from the checkpoint unless it is to be made."""
    plan, folder = build(name), directory / "checkpoints"
    options = Options(lr=1e-2, steps=10, lr_schedule="linear", out=str(directory), checkpoint_dir=str(folder))
    trainer = Trainer(plan, start_processes(plan), options)
    checkpoints = Checkpoints(trainer, options, folder, lambda text: None)
    first = 0
    if not save:
        progress = checkpoints.resume()
        assert progress is not None
        first = progress.step
    found = []
    for step in range(first, STEPS):
        if step == STEPS - 1:  # the next step must not use what an evaluation gathered
            found.append(Evaluation(trainer).loss())
        found.append(trainer.train_step(step)[0])
        if save and step == SAVED - 1:  # training goes on while this is written: staging must have copied
            checkpoints.save(Progress(step=SAVED, samples=SAVED * 8, position=SAVED * 8))
    checkpoints.wait()
    return found


def process(rank: int, processes: int, directory: Path, names: list[str]) -> None:
    """One process of the job."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    results = {}
    for name in names:
        results[name] = losses(name.removeprefix("save:"), directory, name.startswith("save:"))
        dist.barrier()
    if rank == 0:
        (directory / f"losses-{processes}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(process, args=(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]), nprocs=int(sys.argv[1]))
