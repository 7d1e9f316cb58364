"""One measured run beside what the cost model says of it: the unit that metrics, calibration and reports work on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal["ran", "oom", "failed"]
"""`failed`: it failed for an unknown or another reason, a weak label that memory metrics leave out."""
MemoryKind = Literal["allocated", "reserved", "device"]
"""What a measured figure is: the allocator's peak in use, what it held, or all that the driver counts."""


@dataclass(frozen=True)
class Prediction:
    """One row of a table of runs, measured and predicted. Times in seconds for one step, memory in GiB of the worst rank."""

    line: int
    """Line of the file, the header being 1."""
    row_id: str
    source: str
    hardware: str
    """Class of the device, such as H100-80."""
    engine: str
    """Engine accounting that predicted it, with its recipe."""
    profile: str
    model: str
    quality: str
    kind: str
    """row_kind: e2e, proxy_model, finetune, failed_oom, ..."""
    gpus: int
    seq_len: int
    global_batch: int
    precision: str
    layout: str
    """The layout in short, canonical words: equal for equal layouts."""
    outcome: Outcome
    measured_time: float | None
    predicted_time: float
    time_interval: tuple[float, float]
    """Low and high end of the predicted step time."""
    measured_memory: float | None
    predicted_memory: float
    """The figure comparable with the measured one (see `memory_kind`)."""
    memory_kind: MemoryKind
    fits: bool
    oom_probability: float
    excluded: str = ""
    """A written rule that keeps this row out of the time metrics ("tp over nodes on ..."), empty otherwise."""
    memory_excluded: str = ""
    """The same for the memory metrics."""
    terms: dict[str, float] = field(default_factory=dict)
    """Seconds of the predicted step by cause."""

    @property
    def time_error(self) -> float | None:
        """predicted / measured - 1."""
        return None if self.measured_time is None else self.predicted_time / self.measured_time - 1.0

    @property
    def memory_error(self) -> float | None:
        """predicted / measured - 1."""
        return None if self.measured_memory is None else self.predicted_memory / self.measured_memory - 1.0

    @property
    def sweep(self) -> tuple[str, str, str, int, int, int, str, str]:
        """Rows of one sweep differ in their layout only: not in engine or recipe either."""
        job = (self.gpus, self.seq_len, self.global_batch, self.precision)
        return (self.source, self.model, self.hardware, *job, self.engine)


@dataclass(frozen=True)
class Predicted:
    """All rows of a table."""

    rows: tuple[Prediction, ...]
    skipped: Counter[str]
    """Rows that could not be predicted, by reason."""
