"""`planner explain --verify`: exit 0 when every check of a plan passes, 1 with the first reason when one fails."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import typer

from planner.cli import common


def verify_file(path: Path, output_format: str) -> None:
    """Verify a plan file and print every check. Raises InputError when it cannot be read or holds nothing to verify."""
    from planner import planfile
    from planner.report import terminal, verification
    from planner.specs import files
    from planner.verify.case import case_of
    from planner.verify.checks import verify

    plan, stated = planfile.unchecked(files.parse_document(path))
    report = verify(case_of(plan, stated, str(path)), _Progress())
    if output_format == "json":
        common.write_result(common.to_json({"plan": plan.digest} | report.to_data()))
    else:
        verification.print_report(report, terminal.console())
    if not report.passed:
        print(f"planner: not verified: {report.reason}", file=sys.stderr)
        raise typer.Exit(1)


class _Progress:
    """What is being checked, on standard error: a line for each check that takes a while, at most one a second."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        if time.monotonic() - self.last < 1.0:
            return
        self.last = time.monotonic()
        amount = f": {done:,} of {total:,}" if total else ""
        print(f"verifying: {what}{amount}", file=sys.stderr, flush=True)
