"""Fixtures: the one-process gradients, jobs that run many plans at once, and a process group of this process alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cases
import plans
import pytest

pytest.importorskip("torch")

import torch
import worker
import worlds

from planner.runtime.mesh import start_processes


class Jobs:
    """Results of each job of N processes, started when first asked for."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.results: dict[tuple[int, tuple[str, ...]], dict[str, Any]] = {}

    def reference(self, model: str) -> Path:
        """The file with a model's loss and gradients in one process."""
        path = self.directory / f"{model}.pt"
        if not path.exists():
            worlds.run(1, worker.write_references, self.directory, list(cases.MODELS))
        return path

    def get(self, processes: int, name: str) -> list[dict[str, Any]]:
        """What each rank found for a case."""
        job = processes, cases.job_of(processes, name)
        if job not in self.results:
            self.reference(cases.case(processes, name)[0])
            self.results[job] = worlds.run(processes, worker.compare_all, processes, job[1], self.directory)
        ranks: list[dict[str, Any]] = self.results[job][name]
        return ranks


@pytest.fixture(scope="session")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Access to the jobs' results."""
    return Jobs(tmp_path_factory.mktemp("runtime"))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process group of this process only, one a test run."""
    if not torch.distributed.is_initialized():
        monkeypatch.setenv("MASTER_PORT", str(29000 + os.getpid() % 900))
    start_processes(plans.plan())
