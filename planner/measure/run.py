"""Start one measuring process a device, follow the first one's progress, and gather what they wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from planner.errors import MissingPartError, PlannerError, Problem, input_error
from planner.measure import records
from planner.measure.records import Measurements

Progress = Callable[[float, str], None]
BUDGETS = {"cuda": 85.0, "cpu": 25.0}
"""Seconds of measuring beside starting up: under three minutes on two GPUs, under one on CPUs."""


def machine(kind: str, devices: int | None) -> tuple[str, int]:
    """(cuda or cpu, processes) to measure. Raises MissingPartError without torch, InputError for what is not here."""
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        problem = Problem("PLN640", "torch is not installed", "it runs the benchmarks", "pip install 'planner[runtime]'")
        raise MissingPartError(problem)
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and not count:
        raise input_error("PLN641", "--device cuda: this machine has no GPU", "torch sees none", "leave it out for the CPU")
    if kind == "cpu" or not count:
        cores = os.cpu_count() or 1
        wanted = devices or max(2, min(4, cores))
        if not 2 <= wanted <= 64:
            raise input_error("PLN641", f"--devices {wanted}: CPU processes are 2 to 64", "gloo joins several", "--devices 2")
        return "cpu", wanted
    if devices is not None and not 1 <= devices <= count:
        raise input_error("PLN641", f"--devices {devices}: this machine has {count}", "", f"give 1 to {count}")
    return "cuda", devices or count


def described(kind: str, devices: int) -> Measurements:
    """This machine without any row: enough to know what its profile would be completed from."""
    from planner.measure.worker import environment

    return Measurements(environment(kind, devices))


def measured(kind: str, devices: int, budget: float, progress: Progress) -> Measurements:
    """Measure this machine. Raises PlannerError (PLN643) when a process fails."""
    with tempfile.TemporaryDirectory(prefix="planner-measure-") as name:
        folder = Path(name)
        processes = [_start(kind, devices, rank, budget, folder) for rank in range(devices)]
        try:
            reader = threading.Thread(target=_follow, args=(processes[0].stdout, progress), daemon=True)
            reader.start()
            _finish(processes, folder)
            reader.join(timeout=10)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
        return records.merged([records.read(folder / f"rank{rank}") for rank in range(devices)])


def _start(kind: str, world: int, rank: int, budget: float, folder: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "planner.measure.worker", kind, str(budget), str(folder)]
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    if kind == "cpu":
        environment["OMP_NUM_THREADS"] = "1"
    with (folder / f"error{rank}").open("w", encoding="utf-8") as errors:
        return subprocess.Popen(
            words, env=environment, text=True, stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL, stderr=errors
        )


def _follow(lines: IO[str] | None, progress: Progress) -> None:
    """Hand on the first rank's progress until it ends; other output is not for anyone."""
    for line in lines or ():
        try:
            message = json.loads(line)
            progress(float(message["done"]), str(message["what"]))
        except (ValueError, KeyError, TypeError):
            continue
    progress(1.0, "fitting")


def _finish(processes: list[subprocess.Popen[str]], folder: Path) -> None:
    """Wait for all ranks, until one fails: the others would wait for it in vain."""
    while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
        time.sleep(0.1)
    failed = [rank for rank, p in enumerate(processes) if p.poll()]
    if not failed:
        return
    told = {rank: (folder / f"error{rank}").read_text(encoding="utf-8", errors="replace").split("\n") for rank in failed}
    last = next((line.strip() for rank in failed for line in reversed(told[rank]) if line.strip()), "no message")
    what = f"the measuring process of device {failed[0]} failed"
    raise MeasureError(Problem("PLN643", what, last[:300], "make sure that nothing else uses the devices, then try again"))


class MeasureError(PlannerError):
    """A benchmark failed on this machine."""

    exit_code = 1
