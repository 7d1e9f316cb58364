"""Run the command line as a user would, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def planner(*words: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    base = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "FORCE_COLOR", "NO_COLOR")}
    command = [sys.executable, "-m", "planner", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, env={**base, **env}, check=False)


def one_line_error(result: subprocess.CompletedProcess[str], code: str, exit_code: int = 2) -> str:
    """The error has its code on the first line, no traceback, nothing on standard output."""
    assert result.returncode == exit_code, result.stderr
    assert "Traceback" not in result.stderr
    assert code in result.stderr.splitlines()[0], result.stderr
    assert result.stdout == ""
    return result.stderr
