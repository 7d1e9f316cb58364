"""What ends a run early: numbers that are not finite, a step that hangs, a request to stop. One message each, from one rank."""

from __future__ import annotations

import faulthandler
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from planner.errors import PlannerError, Problem
from planner.runtime import masters

if TYPE_CHECKING:
    from planner.runtime.train import Trainer

STOP_FILE = "stop"
"""In the run's folder: its presence asks the run to save and stop, like SIGTERM."""


class RunFailed(PlannerError):
    """The run cannot go on. Only a `loud` rank prints it: the one it happened on."""

    exit_code = 1

    def __init__(self, problem: Problem, loud: bool = True):
        super().__init__(problem)
        self.loud = loud


ASKED, SIGNALLED = 1, 2
"""How a run is asked to stop: by the stop file, by SIGTERM."""


class Stopped(Exception):
    """The run was asked to stop, and saved what it had.

    After SIGTERM the exit code is 143; torchrun counts that as a failure, and restarts the job if it was not what was
    signalled. After the stop file it is 0: whoever wrote it does not want a restart.
    """

    def __init__(self, message: str, how: int):
        super().__init__(message)
        self.exit_code = 128 + signal.SIGTERM if how == SIGNALLED else 0


def restarts() -> int:
    """How often torchrun has restarted this job."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


# ---- numbers -----------------------------------------------------------------------------------------------------


def check_loss(trainer: Trainer, step: int, loss: float) -> None:
    """Raise RunFailed when the loss (the same on every rank) is not finite: from the rank whose own loss is not.

    Collective only when there is something to say.
    """
    if math.isfinite(loss):
        return
    bad = next((i for i, v in enumerate(trainer.own_losses) if not math.isfinite(float(v))), None)
    found = _everyone(trainer, bad)
    rank = next((r for r, value in enumerate(found) if value is not None), 0)
    where = f"its micro-batch {found[rank]} is the first with such a loss" if found[rank] is not None else ""
    raise _not_finite(trainer, rank, f"step {step}: the loss is {loss}, on rank {rank}", where)


def check_norm(trainer: Trainer, step: int, norm: float) -> None:
    """Raise RunFailed when the gradient norm (the same on every rank) is not finite, from the rank that holds the first
    gradient, in the model's order, that is not. Collective only when there is something to say."""
    if math.isfinite(norm):
        return
    named = trainer.named_parameters()
    bad = next((name for name, p in named if (slope := masters.gradient(p)) is not None and not _finite(slope)), None)
    found = _everyone(trainer, bad)
    rank = next((r for r, name in enumerate(found) if name is not None), 0)
    where = f"{found[rank]} is the first such gradient" if found[rank] else "each gradient is finite, their squares overflow"
    raise _not_finite(trainer, rank, f"step {step}: the gradient norm is {norm}, on rank {rank}", where)


def _everyone(trainer: Trainer, value: Any) -> list[Any]:
    found: list[Any] = [None] * trainer.world.size
    dist.all_gather_object(found, value)
    return found


def _not_finite(trainer: Trainer, rank: int, what: str, why: str) -> RunFailed:
    fix = "look at that batch, lower --lr or --max-norm, warm up longer; this step changed no weight and no checkpoint"
    return RunFailed(Problem("PLN615", what, why, fix), loud=trainer.world.rank == rank)


def _finite(value: Tensor) -> bool:
    local = value.to_local() if isinstance(value, DTensor) else value
    return bool(torch.isfinite(local).all())


# ---- requests to stop --------------------------------------------------------------------------------------------


class StopRequest:
    """Whether SIGTERM came, or the stop file is there (which rank 0 looks for)."""

    def __init__(self, folder: Path, rank: int):
        self.signalled, self.file = False, folder / STOP_FILE if rank == 0 else None
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def __enter__(self) -> StopRequest:
        self._before = signal.signal(signal.SIGTERM, self._received)
        return self

    def _received(self, number: int, frame: object) -> None:
        self.signalled = True

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def how(self) -> int:
        """`SIGNALLED`, `ASKED`, or 0."""
        if self.signalled:
            return SIGNALLED
        return ASKED if self.file is not None and self.file.exists() else 0


# ---- hangs -------------------------------------------------------------------------------------------------------

PHASES = ("data", "forward and backward", "update", "checkpoint", "evaluation")
SETTLE_S = 2.0
"""After its own time-out a rank waits so long for the others' reports, to see who is behind."""


class Watchdog:
    """Ends this process when a step takes longer than `timeout_s` seconds (0: never).

    Stacks of all threads go to `rank-N.stacks.txt` in `folder`, and each rank's place in the step to `rank-N.hang.json`;
    the rank that is furthest behind, or that says nothing, is the one that hangs. A second timer inside Python's C
    code ends the process even when no Python runs any more.
    """

    exit_code = 124

    def __init__(self, folder: Path, rank: int, size: int, timeout_s: float):
        self.folder, self.rank, self.size, self.timeout_s = folder, rank, size, timeout_s
        self._where, self._since, self._deadline = (0, 0), time.monotonic(), math.inf
        self._stacks = (folder / f"rank-{rank}.stacks.txt").open("w", encoding="utf-8") if timeout_s else None
        self._report = folder / f"rank-{rank}.hang.json"
        self._report.unlink(missing_ok=True)
        self._end = threading.Event()
        if timeout_s:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around one step, with what belongs to it."""
        self.enter(step, 0)
        if self._stacks is not None:
            self._deadline = time.monotonic() + self.timeout_s
            faulthandler.dump_traceback_later(self.timeout_s + 5 * SETTLE_S, exit=True, file=self._stacks)
        try:
            yield
        finally:
            self._deadline = math.inf
            if self._stacks is not None:
                faulthandler.cancel_dump_traceback_later()

    def enter(self, step: int, phase: int) -> None:
        """Say where this rank is: an index of `PHASES`."""
        self._where, self._since = (step, phase), time.monotonic()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        if self._stacks is not None:
            self._stacks.close()
            if error is None:
                (self.folder / f"rank-{self.rank}.stacks.txt").unlink(missing_ok=True)

    def _watch(self) -> None:
        while not self._end.wait(min(1.0, self.timeout_s / 4)):
            if time.monotonic() > self._deadline:
                self._give_up()

    def _give_up(self) -> None:
        """Report, find out who is behind, say so from one rank, and leave without cleaning up: peers do not answer."""
        waited = time.monotonic() - self._since
        self._report.write_text(json.dumps({"where": self._where, "seconds": waited}), encoding="utf-8")
        assert self._stacks is not None
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        self._stacks.flush()
        time.sleep(SETTLE_S)
        reports = {r: _read(self.folder / f"rank-{r}.hang.json") for r in range(self.size)}
        message, speaker = verdict(reports, self.timeout_s, self.folder)
        if speaker == self.rank:
            print(message, file=sys.stderr, flush=True)
        time.sleep(SETTLE_S / 2)  # torchrun ends the others when the first leaves: let the speaker speak
        os._exit(self.exit_code)


def verdict(reports: dict[int, dict[str, Any] | None], timeout_s: float, folder: Path) -> tuple[str, int]:
    """(message, the rank that prints it) from each rank's report, None for a rank that made none."""
    silent = [r for r, report in reports.items() if report is None]
    known = {r: tuple(report["where"]) for r, report in reports.items() if report is not None}
    step, phase = min(known.values())
    behind = [r for r, where in known.items() if where == (step, phase)]
    if silent:
        who, speaker = f"rank {', '.join(map(str, silent))} does not answer at all", min(known)
    elif len(behind) < len(known):
        names = ", ".join(map(str, behind))
        who, speaker = f"rank {names} is in {PHASES[phase]}, the others wait further on", behind[0]
    else:
        who, speaker = f"all ranks are in {PHASES[phase]}", behind[0]
    what = f"step {step} has taken more than {timeout_s:g} s"
    fix = "raise --step-timeout if steps may take so long; restarts go on from the last checkpoint"
    return str(Problem("PLN616", what, f"{who}; stacks are in {folder}/rank-*.stacks.txt", fix)), speaker


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
