"""`planner plan`: search, prove, print, write."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner import stopping
from planner.cli import common
from planner.errors import InfeasibleError, Problem, input_error

if TYPE_CHECKING:
    from planner.planfile import Plan
    from planner.planning.request import Request
    from planner.search.solve import Progress


@common.anytime
def plan(
    model: common.ModelArgument,
    hardware: common.Hardware,
    seq_len: common.SeqLen,
    global_batch: common.GlobalBatch,
    nodes: common.NodeCounts = None,
    gpus: common.GpuCounts = None,
    precision: common.Precision = "bf16",
    engine: common.EngineName = "bundled",
    lora_rank: common.LoraRank = None,
    lora_targets: common.LoraTargets = None,
    lora_base: common.LoraBase = None,
    lora_train_embeddings: common.LoraEmbeddings = False,
    pin: Annotated[
        list[str] | None, typer.Option("--pin", help="Restrict an axis: tp=8, zero=0,1, recompute=full; repeatable.")
    ] = None,
    forbid: Annotated[
        list[str] | None, typer.Option("--forbid", help="Leave out an axis or choice: cp, interleaved, full; repeatable.")
    ] = None,
    max_memory_fraction: common.Fraction = 0.92,
    max_oom_probability: common.OomProbability = None,
    objective: Annotated[
        str, typer.Option("--objective", help="throughput, time, cost, min-gpus or memory: what the plan is the best for.")
    ] = "throughput",
    tokens: common.Tokens = None,
    price: common.Price = None,
    pue: common.Pue = None,
    deadline_days: Annotated[
        float | None, typer.Option("--deadline-days", metavar="D", help="Days that training --tokens may take.")
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", min=1, max=50, help="Plans to prove, the best included.")] = 4,
    time_limit: Annotated[float | None, typer.Option("--time-limit", help="Seconds; then the best plan so far.")] = None,
    pareto: Annotated[
        str | None,
        typer.Option("--pareto", metavar="WHAT", help="Step time against memory, gpus or cost: all best trade-offs."),
    ] = None,
    points: Annotated[
        int | None, typer.Option("--points", help="Memory limits that --pareto memory tries. [16]", show_default=False)
    ] = None,
    chart: Annotated[
        Path | None, typer.Option("--chart", help="Draw the front of --pareto here: .svg or .png (extra report).")
    ] = None,
    space: Annotated[
        bool, typer.Option("--space", help="Print the declared space and count it; plan nothing. Formats table and json.")
    ] = False,
    output_format: common.Format = "table",
    output: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write the plan file here; a table of counts as .csv or .parquet.")
    ] = None,
    as_type: common.AsType = None,
) -> None:
    """Find the best layout for a training job, prove it, and say whether it fits."""
    from planner.cli import pareto as front
    from planner.cli import scale
    from planner.planning.counts import several

    common.checked_format(output_format)
    common.writable(output)
    flags = dict(locals())
    if time_limit is not None and not (0 < time_limit < float("inf")):
        raise input_error("PLN107", f"--time-limit {time_limit}: not a time above zero", "", "give seconds, such as 60")
    if space:
        _space(flags)
        return
    if pareto is not None:
        front.front(flags | {"points": 16 if points is None else points})
        return
    front.checked_without(flags)
    if several(nodes) or several(gpus):
        scale.scaling(flags)
    else:
        _one(flags)


def _space(flags: dict[str, Any]) -> None:
    """Print the declared space. Raises InputError."""
    from planner.planning.counts import several
    from planner.planning.spaceview import space_view

    common.checked_format(flags["output_format"], ("table", "json"))
    if flags["pareto"] is not None or flags["output"] is not None:
        raise input_error("PLN129", "--space makes no plan and no front", "", "leave out --pareto and -o")
    if several(flags["nodes"]) or several(flags["gpus"]):
        raise input_error("PLN129", "--space with several counts", "each has a space of its own", "give one count")
    view = space_view(request_of(flags))
    if flags["output_format"] == "json":
        common.write_result(common.to_json(view.to_data()))
    else:
        from planner.report import space, terminal

        space.print_space(view, terminal.console())


def _one(flags: dict[str, Any]) -> None:
    """Plan for one cluster; print, and write."""
    from planner import planfile
    from planner.planning.economy import in_time
    from planner.planning.make import NothingFits, make_plan

    output, output_format = flags["output"], flags["output_format"]
    request = request_of(flags)
    try:
        with progress() as report:
            made = make_plan(request, flags["top_k"], report, flags["time_limit"])
    except NothingFits as error:
        if output_format == "json":
            certificate = error.certificate.model_dump(mode="json")
            changes = [change.model_dump(mode="json") for change in error.changes]
            data = {"certificate": certificate, "smallest_nodes": error.smallest_nodes, "changes": changes}
            common.write_result(common.to_json(data))
        raise
    if not in_time(made.economy):
        if made.certificate is not None and made.certificate.status == "interrupted":
            raise KeyboardInterrupt if stopping.received() else TimeoutError  # a faster plan may be in time
        raise _late(made)
    if output is not None:
        planfile.write(made, output)
    print_plan(made, output_format)
    if output is not None:
        print(f"plan written to {output}", file=sys.stderr)
    _say_ended(made)


def what_ended() -> str:
    """What ended a search early."""
    number = stopping.received()
    return f"interrupted ({signal.Signals(number).name})" if number else "the time limit passed"


def _say_ended(made: Plan) -> None:
    """Say on standard error when the plan is the best so far and not the proven one."""
    proof = made.certificate
    if proof is not None and proof.status == "interrupted":
        far = "with no bound yet" if proof.gap is None else f"at most {proof.gap:.2%} of its step time above the optimum"
        print(f"planner: {what_ended()}: this is the best plan so far, {far}", file=sys.stderr)
    elif stopping.received():
        print(f"planner: {what_ended()}: the plan is proven, some runners-up may not be", file=sys.stderr)


def _late(made: Plan) -> InfeasibleError:
    """The fastest plan is after the deadline."""
    from planner.units import count, days

    e = made.economy
    assert e is not None
    assert e.deadline_days is not None
    what = f"{count(e.tokens)} tokens take {days(e.days.value)} on {made.cluster.gpus} devices, after {days(e.deadline_days)}"
    fix = "compare larger clusters: --nodes 8:64:8 --objective min-gpus"
    return InfeasibleError(Problem("PLN304", what, f"{e.steps:,} steps of {made.estimate.step_time_s:.3g} s", fix))


def request_of(flags: dict[str, Any]) -> Request:
    """The request in the flags; of several counts the first. Raises InputError."""
    from planner.planning.counts import parse_counts
    from planner.planning.economy import budget
    from planner.planning.request import Request, build_spec, checked_objective
    from planner.specs import files
    from planner.specs.job import Job
    from planner.specs.policy import Policy

    job_data = {k: flags[k] for k in ("seq_len", "global_batch", "precision")} | {"adapter": common.adapter(flags)}
    job = build_spec(Job, job_data, "job")
    policy = build_spec(Policy, {k: flags[k] for k in ("max_memory_fraction", "max_oom_probability")}, "policy")
    nodes, gpus = (parse_counts(flags[n], f"--{n}")[0] if flags[n] is not None else None for n in ("nodes", "gpus"))
    model = flags["model"]
    if flags.get("as_type"):
        model = files.load_model(model, as_type=flags["as_type"])[0]
    return Request(
        model,
        job=job,
        nodes=nodes,
        gpus=gpus,
        engine=flags["engine"],
        policy=policy,
        pins=common.parse_assignments(flags.get("pin") or [], "--pin"),
        forbid=[name.strip() for item in flags.get("forbid") or [] for name in item.split(",")],
        objective=checked_objective(flags["objective"]),
        **common.machine(flags["hardware"]),
        budget=budget(flags["tokens"], flags["price"], flags["pue"], flags["deadline_days"]),
    )


def print_plan(made: Plan, output_format: str) -> None:
    """A plan or an estimate in one of the formats."""
    if output_format == "json":
        common.write_result(made.to_json())
    elif output_format == "yaml":
        common.write_result(common.to_yaml(made.to_data()))
    elif output_format in ("csv", "markdown"):
        from planner.report import frames

        frame = frames.plan_frame(made)
        common.write_result(frame.to_csv(index=False) if output_format == "csv" else frames.markdown(frame))
    else:
        from planner.report import terminal

        terminal.print_plan(made, terminal.console())


class progress:
    """A progress bar on standard error, for a terminal, once the search has taken a second."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.live = sys.stderr.isatty()
        self.bar: Any = None

    def __enter__(self) -> Progress:
        return self.report

    def report(self, phase: str, done: int, total: int) -> None:
        if not self.live or (self.bar is None and time.monotonic() - self.started < 1.0):
            return
        if self.bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task("search", total=total)
        names = {"exact": "layouts solved exactly", "target": "layouts settled"}
        self.bar.update(self.task, description=names.get(phase, phase), completed=done, total=max(total, 1))

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
