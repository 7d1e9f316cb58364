"""`planner check`: the feasibility gate for CI."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from planner.cli import common
from planner.errors import InputError, Problem


@common.guarded
def check(
    paths: Annotated[list[Path], typer.Argument(help="Plan files and configuration files.")],
    output_format: Annotated[str, typer.Option("--output-format", help="full, json, github or junit.")] = "full",
    output_file: Annotated[
        Path | None, typer.Option("--output-file", help="Write the findings here as well as the summary.")
    ] = None,
    max_oom_probability: Annotated[
        float | None,
        typer.Option(
            "--max-oom-probability", metavar="P", help="How likely to run out of memory, beside the files' own limits."
        ),
    ] = None,
) -> None:
    """Check that configurations are feasible. Exit 0 when they are, 1 with findings, 2 when a file cannot be read."""
    from planner.checks.feasibility import CheckResult, check_file
    from planner.planning.request import build_spec
    from planner.report import findings
    from planner.specs.policy import Policy

    limit = build_spec(Policy, {"max_oom_probability": max_oom_probability}, "policy").max_oom_probability
    common.checked_format(output_format, findings.FORMATS, "--output-format")
    common.writable(output_file)
    results, unreadable = [], []
    for path in paths:
        try:
            results.append(check_file(path, limit))
        except InputError as error:
            unreadable += list(error.problems)
            if output_format != "full":  # machine formats name every file
                results.append(CheckResult(str(path), "unreadable", error.problems))
    if not results:
        raise InputError(unreadable)
    text = findings.render(results, output_format)
    if output_file is not None:
        output_file.write_text(text, encoding="utf-8")
        if output_format != "full":
            text = findings.render(results, "full")
    common.write_result(text)
    _leave(results_failed=any(r.failed for r in results), unreadable=unreadable)


def _leave(results_failed: bool, unreadable: list[Problem]) -> None:
    if unreadable:
        raise InputError(unreadable)
    if results_failed:
        raise typer.Exit(1)
