"""`--profile`: a trace of a few settled steps of each rank, for Perfetto or chrome://tracing."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WAIT, WARM, ACTIVE = 3, 1, 3
"""Steps before, for the profiler's own start, and in the trace. The first steps of a process are not like the others."""


class Profile:
    """Context around the loop; writes `rank-N.json` once `WAIT + WARM + ACTIVE` steps are done."""

    def __init__(self, folder: Path, rank: int, wanted: bool):
        self.folder, self.rank = folder, rank
        self.profiler: Any = None
        self.done = 0
        if wanted:
            activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
            self.profiler = profile(
                activities=activities,
                schedule=schedule(wait=WAIT, warmup=WARM, active=ACTIVE, repeat=1),
                on_trace_ready=self._write,
                record_shapes=True,
            )

    def _write(self, profiler: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / f"rank-{self.rank}.json"))

    @property
    def slows(self) -> bool:
        """Whether the profiler is at work in the present step."""
        return self.profiler is not None and WAIT <= self.done < WAIT + WARM + ACTIVE

    def step(self) -> None:
        """A step is done."""
        self.done += 1
        if self.profiler is not None:
            self.profiler.step()

    def __enter__(self) -> Profile:
        if self.profiler is not None:
            self.profiler.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.profiler is not None:
            self.profiler.stop()
