"""Fixtures: the one-process gradients, and jobs that run many plans at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cases
import pytest
from launching import HERE, launch

pytest.importorskip("torch")


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with the one-process gradients of each model."""
    directory = tmp_path_factory.mktemp("runtime")
    done = launch([str(HERE / "worker.py"), "reference", str(directory)], 800)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


class Jobs:
    """Results of each job of N processes, started when first asked for."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.results: dict[tuple[int, bool], dict[str, Any]] = {}
        self.errors: dict[tuple[int, bool], str] = {}

    def get(self, processes: int, name: str) -> list[dict[str, Any]]:
        """What each rank found for a case."""
        job = processes, cases.is_slow(name)
        if job not in self.results:
            names = [other for other in cases.CASES[processes] if cases.is_slow(other) == job[1]]
            path = self.directory / f"results-{processes}.json"
            path.unlink(missing_ok=True)
            done = launch([str(HERE / "worker.py"), str(processes), str(self.directory), *names], 800)
            self.results[job] = json.loads(path.read_text()) if path.exists() else {}
            self.errors[job] = done.stderr[-3000:]
        assert name in self.results[job], self.errors[job]
        ranks: list[dict[str, Any]] = self.results[job][name]
        return ranks


@pytest.fixture(scope="session")
def jobs(references: Path) -> Jobs:
    """Access to the jobs' results."""
    return Jobs(references)
