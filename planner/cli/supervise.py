"""Run a job of many processes as one child: its output goes to standard error, and signals end it in good order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from planner.cli import common


def supervise(words: list[str], environment: dict[str, str], stop: Path | None, grace_s: float) -> int:
    """The job's exit code. On a signal all its processes end, and KeyboardInterrupt is raised.

    With `stop`, a file that asks the job to save and end, the job has `grace_s` seconds for that first; torchrun itself
    would kill it after 30. A second signal ends it at once.
    """
    signals = common.Signals()
    output = sys.stderr.fileno() if _has_fileno() else None
    with subprocess.Popen(words, env=environment, stdout=output, start_new_session=True) as process:
        try:
            with signals:
                return process.wait()
        except KeyboardInterrupt as interrupt:
            if stop is not None:
                print(f"planner: saving before the end, at most {grace_s:g} s; again to end at once", file=sys.stderr)
                _asked(process, stop, grace_s)
            _end(process)
            interrupt.code = signals.code  # type: ignore[attr-defined]
            raise


def _asked(process: subprocess.Popen[bytes], stop: Path, grace_s: float) -> None:
    try:
        with common.Signals():
            stop.touch()
            process.wait(timeout=grace_s)
    except (KeyboardInterrupt, subprocess.TimeoutExpired, OSError):
        return


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=40)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def _has_fileno() -> bool:
    try:
        sys.stderr.fileno()
    except (OSError, ValueError):
        return False
    return True
