"""How a plan is trained: all that a run adds to its plan. One table for the program's flags, launch files and the runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from planner.specs.base import Spec

LrSchedule = Literal["cosine", "linear", "constant", "wsd"]


class Options(Spec):
    """What a run adds to its plan. Every field is a flag of the runtime (`--save-every` is `save_every`)."""

    steps: int = Field(default=20, ge=1, description="Optimizer steps, those before a resume included.")
    out: str = Field(default="runs/latest", description="Folder for metrics, logs, traces and the summary.")
    seed: int = Field(default=0, ge=0, description="Of first weights and of the order of the data.")
    log_every: int = Field(default=1, ge=1, description="Steps between progress lines.")

    lr: float = Field(default=3e-4, ge=0, description="Peak learning rate.")
    lr_schedule: LrSchedule = Field(
        default="cosine", description="cosine, linear, constant, or wsd (warm-up, stable, linear decay in the last fifth)."
    )
    warmup_steps: int = Field(default=-1, ge=-1, description="Steps of linear warm-up; -1: a tenth of all, at most 100.")
    min_lr: float = Field(default=0.1, ge=0, le=1, description="Last learning rate over the peak.")
    max_norm: float = Field(default=1.0, gt=0, description="Gradients are clipped to this global norm.")

    data: tuple[str, ...] = Field(
        default=(), description="Token file (.bin of uint16 or uint32), or PATH:WEIGHT in a mixture; synthetic when left out."
    )
    reset_data: bool = Field(default=False, description="After a resume start the data anew, instead of where it was.")
    eval_data: tuple[str, ...] = Field(default=(), description="Token file for the evaluation loss.")
    eval_every: int = Field(default=0, ge=0, description="Steps between evaluations; 0: at the end only.")
    eval_batches: int = Field(default=4, ge=1, description="Global batches of one evaluation, always the same ones.")

    checkpoint_dir: str = Field(default="", description="Folder of checkpoints [OUT/checkpoints].")
    save_every: int = Field(
        default=0, ge=0, description="Steps between checkpoints; 0 with a folder: at the end and on SIGTERM."
    )
    keep: int = Field(default=3, ge=1, description="Checkpoints that are kept.")
    resume: str = Field(default="auto", description="auto (the last good checkpoint, if there is one), none, or a checkpoint.")
    init_from: str = Field(default="", description="Hugging Face folder (safetensors) with the first weights.")
    export_hf: str = Field(default="", description="Folder for the last weights as Hugging Face safetensors.")

    step_timeout: float = Field(default=1800, ge=0, description="Seconds after which a step counts as hung; 0: never.")

    profile: bool = Field(default=False, description="Write a trace of three steps of each rank (torch profiler).")
    tensorboard: bool = Field(default=False, description="Write metrics for TensorBoard into OUT/tensorboard.")
    wandb: str = Field(default="", description="Send metrics to this Weights & Biases project.")

    @property
    def checkpoint_folder(self) -> Path | None:
        """Where checkpoints go, None when nothing is saved."""
        if self.checkpoint_dir:
            return Path(self.checkpoint_dir)
        named = self.resume not in ("auto", "none")
        return Path(self.out) / "checkpoints" if self.save_every or named else None


def help_of(name: str) -> str:
    """The help text of a field."""
    return Options.model_fields[name].description or ""


def words(options: Options) -> list[str]:
    """The runtime's flags for these options: the number of steps, the folder, and what is not as usual."""
    found: list[str] = []
    for name, field in Options.model_fields.items():
        value = getattr(options, name)
        if name not in ("steps", "out", "seed", "lr") and value == field.default:
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            found.append(flag)
        else:
            found += [w for v in (value if isinstance(value, tuple) else (value,)) for w in (flag, str(v))]
    return found


def argparse_arguments() -> list[tuple[str, dict[str, Any]]]:
    """(flag, keywords of `add_argument`) of each field."""
    found: list[tuple[str, dict[str, Any]]] = []
    for name, field in Options.model_fields.items():
        keywords: dict[str, Any] = {"default": field.default, "help": help_of(name).replace("%", "%%")}
        if isinstance(field.default, bool):
            keywords["action"] = "store_true"
        elif isinstance(field.default, tuple):
            keywords |= {"action": "append", "default": None}
        else:
            keywords["type"] = type(field.default) if field.default is not None else str
            if name in ("step_timeout",):
                keywords["type"] = float
        found.append(("--" + name.replace("_", "-"), keywords))
    return found
