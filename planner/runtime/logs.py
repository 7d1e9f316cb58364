"""A log file for each rank, lines for the terminal from rank 0, and what a run says of itself at its start."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from planner._version import __version__
from planner.planfile import Plan
from planner.runtime.mesh import World
from planner.runtime.metrics import device_name
from planner.specs.training import Options

SHOWN = ("CUDA_", "GLOO_", "MASTER_", "NCCL_", "OMP_", "PYTORCH_", "SLURM_JOB", "TORCH")
"""Environment variables that change how a run behaves begin like this."""


class RankLog:
    """`OUT/logs/rank-N.log`: one line an event, with its time. Restarts go on in the same file."""

    def __init__(self, folder: Path, rank: int):
        self.rank, self.folder = rank, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / f"rank-{rank}.log").open("a", encoding="utf-8")

    def write(self, text: str) -> None:
        """A line in this rank's file only."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        self.file.write(f"{now} {text}\n")
        self.file.flush()

    def say(self, text: str) -> None:
        """A line in the file, and from rank 0 on the terminal."""
        self.write(text)
        if self.rank == 0:
            print(text, file=sys.stderr, flush=True)


def describe(plan: Plan, world: World, options: Options, parameters: int, restarts: int) -> dict[str, Any]:
    """What was started, where and with what: the first thing in the log, and OUT/environment.json of rank 0."""
    return {
        "planner": __version__,
        "plan": plan.digest,
        "model": plan.model.name,
        "parameters": plan.model.total_params,
        "parameters_of_rank": parameters,
        "layout": plan.layout.model_dump(mode="json"),
        "microbatches": plan.layout.microbatches(plan.job),
        "tokens_per_step": plan.job.tokens_per_step,
        "options": options.model_dump(mode="json"),
        "host": platform.node(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": device_name(world.device),
        "world_size": world.size,
        "restarts": restarts,
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(SHOWN)},
    }


def headline(about: dict[str, Any]) -> str:
    """Two lines of it for the terminal."""
    layout = about["layout"]
    degrees = " ".join(f"{k}{layout[k]}" for k in ("tp", "cp", "pp", "dp", "ep") if layout[k] > 1) or "one device"
    line = f"{about['model']}: {about['parameters'] / 1e6:,.1f} M parameters on {about['world_size']} x {about['device']}"
    batches = f"micro-batch {layout['micro_batch']} x {about['microbatches']}"
    line += f", {degrees}, ZeRO {layout['zero']}, {layout['schedule']}, {batches}"
    again = f", restart {about['restarts']}" if about["restarts"] else ""
    steps = f"{about['tokens_per_step']:,} tokens a step, {about['options']['steps']:,} steps"
    return f"{line}\ntorch {about['torch']}, {steps}{again}"


def write_environment(about: dict[str, Any], folder: Path) -> None:
    """OUT/environment.json."""
    (folder / "environment.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
