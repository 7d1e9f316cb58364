"""`planner hardware`: shipped profiles, and whether a profile is complete."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from planner.cli import common
from planner.errors import InputError, Problem

app = typer.Typer(help="Look at hardware profiles.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
@common.guarded
def list_profiles(output_format: Annotated[str, typer.Option("--format", help="table or json.")] = "table") -> None:
    """The shipped profiles."""
    from planner.specs import files

    common.checked_format(output_format, ("table", "json"))
    profiles = [files.load_hardware(name)[0] for name in files.shipped("hardware_profiles")]
    if output_format == "json":
        common.write_result(
            common.to_json([{"name": p.name, "description": p.description, "device": p.device.name} for p in profiles])
        )
        return
    from rich.table import Table

    from planner.report.terminal import console
    from planner.units import gib, rate

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("name", "memory", "peak", "devices a node", "description"):
        table.add_column(name, overflow="fold")
    for p in profiles:
        kind = "fp32" if p.device.kind == "cpu" else "bf16"
        rates = {str(k): f.base for k, f in p.device.peak.items()}
        peak = f"{rate(rates[kind], 'FLOP/s')} {kind}" if kind in rates else ""
        table.add_row(p.name, gib(p.device.memory.base), peak, str(p.node_size), p.description)
    console().print(table)


@app.command("show")
@common.guarded
def show(
    profile: Annotated[str, typer.Argument(help="A shipped name or a file.")],
    output_format: Annotated[str, typer.Option("--format", help="table, json or yaml.")] = "table",
) -> None:
    """Every figure of a profile with its provenance and source."""
    from planner.specs import files

    common.checked_format(output_format, ("table", "json", "yaml"))
    loaded, _ = files.load_hardware(profile)
    data = loaded.model_dump(mode="json", exclude_none=True)
    if output_format != "table":
        common.write_result(common.to_json(data) if output_format == "json" else common.to_yaml(data))
        return
    from rich.table import Table

    from planner.report.terminal import console

    out = console()
    out.print(f"[bold]{loaded.name}[/]  {loaded.description}")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("figure", "value", "provenance", "source"):
        table.add_column(name, overflow="fold")
    for name, figure in _figures(data, ""):
        table.add_row(name, str(figure.get("value", "curve")), figure["provenance"], figure["source"])
    out.print(table)


def _figures(data: Any, prefix: str) -> list[tuple[str, dict[str, Any]]]:
    """Everything with a provenance, by dotted name."""
    if isinstance(data, dict):
        if "provenance" in data:
            return [(prefix, data)]
        return [item for k, v in data.items() for item in _figures(v, f"{prefix}.{k}" if prefix else k)]
    if isinstance(data, list):
        return [item for v in data for item in _figures(v, f"{prefix}[{v['name']}]" if isinstance(v, dict) else prefix)]
    return []


@app.command("validate")
@common.guarded
def validate(paths: Annotated[list[Path], typer.Argument(help="Profile files.")]) -> None:
    """Check profile files: all problems at once. Exit 0 when they are complete, 2 otherwise."""
    from planner.specs import files

    problems: list[Problem] = []
    for path in paths:
        try:
            loaded, _ = files.load_hardware(str(path))
            typer.echo(f"{path}: {loaded.name} is complete")
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
