"""Fit the constants of all shipped profiles to a table of runs at once: `python -m planner.validation.shipped RUNS.csv`.

A random-effects model. The constant k of engine e on profile p, in logarithms (`scale` as it is), is

    prior_k + all_k + device_{d(p), k} + engine_{e, k} + own_{p e, k}

each effect with a normal prior around 0 whose width says how much such effects differ (`WIDTHS`). Everything is found at
once by least squares with a robust loss (scipy), the maximum of the posterior. A class without runs gets the effects of
its device and its engine: that is what a new cluster is predicted with, and what leaving a source out measures.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np

from planner.cost.task import Floats
from planner.validation.constants import PRIOR, TIME_CONSTANTS, TimedRuns, timed, to_values
from planner.validation.predict import Batch, Table, load_table
from planner.validation.profilemap import load_map

WIDTHS: dict[str, dict[str, float]] = {
    "compute": {"all": 0.10, "device": 0.12, "engine": 0.10, "own": 0.06},
    "elementwise": {"all": 0.20, "device": 0.10, "engine": 0.25, "own": 0.30},
    "host": {"all": 0.30, "device": 0.05, "engine": 0.50, "own": 0.40},
    "tp": {"all": 0.15, "device": 0.20, "engine": 0.20, "own": 0.25},
    "dp": {"all": 0.25, "device": 0.05, "engine": 0.25, "own": 0.50},
    "pp": {"all": 0.30, "device": 0.05, "engine": 0.40, "own": 0.60},
    "ep": {"all": 0.25, "device": 0.30, "engine": 0.15, "own": 0.35},
    "scale": {"all": 0.005, "device": 0.001, "engine": 0.002, "own": 0.006},
    "narrow": {"all": 0.08, "device": 0.05, "engine": 0.05, "own": 0.03},
}
"""Standard deviations of the effects."""
NOISE = 0.05
"""Standard deviation of a run's logarithmic time around a good model."""
ROBUST = 1.5
"""Residuals beyond this many standard deviations count less (soft L1)."""
ROWS_A_SOURCE = 150
"""Rows of one source that are used, evenly spread."""
WEIGHT_A_SOURCE = 40.0
"""Most that one source weighs, in rows."""

Effect = tuple[str, str, int]
"""(level, name, constant)."""


@dataclass(frozen=True)
class Class:
    """One engine on one profile: what has constants of its own."""

    profile: str
    engine: str
    device: str
    runs: TimedRuns

    @property
    def name(self) -> str:
        """Short."""
        return f"{self.profile}/{self.engine}"

    def effects(self, constant: int) -> tuple[Effect, ...]:
        """The effects whose sum is one of its constants."""
        return effects_of(self.profile, self.engine, self.device, constant)


def effects_of(profile: str, engine: str, device: str, constant: int) -> tuple[Effect, ...]:
    """The effects of a constant of an engine on a profile."""
    return (
        ("all", "", constant), ("device", device, constant), ("engine", engine, constant),
        ("own", f"{profile}/{engine}", constant),
    )  # fmt: skip


def classes_of(table: Table, without: str | None = None) -> list[Class]:
    """The classes of a table, each with at most `ROWS_A_SOURCE` rows of a source, one source left out if asked."""
    rows: dict[str, list[str]] = defaultdict(list)
    for batch in table.batches:
        for e in batch.entries:
            if e.outcome == "ran" and e.measured_time and not e.excluded:
                rows[e.row.get("source", "")].append(str(e.line))
    keep: list[str] = []
    for source, lines in rows.items():
        if source != without:
            keep += [lines[i] for i in np.unique(np.linspace(0, len(lines) - 1, ROWS_A_SOURCE).round().astype(int))]
    groups: dict[tuple[str, str], list[Batch]] = defaultdict(list)
    for batch in table.batches:
        groups[(batch.entries[0].profile, batch.entries[0].engine.partition("+")[0])].append(batch)
    result = []
    for (profile, engine), batches in sorted(groups.items()):
        runs = timed(batches, keep)
        if runs is not None:
            result.append(Class(profile, engine, batches[0].task.hardware.device.name, runs))
    return result


@dataclass(frozen=True)
class Fit:
    """Effects that were found."""

    effects: dict[Effect, float]

    def vector(self, profile: str, engine: str, device: str) -> Floats:
        """Constants of an engine on a profile, known or not."""
        return np.array([
            PRIOR[k] + sum(self.effects.get(e, 0.0) for e in effects_of(profile, engine, device, k))
            for k in range(len(TIME_CONSTANTS))
        ])  # fmt: skip

    def values(self, profile: str, engine: str, device: str) -> dict[str, float]:
        """The same as constants."""
        return to_values(self.vector(profile, engine, device))


_CLASSES: list[Class] = []


def _evaluate(job: tuple[int, Floats, bool]) -> tuple[Floats, Floats | None]:
    index, vector, derivatives = job
    runs = _CLASSES[index].runs
    errors = runs.log_errors(vector)
    return errors, runs.jacobian(vector, errors) if derivatives else None


def fit(classes: list[Class], workers: int = 2, sweeps: int = 12, start: Fit | None = None) -> Fit:
    """Find all effects: scipy's least squares over analytic sums and finite differences of the cost model."""
    from scipy.optimize import least_squares

    names: list[Effect] = sorted({e for c in classes for k in range(len(TIME_CONSTANTS)) for e in c.effects(k)})
    index = {e: i for i, e in enumerate(names)}
    width = np.array([WIDTHS[TIME_CONSTANTS[k]][level] for level, _, k in names])
    counts: dict[str, int] = defaultdict(int)
    for c in classes:
        for s in c.runs.sources:
            counts[s] += 1
    weights = [np.array([np.sqrt(min(1.0, WEIGHT_A_SOURCE / counts[s])) for s in c.runs.sources]) / NOISE for c in classes]
    maps = []
    for c in classes:
        m = np.zeros((len(TIME_CONSTANTS), len(names)))
        for k in range(len(TIME_CONSTANTS)):
            for e in c.effects(k):
                m[k, index[e]] += width[index[e]]
        maps.append(m)
    global _CLASSES
    _CLASSES = classes
    context = get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        def evaluate(x: Floats, derivatives: bool) -> list[tuple[Floats, Floats | None]]:
            jobs = [(i, PRIOR + m @ x, derivatives) for i, m in enumerate(maps)]
            return list(pool.map(_evaluate, jobs))

        def robust(r: Floats) -> tuple[Floats, Floats]:
            """Residuals whose squares are the soft-L1 loss, and their derivative: priors stay quadratic."""
            z = (r / ROBUST) ** 2
            value = np.sqrt(np.maximum(2.0 * (np.sqrt(1.0 + z) - 1.0), 0.0)) * ROBUST
            slope = np.where(np.abs(r) < 1e-9, 1.0, r / np.sqrt(1.0 + z) / np.where(value == 0, 1.0, value))
            return np.sign(r) * value, np.abs(slope)

        def residuals(x: Floats) -> Floats:
            parts = [robust(e * w)[0] for (e, _), w in zip(evaluate(x, False), weights, strict=True)]
            return np.concatenate([*parts, x])

        def jacobian(x: Floats) -> Floats:
            parts = []
            for (e, j), w, m in zip(evaluate(x, True), weights, maps, strict=True):
                assert j is not None
                parts.append((robust(e * w)[1] * w)[:, None] * (j @ m))
            return np.concatenate([*parts, np.eye(len(x))])

        initial = np.array([start.effects.get(e, 0.0) for e in names]) / width if start else np.zeros(len(names))
        found = least_squares(residuals, initial, jac=jacobian, method="trf", max_nfev=sweeps, xtol=1e-3, ftol=1e-3)
    return Fit({e: float(v) for e, v in zip(names, found.x * width, strict=True)})
