"""The flags of a training run, by group, for the commands that start one or write files that do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from planner.errors import InputError, Problem, input_error
from planner.specs.training import Options, help_of

if TYPE_CHECKING:
    from planner.planfile import Plan


def _option(name: str, panel: str, **keywords: Any) -> Any:
    return typer.Option("--" + name.replace("_", "-"), help=help_of(name), rich_help_panel=panel, **keywords)


OPTIMIZER, DATA, CHECKPOINTS, FAULTS, OUTPUT = "Optimizer", "Data", "Checkpoints and weights", "Faults", "Output"

Steps = Annotated[int, typer.Option("--steps", min=1, help=help_of("steps"))]
Seed = Annotated[int, typer.Option("--seed", min=0, help=help_of("seed"))]
Rate = Annotated[float, _option("lr", OPTIMIZER, min=0.0)]
Schedule = Annotated[str, _option("lr_schedule", OPTIMIZER)]
WarmupSteps = Annotated[int, _option("warmup_steps", OPTIMIZER, min=-1)]
MinRate = Annotated[float, _option("min_lr", OPTIMIZER, min=0.0, max=1.0)]
MaxNorm = Annotated[float, _option("max_norm", OPTIMIZER)]
Data = Annotated[list[str] | None, _option("data", DATA, metavar="PATH[:WEIGHT]")]
ResetData = Annotated[bool, _option("reset_data", DATA)]
EvalData = Annotated[list[str] | None, _option("eval_data", DATA, metavar="PATH[:WEIGHT]")]
EvalEvery = Annotated[int, _option("eval_every", DATA, min=0)]
EvalBatches = Annotated[int, _option("eval_batches", DATA, min=1)]
CheckpointDir = Annotated[str, _option("checkpoint_dir", CHECKPOINTS, show_default=False)]
SaveEvery = Annotated[int, _option("save_every", CHECKPOINTS, min=0)]
Keep = Annotated[int, _option("keep", CHECKPOINTS, min=1)]
Resume = Annotated[str, _option("resume", CHECKPOINTS)]
InitFrom = Annotated[str, _option("init_from", CHECKPOINTS, metavar="DIR", show_default=False)]
ExportHf = Annotated[str, _option("export_hf", CHECKPOINTS, metavar="DIR", show_default=False)]
StepTimeout = Annotated[float, _option("step_timeout", FAULTS, min=0.0)]
MaxRestarts = Annotated[
    int | None,
    typer.Option(
        "--max-restarts", min=0, rich_help_panel=FAULTS,
        help="How often torchrun restarts a failed job [3 with checkpoints, else 0].",
    ),
]  # fmt: skip
LogEvery = Annotated[int, _option("log_every", OUTPUT, min=1)]
Trace = Annotated[bool, _option("profile", OUTPUT)]
TensorBoard = Annotated[bool, _option("tensorboard", OUTPUT)]
Wandb = Annotated[str, _option("wandb", OUTPUT, metavar="PROJECT", show_default=False)]


class Grouped(TyperCommand):
    """A command whose help lists options under the names of their groups, as plain text."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments and options, those without a group first."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                title = (isinstance(parameter, TyperOption) and parameter.rich_help_panel) or ""
                title = title or ("Options" if isinstance(parameter, TyperOption) else "Arguments")
                groups.setdefault(title, []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


def options_of(flags: dict[str, Any], out: str) -> Options:
    """The options that flags describe; `flags` may hold more. Raises InputError with every problem."""
    values = {name: flags[name] for name in Options.model_fields if flags.get(name) is not None} | {"out": out}
    for name in ("data", "eval_data"):
        values[name] = tuple(flags.get(name) or ())
    kinds = ("cosine", "linear", "constant", "wsd")
    if values.get("lr_schedule", "cosine") not in kinds:
        raise input_error("PLN107", f"--lr-schedule {values['lr_schedule']}: not one", f"they are {', '.join(kinds)}", "")
    if values.get("max_norm", 1.0) <= 0:
        raise input_error("PLN107", f"--max-norm {values['max_norm']}: not above 0", "", "give a norm such as 1.0")
    return Options(**values)


def restarts(given: int | None, options: Options) -> int:
    """How often torchrun restarts the job: without checkpoints it would begin anew."""
    return given if given is not None else 3 if options.checkpoint_folder is not None else 0


def check_files(plan: Plan, options: Options) -> None:
    """Whether token files can feed a sequence, and folders are where they are read. Raises InputError with all problems."""
    problems = []
    for flag, texts in (("--data", options.data), ("--eval-data", options.eval_data)):
        problems += [p for text in texts if (p := _data_problem(plan, flag, text)) is not None]
    if options.eval_every and not options.eval_data:
        problems.append(Problem("PLN623", "--eval-every without --eval-data", "nothing to evaluate on", "add --eval-data PATH"))
    if options.init_from and not (Path(options.init_from) / "config.json").is_file():
        what = f"--init-from {options.init_from} has no config.json"
        problems.append(Problem("PLN621", what, "", "give the folder of a Hugging Face model"))
    if problems:
        raise InputError(problems)


def _data_problem(plan: Plan, flag: str, text: str) -> Problem | None:
    from planner.runtime.tokens import parse_source

    path, _ = parse_source(text)
    if not path.is_file() or not os.access(path, os.R_OK):
        return Problem("PLN593", f"{flag} {path} is not a readable file", "", "give a flat binary file of token ids")
    width = 2 if plan.model.vocab <= 1 << 16 and not path.with_suffix(".idx").is_file() else 0
    size, need = path.stat().st_size, (plan.job.seq_len + 1) * (width or 2)
    if size < need or (width and size % width):
        why = f"it has {size:,} bytes; tokens of this vocabulary take {width or 'two or four'}, one sequence {need:,}"
        return Problem("PLN593", f"{flag} {path} is not enough token ids", why, "give a longer file of whole tokens")
    return None
