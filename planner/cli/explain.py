"""`planner explain`: what is behind a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from planner.cli import common


@common.guarded
def explain(
    path: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file that planner plan -o wrote.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the plan's certificate again, by code that shares nothing with the search.")
    ] = False,
    output_format: Annotated[str, typer.Option("--format", help="table or json.")] = "table",
) -> None:
    """Explain a plan: its report, or with --verify whether what it claims is true."""
    from planner import planfile
    from planner.cli.explain_verify import verify_file
    from planner.cli.plan import print_plan

    common.checked_format(output_format, ("table", "json"))
    if verify:
        verify_file(path, output_format)
    else:
        print_plan(planfile.read(path), output_format)
