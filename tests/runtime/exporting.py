"""Read Hugging Face weights under several layouts and write them again, in two processes."""

from __future__ import annotations

from pathlib import Path

import plans
import torch

from planner.runtime import weights
from planner.runtime.train import Trainer
from planner.specs import files

LAYOUTS = {
    "tp2": {"tp": 2},
    "dp2-zero3": {"dp": 2, "zero": 3},
    "pp2": {"pp": 2, "schedule": "interleaved", "virtual_stages": 2},
}


def carry(directory: Path) -> None:
    """From DIR/source to a folder for each layout."""
    model, _ = files.load_model(str(directory / "source" / "config.json"))
    for name, layout in LAYOUTS.items():
        trainer = Trainer(plans.plan(model, **layout), torch.device("cpu"))
        weights.load(trainer, directory / "source")
        weights.export(trainer, directory / name)
