"""`planner run`: start a plan on this machine with the bundled runtime, and compare prediction and measurement."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli import common
from planner.errors import InputError, MissingPartError, Problem, input_error

if TYPE_CHECKING:
    from planner.planfile import Plan


@common.guarded
def run(
    plan_path: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")],
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps.")] = 20,
    out: Annotated[Path, typer.Option("--out", help="Folder for metrics and the summary.")] = Path("runs/latest"),
    data: Annotated[
        Path | None, typer.Option("--data", help="A token file (.bin of uint16 or uint32); synthetic when left out.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    learning_rate: Annotated[float, typer.Option("--lr", min=0.0)] = 3e-4,
    measure: Annotated[Path | None, typer.Option("--measure", help="Write prediction and measurement here as JSON.")] = None,
    output_format: Annotated[str, typer.Option("--format", help="table or json.")] = "table",
) -> None:
    """Train a plan here, and print predicted against measured."""
    from planner import planfile
    from planner.launchers.common import RunSettings, environment, runtime_arguments

    common.checked_format(output_format, ("table", "json"))
    common.writable(measure)
    plan = planfile.read(plan_path)
    if refused := planfile.refusals(plan):
        raise InputError(refused)
    _can_run_here(plan)
    _readable_data(plan, data)
    _usable_folder(out)
    settings = RunSettings(steps, str(out), str(data) if data else None, seed, learning_rate)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(plan.cluster.gpus)]
    code = _supervise([*words, *runtime_arguments(settings, str(plan_path))], {**environment(plan), **os.environ})
    if code:
        print(f"planner: the run ended with code {code}; the first failing rank's message is above", file=sys.stderr)
        raise typer.Exit(1)
    comparison = _comparison(plan, json.loads((out / "summary.json").read_text(encoding="utf-8")))
    if measure is not None:
        measure.write_text(common.to_json(comparison), encoding="utf-8")
    if output_format == "json":
        common.write_result(common.to_json(comparison))
    else:
        _print(plan, comparison)


def _can_run_here(plan: Plan) -> None:
    """Whether torch and enough devices are here. Raises MissingPartError or InputError."""
    if importlib.util.find_spec("torch") is None:
        problem = Problem("PLN550", "torch is not installed", "the runtime needs it", "pip install 'planner[runtime]'")
        raise MissingPartError(problem)
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


def _readable_data(plan: Plan, data: Path | None) -> None:
    """Whether the token file can feed a sequence. Raises InputError."""
    if data is None:
        return
    width = 2 if plan.model.vocab <= 1 << 16 else 4
    need = (plan.job.seq_len + 1) * width
    if not data.is_file() or not os.access(data, os.R_OK):
        raise input_error("PLN593", f"--data {data} is not a readable file", "", "give a flat binary file of token ids")
    size = data.stat().st_size
    if size < need or size % width:
        why = f"it has {size:,} bytes; tokens of this vocabulary take {width}, one sequence {need:,}"
        raise input_error("PLN593", f"--data {data} is not enough token ids", why, "give a longer file of whole tokens")


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


def _supervise(words: list[str], environment: dict[str, str]) -> int:
    """Run the job with its output on standard error; on a signal end all its processes and raise."""
    signals = common.Signals()
    output = sys.stderr.fileno() if _has_fileno() else None
    with subprocess.Popen(words, env=environment, stdout=output, start_new_session=True) as process:
        try:
            with signals:
                return process.wait()
        except KeyboardInterrupt as interrupt:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            interrupt.code = signals.code  # type: ignore[attr-defined]
            raise


def _has_fileno() -> bool:
    try:
        sys.stderr.fileno()
    except (OSError, ValueError):
        return False
    return True


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


def _error(predicted: float, measured: float | None) -> str:
    return f"{predicted / measured - 1:+.1%}" if measured else ""
