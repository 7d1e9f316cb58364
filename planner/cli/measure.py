"""`planner measure`: benchmark this machine, and write a hardware profile of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from planner.cli import common
from planner.errors import input_error

if TYPE_CHECKING:
    from planner.measure.records import Measurements
    from planner.measure.run import Progress


@common.guarded
def measure(
    output: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write the profile here (YAML); standard output when left out.")
    ] = None,
    raw: Annotated[Path | None, typer.Option("--raw", help="Keep every timing in this folder, as CSV.")] = None,
    from_raw: Annotated[
        Path | None, typer.Option("--from-raw", help="Fit timings that --raw kept, instead of measuring.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Profile for what one host cannot tell; the shipped one of this device when left out."),
    ] = None,
    nodes_tier: Annotated[
        str | None, typer.Option("--nodes-tier", help="Profile whose network beyond the node is used, if not the base's.")
    ] = None,
    node_size: Annotated[
        int | None, typer.Option("--node-size", min=1, help="Devices of one node, where fewer are here.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cuda or cpu.")] = "auto",
    devices: Annotated[int | None, typer.Option("--devices", help="How many devices (CPU: processes) to measure.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the profile; the file's when left out.")] = None,
    budget: Annotated[
        float | None, typer.Option("--budget", metavar="SECONDS", help="Time to measure beside start-up. [GPU 85, CPU 25]")
    ] = None,
) -> None:
    """Measure products, attention, memory, collectives and overheads of this machine: a profile with its own figures."""
    from planner.measure import profile, records, sources, text
    from planner.specs import files

    common.checked_format(device, ("auto", "cuda", "cpu"), "--device")
    common.writable(output)
    for reference in (base, nodes_tier):
        if reference is not None:
            common.distinct(output, files.load_hardware(reference)[1].path if Path(reference).is_file() else None)
    if budget is not None and not 1 <= budget <= 3600:
        raise input_error("PLN645", f"--budget {budget:g} is out of range", "", "give 1 to 3600 seconds")
    found = records.read(from_raw) if from_raw else _measure(device, devices, budget, (base, nodes_tier, node_size))
    if raw is not None:
        records.write(found, raw)
    completed = sources.sources(found, base, nodes_tier, name or (output.stem if output else "measured"), node_size)
    data = profile.document(completed)
    written = text.profile_text(data, completed.stamp, completed.taken)
    _check(written, output)
    if output is None:
        common.write_result(written)
    else:
        print(f"{output}: profile '{completed.name}' of {completed.stamp}", file=sys.stderr)
        print(f"use it with planner plan MODEL --hardware {output}", file=sys.stderr)


def _measure(
    device: str, devices: int | None, budget: float | None, context: tuple[str | None, str | None, int | None]
) -> Measurements:
    """Run the benchmarks; what cannot become a profile is refused before them."""
    from planner.measure import run, sources

    kind, count = run.machine(device, devices)
    sources.sources(run.described(kind, count), context[0], context[1], "measured", context[2])
    with _progress() as told:
        return run.measured(kind, count, budget or run.BUDGETS[kind], told)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on standard error; when that is no terminal, a line for each part."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        seen: set[str] = set()

        def line(share: float, what: str) -> None:
            part = what.split()[0]
            if part not in seen:
                seen.add(part)
                print(f"planner: {share:4.0%} {part}", file=sys.stderr, flush=True)

        yield line
        return
    columns = (TextColumn("{task.description:24}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda share, what: bar.update(task, completed=share, description=what)


def _check(written: str, output: Path | None) -> None:
    """A profile leaves only when it loads: read back through the specs, then put in place."""
    import tempfile

    from planner.specs import files

    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "profile.yaml"
        part.write_text(written, encoding="utf-8")
        files.load_hardware(str(part))
    if output is not None:
        part = output.with_name(output.name + ".part")
        part.write_text(written, encoding="utf-8")
        part.replace(output)
