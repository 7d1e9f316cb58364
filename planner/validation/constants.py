"""Step times of batches as functions of the fitted constants: what calibration minimises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from planner.cost import step
from planner.cost.task import Floats, Task
from planner.specs.calibration import CONSTANTS, Calibration
from planner.specs.figures import Number
from planner.validation.predict import Batch, priced

TIME_CONSTANTS = ("compute", "elementwise", "host", "tp", "dp", "pp", "ep", "scale", "narrow")
"""Constants that step times can tell, in the order of vectors."""


def to_vector(values: Mapping[str, float]) -> Floats:
    """Constants as unbounded numbers: logarithms of factors, `scale` as it is."""
    return np.array([values[n] if n == "scale" else np.log(values[n]) for n in TIME_CONSTANTS])


def to_values(vector: Floats) -> dict[str, float]:
    """The inverse of `to_vector`, held inside the constants' bounds."""
    values = {n: float(v if n == "scale" else np.exp(v)) for n, v in zip(TIME_CONSTANTS, vector, strict=True)}
    return {n: min(max(v, CONSTANTS[n].low), CONSTANTS[n].high) for n, v in values.items()}


PRIOR = to_vector({n: CONSTANTS[n].prior for n in TIME_CONSTANTS})
SPREAD = np.array([CONSTANTS[n].spread for n in TIME_CONSTANTS])


def with_constants(task: Task, values: Mapping[str, float]) -> Task:
    """The task on a machine whose engine has these constants."""
    figures = {n: Number(value=v, provenance="fitted", source="trial") for n, v in values.items()}
    kept = dict(task.calibration.constants)
    calibration = Calibration.model_construct(constants={**kept, **figures}, time_error=None, memory_error=None)
    return replace(task, hardware=task.hardware.model_copy(update={"engines": {task.accounting.name: calibration}}))


def step_seconds(batch: Batch, values: Mapping[str, float] | None = None) -> Floats:
    """Predicted step time of a batch's rows, with other constants than its profile's if given."""
    task = batch.task if values is None else with_constants(batch.task, values)
    _, p, blended = priced(batch, task)
    return step.step_cost(p, batch.layouts, batch.stages, blended).step / 1e9


def soft(r: Floats, width: float = 1.0) -> tuple[Floats, Floats]:
    """(values whose squares are the soft-L1 loss of `r`, their derivative); `width`: where it turns from square to linear.

    Kept apart from scipy's own loss, which would bend the priors too.
    """
    z = np.sqrt(1.0 + (r / width) ** 2)
    value = width * np.sqrt(np.maximum(2.0 * (z - 1.0), 0.0))
    slope = np.where(value < 1e-9, 1.0, np.abs(r) / z / np.maximum(value, 1e-12))
    return np.sign(r) * value, slope


def moves(batch: Batch) -> frozenset[str]:
    """Constants that can change the batch's step times at all."""
    x, task = batch.layouts, batch.task
    present = {"compute": True, "elementwise": True, "host": True, "tp": bool((x.tp > 1).any()), "pp": bool((x.pp > 1).any())}
    present["dp"] = bool((x.data > 1).any())
    present["ep"] = any(group.mlp.routed for group, _ in task.model.kinds) and bool(((x.ep > 1) | (x.etp > 1)).any())
    present["scale"] = task.gpus > task.hardware.node_size
    present["narrow"] = task.job.linears != "same"
    return frozenset(name for name, there in present.items() if there)


@dataclass(frozen=True)
class TimedRuns:
    """Batches of one engine on one machine, and what was measured."""

    batches: tuple[Batch, ...]
    measured: Floats
    sources: tuple[str, ...]
    ids: tuple[str, ...]

    def log_errors(self, vector: Floats) -> Floats:
        """log(predicted / measured) of every row at a vector of constants."""
        values = to_values(vector)
        predicted = np.concatenate([step_seconds(b, values) for b in self.batches])
        return np.asarray(np.log(predicted / self.measured))

    def jacobian(self, vector: Floats, at: Floats, free: Sequence[int] | None = None) -> Floats:
        """d log_errors / d vector by forward differences, shape (rows, constants); `at` are the errors at `vector`."""
        result = np.zeros((len(at), len(TIME_CONSTANTS)))
        start = 0
        for batch in self.batches:
            rows = slice(start, start + len(batch.entries))
            moving = moves(batch)
            for i in range(len(TIME_CONSTANTS)) if free is None else free:
                if TIME_CONSTANTS[i] in moving:
                    moved = vector.copy()
                    width = 0.002 if TIME_CONSTANTS[i] == "scale" else 0.02
                    moved[i] += width
                    errors = np.log(step_seconds(batch, to_values(moved)) / self.measured[rows])
                    result[rows, i] = (errors - at[rows]) / width
            start = rows.stop
        return result


def timed(batches: Sequence[Batch], keep: Sequence[str] | None = None) -> TimedRuns | None:
    """The rows of some batches that have a usable time; only those with an id in `keep` where it is given."""
    wanted = None if keep is None else set(keep)
    kept: list[Batch] = []
    for b in batches:
        entries = [e for e in b.entries if e.is_timed and (wanted is None or e.name in wanted)]
        if entries:
            kept.append(Batch(b.task, entries))
    if not kept:
        return None
    rows = [e for b in kept for e in b.entries]
    measured = np.array([e.measured_time for e in rows], dtype=float)
    return TimedRuns(tuple(kept), measured, tuple(e.source for e in rows), tuple(e.name for e in rows))
