"""Each fault ends as it should: the job restarts from the last checkpoint with the losses of the run that nothing
happened to, or stops with one clear message."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import plans
import pytest
from launching import HERE, free_port, launch

from planner import planfile

PLAN = plans.plan(dp=2, zero=3)
STEPS = 8
EVERY = 3


def write_tokens(path: Path) -> None:
    """Tokens that all lie in the vocabulary of 64."""
    np.random.default_rng(5).integers(0, 64, 16 * 200 + 1).astype(np.uint16).tofile(path)


class Job:
    """A folder with a plan and data, and torchrun over it."""

    def __init__(self, folder: Path, plan: planfile.Plan = PLAN):
        self.folder, self.out, self.plan = folder, folder / "run", plan
        self.data = folder / "tokens.bin"
        planfile.write(plan, folder / "plan.json")
        if not self.data.exists():
            write_tokens(self.data)

    def run(self, *flags: str, fault: tuple[str, int, int] | None = None, restarts: int = 3) -> Any:
        """The finished torchrun of the plan."""
        command = ["-m", "torch.distributed.run", "--nproc-per-node", str(self.plan.layout.world_size)]
        command += ["--max-restarts", str(restarts), "--monitor-interval", "0.2", "--master-port", str(free_port())]
        command += ["-m", "planner.runtime.train"] if fault is None else [str(HERE / "faulty.py"), *map(str, fault)]
        command += [str(self.folder / "plan.json"), "--steps", str(STEPS), "--out", str(self.out), "--lr", "0.01"]
        command += ["--data", str(self.data), "--save-every", str(EVERY), *flags]
        return launch(command, 800)

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]

    def losses(self) -> list[float]:
        lines = self.metrics()
        assert [line["step"] for line in lines] == list(range(STEPS))
        assert [line["samples"] for line in lines] == [8 * (i + 1) for i in range(STEPS)]
        return [line["loss"] for line in lines]

    def checkpoints(self) -> list[str]:
        return sorted(p.name for p in (self.out / "checkpoints").iterdir())

    def log(self, rank: int) -> str:
        return (self.out / "logs" / f"rank-{rank}.log").read_text()


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the run that nothing happens to."""
    job = Job(tmp_path_factory.mktemp("whole"))
    done = job.run()
    assert done.returncode == 0, done.stderr[-3000:]
    assert job.checkpoints() == ["latest", "step-00000003", "step-00000006", "step-00000008"]
    return job.losses()


def said(text: str, code: str) -> int:
    return len(re.findall(rf"^{code} ", text, flags=re.MULTILINE))


@pytest.mark.timeout(900)
def test_killed_rank_restarts_from_the_last_checkpoint(tmp_path: Path, wanted: list[float]) -> None:
    job = Job(tmp_path)
    done = job.run(fault=("kill", 1, 5))
    assert done.returncode == 0, done.stderr[-3000:]
    assert job.losses() == wanted
    assert "resumed from" in done.stderr
    assert "restart 1" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_save_leaves_the_last_good_one(tmp_path: Path, wanted: list[float]) -> None:
    job = Job(tmp_path)
    done = job.run(fault=("kill-save", 1, 6))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step-00000003: 3 steps" in done.stderr
    assert job.losses() == wanted
    assert job.checkpoints() == ["latest", "step-00000003", "step-00000006", "step-00000008"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sigterm_saves_within_the_grace_period(tmp_path: Path, wanted: list[float]) -> None:
    job = Job(tmp_path)
    done = job.run(fault=("term", 1, 4), restarts=0)
    assert done.returncode != 0
    assert "asked to stop: 5 of 8 steps done" in done.stderr
    assert "step-00000005" in job.checkpoints()
    assert "exitcode  : 143" in done.stderr
    done = job.run()
    assert done.returncode == 0, done.stderr[-3000:]
    assert job.losses() == wanted


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("fault", ["hang", "freeze"])
def test_hung_rank_is_named_and_the_job_restarts(tmp_path: Path, wanted: list[float], fault: str) -> None:
    job = Job(tmp_path)
    done = job.run("--step-timeout", "20", fault=(fault, 1, 4))
    assert done.returncode == 0, done.stderr[-3000:]
    assert said(done.stderr, "PLN616") == 1
    assert ("rank 1 is in data" if fault == "hang" else "rank 1 does not answer at all") in done.stderr
    assert job.losses() == wanted


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nan_stops_with_its_place_and_touches_no_checkpoint(tmp_path: Path) -> None:
    job = Job(tmp_path)
    done = job.run(fault=("nan", 1, 4), restarts=0)
    assert done.returncode != 0
    assert said(done.stderr, "PLN615") == 1
    assert "step 4: the loss is nan, on rank" in done.stderr
    assert job.checkpoints() == ["latest", "step-00000003"]
    assert len(job.metrics()) == 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_full_disk_is_one_message_and_the_last_good_checkpoint_stays(tmp_path: Path, wanted: list[float]) -> None:
    job = Job(tmp_path)
    done = job.run(fault=("full", 1, 6), restarts=0)
    assert done.returncode != 0
    assert said(done.stderr, "PLN610") == 1
    assert "PLN610 rank 1 could not save" in done.stderr
    assert "No space left on device; the last good checkpoint is step-00000003" in done.stderr
    done = job.run()
    assert done.returncode == 0, done.stderr[-3000:]
    assert job.losses() == wanted


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_truncated_checkpoint_falls_back_and_changed_data_is_refused(tmp_path: Path, wanted: list[float]) -> None:
    job = Job(tmp_path)
    assert job.run().returncode == 0
    newest = job.out / "checkpoints" / "step-00000008" / "state"
    file = max(newest.iterdir(), key=lambda p: p.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)
    done = job.run()
    assert done.returncode == 0, done.stderr[-3000:]
    assert said(done.stderr, "PLN611") == 1
    assert "step-00000006: 6 steps" in done.stderr
    assert job.losses() == wanted

    tokens = np.fromfile(job.data, np.uint16)
    tokens[100] += 1
    tokens.tofile(job.data)
    done = job.run(restarts=0)
    assert done.returncode != 0
    assert said(done.stderr, "PLN614") == 1
    job.data.unlink()
    done = job.run(restarts=0)
    assert done.returncode != 0
    assert said(done.stderr, "PLN593") == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_stop_file_saves_and_another_plan_goes_on(tmp_path: Path, wanted: list[float]) -> None:
    job = Job(tmp_path)
    stopped = job.run(fault=("stop", 1, 2))
    assert (stopped.returncode, "asked to stop: 3 of 8 steps done" in stopped.stderr) == (0, True)
    assert not (job.out / "summary.json").exists()
    other = Job(tmp_path, plans.plan())
    wrong = launch(
        ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m",
         "planner.runtime.train", str(tmp_path / "plan.json"), "--out", str(job.out)], 120,
    )  # fmt: skip
    assert said(wrong.stderr, "PLN590") == 1
    done = other.run()
    assert done.returncode == 0, done.stderr[-3000:]
    assert other.losses() == pytest.approx(wanted, rel=2e-6)
