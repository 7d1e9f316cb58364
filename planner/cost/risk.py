"""How likely a layout runs out of memory, given how full the model says the device gets.

P(out of memory) = 1 / (1 + exp(-(b0 + b1 (u - 1)))) with u = predicted allocated bytes over what the device offers.
Fitted to 502 labelled runs of LLaMA 13B and 30B on A100 80 GB (arXiv 2311.05610): one engine, one cluster. Slopes say how
well the engine's buffers are known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.cost.task import Floats, Task


@dataclass(frozen=True)
class RiskCurve:
    """b0 and b1 of the logistic."""

    b0: float
    b1: float
    meaning: str

    def probability(self, fill: Floats) -> Floats:
        """P(out of memory) at u = `fill`."""
        return np.asarray(1.0 / (1.0 + np.exp(-np.clip(self.b0 + self.b1 * (fill - 1.0), -60, 60))))

    def fill_at(self, probability: float) -> float:
        """u at which the probability is reached: the inverse."""
        return 1.0 + (float(np.log(probability / (1.0 - probability))) - self.b0) / self.b1


KNOWN = RiskCurve(2.01, 19.6, "the engine's main buffers are known")
CALIBRATED = RiskCurve(1.02, 27.0, "memory calibrated on this engine")
"""Fitted to the 502 labels with this package's own figures; half of the runs at u = 0.962 ran out."""

FITS_BELOW = 0.25
"""P(out of memory) below which a run is said to fit. What runs out costs more than what was refused, so not 0.5: at 0.25 the
allocated bytes are 0.92 of what the device offers, the limit that plans have by default, and of what is said to fit 2 % of
the labelled runs ran out, each predicted with a curve fitted to the other groups of model, devices and length."""


ENOUGH_LABELS = 50
"""Labelled runs that make an engine's memory calibrated."""


def risk_curve(task: Task) -> RiskCurve:
    """The curve for a task: calibrated where its profile carries memory constants of the engine."""
    constants = task.calibration.constants
    labelled = task.calibration.memory_labels >= ENOUGH_LABELS
    return CALIBRATED if labelled or "outside" in constants or "reserved" in constants else KNOWN


def allocated_limit(task: Task) -> int | None:
    """Bytes that the task's `max_oom_probability` lets a rank allocate; None without one."""
    if task.max_oom_probability is None:
        return None
    fill = risk_curve(task).fill_at(task.max_oom_probability)
    return max(0, int(fill * task.hardware.device.memory.base))


def out_of_memory_probability(task: Task, allocated: Floats) -> Floats:
    """P(out of memory) of layouts with `allocated` peak bytes on their worst rank."""
    return risk_curve(task).probability(np.asarray(allocated, float) / task.hardware.device.memory.base)
