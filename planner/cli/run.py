"""`planner run`: start a plan on this machine with the bundled runtime, and compare prediction and measurement."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli import common, dryrun, training
from planner.cli.supervise import supervise
from planner.errors import InputError, input_error

if TYPE_CHECKING:
    from planner.planfile import Plan


@common.guarded
def run(
    plan_path: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")],
    steps: training.Steps = 20,
    out: Annotated[Path, typer.Option("--out", help="Folder for metrics, logs and the summary.")] = Path("runs/latest"),
    seed: training.Seed = 0,
    measure: Annotated[
        Path | None, typer.Option("--measure", help="Write prediction and measurement here, for validate and calibrate.")
    ] = None,
    output_format: Annotated[str, typer.Option("--format", help="table or json.")] = "table",
    lr: training.Rate = 3e-4,
    lr_schedule: training.Schedule = "cosine",
    warmup_steps: training.WarmupSteps = -1,
    min_lr: training.MinRate = 0.1,
    max_norm: training.MaxNorm = 1.0,
    data: training.Data = None,
    reset_data: training.ResetData = False,
    eval_data: training.EvalData = None,
    eval_every: training.EvalEvery = 0,
    eval_batches: training.EvalBatches = 4,
    checkpoint_dir: training.CheckpointDir = "",
    save_every: training.SaveEvery = 0,
    keep: training.Keep = 3,
    resume: training.Resume = "auto",
    init_from: training.InitFrom = "",
    export_hf: training.ExportHf = "",
    max_restarts: training.MaxRestarts = None,
    step_timeout: training.StepTimeout = 1800.0,
    grace: Annotated[
        float,
        typer.Option("--grace", min=0.0, rich_help_panel=training.FAULTS, help="Seconds to save in after SIGTERM or Ctrl-C."),
    ] = 60.0,
    log_every: training.LogEvery = 1,
    profile: training.Trace = False,
    tensorboard: training.TensorBoard = False,
    wandb: training.Wandb = "",
    dry_run: dryrun.DryRun = False,
    rank: dryrun.Rank = "peak",
    exact_steps: dryrun.ExactSteps = False,
) -> None:
    """Train a plan here, and print predicted against measured."""
    flags = dict(locals())
    from planner import planfile
    from planner.launchers.common import environment, runtime_arguments

    common.checked_format(output_format, ("table", "json"))
    common.writable(measure)
    plan = planfile.read(plan_path)
    if refused := planfile.refusals(plan):
        raise InputError(refused)
    if dry_run:
        dryrun.dry_run(plan, rank, exact_steps, output_format)
        raise typer.Exit
    _can_run_here(plan)
    options = training.options_of(flags, str(out))
    training.check_files(plan, options)
    _usable_folder(out)
    summary = out / "summary.json"
    summary.unlink(missing_ok=True)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(plan.cluster.gpus)]
    words += ["--max-restarts", str(training.restarts(max_restarts, options))]
    stop = out / "stop" if options.checkpoint_folder is not None else None
    whole = [*words, *runtime_arguments(options, str(plan_path))]
    code = supervise(whole, {**environment(plan), **os.environ}, stop, grace)
    if code or not summary.exists():
        said = f"the run ended with code {code}; the first failing rank's message is above" if code else "the run was stopped"
        print(f"planner: {said}", file=sys.stderr)
        raise typer.Exit(1)
    _report(plan, json.loads(summary.read_text(encoding="utf-8")), measure, output_format)


def _report(plan: Plan, summary: dict[str, Any], measure: Path | None, output_format: str) -> None:
    """Predicted against measured; nothing to compare when a resume found all steps done."""
    from planner.validation.measured import measurement

    if "step_time_s" not in summary:
        print("planner: all steps were done before; give more --steps", file=sys.stderr)
        return
    comparison = _comparison(plan, summary)
    if measure is not None:
        measure.write_text(common.to_json(comparison | measurement(plan, summary)), encoding="utf-8")
    if output_format == "json":
        common.write_result(common.to_json(comparison))
    else:
        _print(plan, comparison)


def _can_run_here(plan: Plan) -> None:
    """Whether torch and enough devices are here. Raises MissingPartError or InputError."""
    common.needs_torch()
    from planner.runtime.devices import local_devices

    if plan.cluster.types and plan.cluster.device_kind != "cpu":
        why, fix = "this machine has devices of one", "start it on the cluster with planner emit"
        raise input_error("PLN159", "the plan is for nodes of two device types", why, fix)
    kind, count = local_devices()
    if plan.cluster.device_kind == "cpu":
        return
    if kind == "cpu" or count < plan.cluster.gpus:
        found = "no accelerator" if kind == "cpu" else f"{count} of them"
        what = f"the plan needs {plan.cluster.gpus} x {plan.cluster.device}, this machine has {found}"
        fix = "start it on the cluster with planner emit, or plan for --hardware local-cpu"
        raise input_error("PLN503", what, "", fix)


def _usable_folder(out: Path) -> None:
    """Whether the run can write there. Raises InputError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise input_error(
            "PLN113", f"--out {out} cannot be made", error.strerror or str(error), "give a writable folder"
        ) from None
    if not os.access(out, os.W_OK):
        raise input_error("PLN113", f"--out {out} is not writable", "", "give a writable folder")


def _comparison(plan: Plan, summary: dict[str, Any]) -> dict[str, Any]:
    """Prediction and measurement side by side."""
    e = plan.estimate
    allocated = [v for v in summary["peak_allocated_gib"] if v is not None]
    measured = {
        "step_time_s": summary["step_time_s"],
        "tokens_per_s": summary["tokens_per_s"],
        "peak_allocated_gib": max(allocated) if allocated else None,
    }
    predicted = {
        "step_time_s": e.step_time_s,
        "tokens_per_s": e.tokens_per_s,
        "peak_allocated_gib": e.memory.peak_allocated_gib,
    }
    stages = _by_stage(plan, summary)
    return {
        "plan": plan.digest,
        "predicted": predicted,
        "measured": measured,
        "stages": stages,
        "loss": {"first": summary["first_loss"], "last": summary["last_loss"], "steps": summary["steps"]},
        "eval_loss": summary["eval_loss"],
        "environment": {k: summary[k] for k in ("device", "torch_version", "world_size")},
    }


def _by_stage(plan: Plan, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Peak allocated GiB of each pipeline rank, predicted and measured (the worst of its processes)."""
    worst: dict[int, float] = {}
    for stage, value in zip(summary["stage_of_rank"], summary["peak_allocated_gib"], strict=True):
        if value is not None:
            worst[stage] = max(worst.get(stage, 0.0), value)
    predicted = {s.stage: s.allocated for s in plan.estimate.memory.stages}
    return [{"stage": s, "predicted_gib": predicted[s], "measured_gib": v} for s, v in sorted(worst.items())]


def _print(plan: Plan, comparison: dict[str, Any]) -> None:
    from planner.report.terminal import console, print_comparison
    from planner.units import GIB, gib, seconds, significant

    p, m = comparison["predicted"], comparison["measured"]
    rows = [("step time", seconds(p["step_time_s"]), seconds(m["step_time_s"]), _error(p["step_time_s"], m["step_time_s"]))]
    rows.append(
        (
            "tokens/s",
            significant(p["tokens_per_s"]),
            significant(m["tokens_per_s"]),
            _error(p["tokens_per_s"], m["tokens_per_s"]),
        )
    )
    for s in comparison["stages"]:
        name = f"peak allocated, rank {s['stage']} of pp" if plan.layout.pp > 1 else "peak allocated"
        values = (s["predicted_gib"], s["measured_gib"])
        rows.append((name, gib(values[0] * GIB), gib(values[1] * GIB), _error(*values)))
    loss = comparison["loss"]
    out = console()
    print_comparison(rows, out)
    out.print(f"loss {loss['first']:.4f} -> {loss['last']:.4f} in {loss['steps']} steps")
    if comparison["eval_loss"] is not None:
        out.print(f"evaluation loss {comparison['eval_loss']:.4f}")


def _error(predicted: float, measured: float | None) -> str:
    return f"{predicted / measured - 1:+.1%}" if measured else ""
