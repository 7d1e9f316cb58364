"""`planner emit`: write the files that start the bundled runtime on a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from planner.cli import common, training
from planner.errors import InputError, input_error

LAUNCHERS = ("torchrun", "slurm")


@common.guarded
def emit(
    plan_path: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")],
    launcher: Annotated[str, typer.Option("--launcher", help="torchrun or slurm.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write to.")],
    steps: training.Steps = 100,
    data: training.Data = None,
    run_out: Annotated[str, typer.Option("--run-out", help="Where the run writes its metrics.")] = "runs/latest",
    seed: training.Seed = 0,
    lr: training.Rate = 3e-4,
    checkpoint_dir: training.CheckpointDir = "",
    save_every: training.SaveEvery = 0,
    keep: training.Keep = 3,
    max_restarts: training.MaxRestarts = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A launcher's option, such as slurm.partition=gpu; repeatable.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files with other content.")] = False,
) -> None:
    """Write launch files for a plan. Other flags of `planner run` go behind the script's name when it is started."""
    flags = dict(locals())
    from planner import planfile
    from planner.launchers import slurm, torchrun
    from planner.launchers.common import RunSettings, write

    if launcher not in LAUNCHERS:
        raise input_error("PLN107", f"--launcher {launcher}: not a launcher", f"launchers are {', '.join(LAUNCHERS)}", "")
    plan = planfile.read(plan_path)
    if refused := planfile.refusals(plan):
        raise InputError(refused)
    training_options = training.options_of(flags, run_out)
    run = RunSettings(**training_options.model_dump(), max_restarts=training.restarts(max_restarts, training_options))
    options = _options(settings or [], launcher)
    files = torchrun.emit(plan, run) if launcher == "torchrun" else slurm.emit(plan, run, options)
    for path in write(files, out, force):
        typer.echo(str(path))


def _options(items: list[str], launcher: str) -> dict[str, str]:
    """`slurm.partition=gpu` as {"partition": "gpu"} for the launcher in question."""
    result = {}
    for name, values in common.parse_assignments(items, "--set").items():
        room, _, option = name.partition(".")
        if room != launcher or not option or launcher != "slurm":
            raise input_error("PLN505", f"--set {name}: not an option of {launcher}", "", "write --set slurm.partition=gpu")
        result[option] = ",".join(map(str, values))
    return result
