"""Where metrics go besides metrics.jsonl: TensorBoard and Weights & Biases, each when asked for and installed."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any, Protocol

from planner.errors import MissingPartError, Problem
from planner.planfile import Plan
from planner.specs.training import Options


class Sink(Protocol):
    """Takes each step's numbers on rank 0."""

    def add(self, step: int, values: dict[str, Any]) -> None:
        """The numbers of one step by name."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...


class TensorBoard:
    """Event files for TensorBoard, through torch's writer."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder))

    def add(self, step: int, values: dict[str, Any]) -> None:
        """One scalar a number."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out what is buffered."""
        self.writer.close()


class Wandb:
    """A Weights & Biases run; a resumed run goes on in the same one. WANDB_MODE and the like work as usual."""

    def __init__(self, project: str, folder: Path, config: dict[str, Any]):
        wandb: Any = importlib.import_module("wandb")

        name = folder.resolve().name
        self.run: Any = wandb.init(project=project, dir=str(folder), config=config, name=name, resume="allow")

    def add(self, step: int, values: dict[str, Any]) -> None:
        """One point a number."""
        self.run.log(values, step=step)

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


def check(options: Options) -> None:
    """Raise MissingPartError when a sink that was asked for is not installed."""
    for wanted, package in ((options.tensorboard, "tensorboard"), (bool(options.wandb), "wandb")):
        if wanted and importlib.util.find_spec(package) is None:
            problem = Problem("PLN619", f"{package} is not installed", f"--{package} needs it", f"pip install {package}")
            raise MissingPartError(problem)


def build(plan: Plan, options: Options) -> list[Sink]:
    """The sinks that were asked for; for rank 0."""
    out = Path(options.out)
    found: list[Sink] = []
    if options.tensorboard:
        found.append(TensorBoard(out / "tensorboard"))
    if options.wandb:
        config = {"model": plan.model.name, "layout": plan.layout.model_dump(mode="json"), **options.model_dump(mode="json")}
        found.append(Wandb(options.wandb, out, config))
    return found
