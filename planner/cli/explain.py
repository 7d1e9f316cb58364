"""`planner explain`: why this plan, why not another, and whether what it claims is true."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from planner.cli import common
from planner.errors import input_error


@common.guarded
def explain(
    path: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file, from planner plan -o or planner estimate -o.")],
    why_not: Annotated[
        list[str] | None,
        typer.Option("--why-not", metavar="AXES", help="Why not this instead: tp=4,pp=8, axes as for --pin; repeatable."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the plan's certificate again, by code that shares nothing with the search.")
    ] = False,
    output_format: Annotated[str, typer.Option("--format", help="table, json or markdown (not with --verify).")] = "table",
) -> None:
    """Say what binds a plan, what its runners-up lose, what was excluded, where every rank is; or why not another layout."""
    common.checked_format(output_format, ("table", "json") if verify else ("table", "json", "markdown"))
    if verify and why_not:
        raise input_error("PLN107", "--verify beside --why-not", "each is an answer of its own", "give one of them")
    if verify:
        from planner.cli.explain_verify import verify_file

        verify_file(path, output_format)
    else:
        _explain(path, common.parse_axes(why_not or [], "--why-not"), output_format)


def _explain(path: Path, pins: dict[str, list[object]], output_format: str) -> None:
    import planner

    found = planner.explain(planner.load_plan(str(path)), why_not=pins)
    if output_format == "json":
        common.write_result(common.to_json(found.model_dump(mode="json")))
        return
    from planner.report import explain as report
    from planner.report import terminal

    if output_format == "markdown":
        common.write_result(report.markdown(found))
    else:
        report.print_explanation(found, terminal.console(piped=80))
