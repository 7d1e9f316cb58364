"""How far a measurement may lie from a prediction: the interval around every figure that the cost model gives.

Where a profile was calibrated on an engine's runs it records the relative error that 80 % of them stay within; elsewhere
an assumed one stands in. Both are symmetric on a ratio scale: from value / (1 + r) to value * (1 + r).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from planner.cost.task import Task
from planner.specs.figures import Figure

DEFAULT_TIME_ERROR = 0.30
"""Of the step time without a calibration. Known devices and current stacks were met within 7 to 13 % on average; over 13
sources of published runs that nothing was fitted to, measured over predicted had a median of 1.21 and lay from 0.94 to 1.59
(5th to 95th percentile): most of those outside this interval are slower than its high end."""

DEFAULT_MEMORY_ERROR = 0.10
"""Of peak memory without a calibration. An engine whose gradient, logit and optimizer types are known is met within 1 to
5 %, one fitted roughly within 6 %; what stays unknown (allocator, communicators) adds up to 10 % (nvidia-smi: 15 %)."""


@dataclass(frozen=True)
class Spread:
    """A relative error r, and where it comes from."""

    relative: float
    provenance: Literal["fitted", "assumed"]
    """fitted: the residual of a calibration; assumed: none is recorded, or it was assumed itself."""
    source: str

    def around(self, value: float) -> tuple[float, float]:
        """(low, high): value / (1 + r) to value * (1 + r)."""
        return value / (1.0 + self.relative), value * (1.0 + self.relative)


def time_spread(task: Task) -> Spread:
    """Of the step time of this engine on this machine."""
    return _spread(task, task.calibration.time_error, DEFAULT_TIME_ERROR)


def memory_spread(task: Task) -> Spread:
    """Of the peak memory of this engine on this machine."""
    return _spread(task, task.calibration.memory_error, DEFAULT_MEMORY_ERROR)


def _spread(task: Task, recorded: Figure | None, default: float) -> Spread:
    if recorded is None:
        return Spread(default, "assumed", f"{task.hardware.name} has no calibration of engine {task.accounting.name}")
    return Spread(recorded.base, "assumed" if recorded.provenance == "assumed" else "fitted", recorded.source)
