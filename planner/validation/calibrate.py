"""Fit a profile's few constants to a user's runs: maximum of the posterior, prior and bounds of each constant given.

The unknowns are logarithms of factors (`scale` as it is). Least squares (scipy, robust soft-L1 loss) over
log(predicted / measured) / noise and (constant - prior) / spread: what the runs cannot tell stays at its prior, so that one
run is enough to help and many cannot fit nonsense.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from planner.cost.task import Floats
from planner.engines.registry import engine_named
from planner.errors import input_error
from planner.specs.calibration import CONSTANTS, Calibration
from planner.units import GIB
from planner.validation.constants import SPREAD, TIME_CONSTANTS, TimedRuns, moves, soft, timed, to_values, to_vector
from planner.validation.predict import Batch, Entry, Table, figures, load_table
from planner.validation.profilemap import load_map

NOISE = 0.04
"""Standard deviation of a run's logarithmic time around a good model."""
SICK = 2.0
"""A run this many times off the others' common factor says nothing about the machine: refused."""
MEMORY_NOISE = 0.03


@dataclass(frozen=True)
class Moved:
    """One constant after a fit."""

    name: str
    before: float
    after: float
    weight: float
    """Share of its prior's variance that the runs removed: 0 when they say nothing about it."""


@dataclass(frozen=True)
class EngineFit:
    """What was found for one engine."""

    engine: str
    rows: int
    before: Floats
    """Signed relative errors of the used rows."""
    after: Floats
    left_out: Floats
    """Signed relative error of each row when fitted without it."""
    constants: tuple[Moved, ...]
    memory: tuple[Moved, ...]
    memory_rows: int
    memory_before: Floats
    memory_after: Floats
    refused: tuple[str, ...]
    """Rows that were refused, by name."""


def residual(errors: Floats) -> float | None:
    """80th percentile of absolute errors, at least 1 %; None below five."""
    return None if len(errors) < 5 else max(0.01, float(np.percentile(np.abs(errors), 80)))


def calibrate(path: str, profile: str, profile_map: str | None = None, engine: str | None = None) -> list[EngineFit]:
    """Fit the constants of `profile` to the runs of `path`, engine by engine. Raises InputError."""
    if engine is not None:
        engine_named(engine)
    table = load_table(path, load_map(profile_map), profile=profile)
    groups: dict[str, list[Batch]] = defaultdict(list)
    for batch in table.batches:
        name = batch.entries[0].base_engine
        if engine in (None, name):
            groups[name].append(batch)
    fits = [fit for name, batches in sorted(groups.items()) if (fit := fit_engine(name, batches)) is not None]
    if not fits:
        present = sorted({b.entries[0].base_engine for b in table.batches})
        why = f"its usable runs are of {', '.join(present)}" if present and engine else _reasons(table)
        raise input_error("PLN143", f"no run of {path} can calibrate {profile}", why, "see the README for columns")
    return fits


def _reasons(table: Table) -> str:
    return "; ".join(f"{why}: {n}" for why, n in table.skipped.most_common(5)) or "it holds no usable time or memory"


def fit_engine(engine: str, batches: list[Batch]) -> EngineFit | None:
    """The constants of one engine; None when no row is usable."""
    prior = batches[0].task.calibration
    memory_entries = [
        (b, e) for b in batches for e in b.entries if e.outcome == "ran" and e.measured_memory and not e.memory_excluded
    ]
    runs = timed(batches)
    if runs is None and not memory_entries:
        return None
    start = to_vector({n: prior.value(n) for n in TIME_CONSTANTS})
    empty = np.zeros(0)
    moved: tuple[Moved, ...] = ()
    before = after = left_out = empty
    refused: tuple[str, ...] = ()
    count = 0
    if runs is not None:
        runs, refused = without_sick(runs, start)
        first = runs.log_errors(start)
        vector, weights = posterior(runs, start)
        before, after = np.expm1(first), np.expm1(runs.log_errors(vector))
        left_out = _left_out(runs, start)
        count = len(first)
        values, old = to_values(vector), to_values(start)
        moved = tuple(Moved(n, old[n], values[n], float(w)) for n, w in zip(TIME_CONSTANTS, weights, strict=True))
    memory, memory_before, memory_after = _fit_memory(prior, memory_entries)
    return EngineFit(
        engine, count, before, after, left_out, moved, memory, len(memory_entries), memory_before, memory_after, refused
    )  # fmt: skip


def without_sick(runs: TimedRuns, start: Floats) -> tuple[TimedRuns, tuple[str, ...]]:
    """The runs without those more than `SICK` times off their common factor, and the names of these."""
    errors = runs.log_errors(start)
    off = np.abs(errors - np.median(errors)) > np.log(SICK)
    if not off.any() or len(errors) < 3:
        return runs, ()
    names = tuple(name for name, bad in zip(runs.ids, off, strict=True) if bad)
    kept = timed(runs.batches, [name for name, bad in zip(runs.ids, off, strict=True) if not bad])
    assert kept is not None
    return kept, names


def posterior(runs: TimedRuns, start: Floats) -> tuple[Floats, Floats]:
    """(constants, share of prior variance removed): the maximum of the posterior around the priors `start`."""
    from scipy.optimize import least_squares

    free = [i for i, name in enumerate(TIME_CONSTANTS) if any(name in moves(b) for b in runs.batches)]

    def expand(x: Floats) -> Floats:
        vector = start.copy()
        vector[free] += x * SPREAD[free]
        return vector

    def residuals(x: Floats) -> Floats:
        return np.concatenate([soft(runs.log_errors(expand(x)) / NOISE)[0], x])

    def jacobian(x: Floats) -> Floats:
        vector = expand(x)
        errors = runs.log_errors(vector)
        slope = soft(errors / NOISE)[1] / NOISE
        return np.concatenate([slope[:, None] * runs.jacobian(vector, errors, free)[:, free] * SPREAD[free], np.eye(len(free))])

    found = least_squares(residuals, np.zeros(len(free)), jac=jacobian, max_nfev=12, xtol=1e-4, ftol=1e-4)
    weights = np.zeros(len(TIME_CONSTANTS))
    weights[free] = 1.0 - np.diag(np.linalg.inv(found.jac.T @ found.jac))
    return expand(found.x), np.clip(weights, 0.0, 1.0)


def _left_out(runs: TimedRuns, start: Floats) -> Floats:
    """Signed relative error of each row when fitted without it; ten groups when there are more than ten rows."""
    n = len(runs.measured)
    if n < 2:
        return np.zeros(0)
    result = np.zeros(n)
    place = {name: i for i, name in enumerate(runs.ids)}
    groups = min(n, 10)
    for k in range(groups):
        kept = timed(runs.batches, [name for i, name in enumerate(runs.ids) if i % groups != k])
        out = timed(runs.batches, [name for i, name in enumerate(runs.ids) if i % groups == k])
        assert kept is not None
        assert out is not None
        vector, _ = posterior(kept, start)
        result[[place[name] for name in out.ids]] = np.expm1(out.log_errors(vector))
    return result


def _fit_memory(prior: Calibration, entries: list[tuple[Batch, Entry]]) -> tuple[tuple[Moved, ...], Floats, Floats]:
    """`reserved` and `outside` from runs whose memory was measured beyond what tensors hold."""
    from scipy.optimize import least_squares

    names = ("reserved", "outside")
    old = np.array([prior.value(n) for n in names])
    rows = []
    for batch, entry in entries:
        f = figures(Batch(batch.task, [entry]))
        worst, first = (f.allocated, f.allocated_first) if entry.memory_kind == "allocated" else (f.held, f.held_first)
        allocated = float((first if entry.memory_rank == "first" else worst)[0]) / GIB
        own = batch.task.accounting.reserved_ratio
        outside = float(f.outside[0]) / GIB / old[1]
        rows.append((allocated, own, outside, entry.measured_memory or 0.0, entry.memory_kind))
    if not rows:
        return (), np.zeros(0), np.zeros(0)
    spread = np.array([CONSTANTS[n].spread for n in names])

    def errors(values: Floats) -> Floats:
        result = []
        for allocated, own, outside, measured, kind in rows:
            held = allocated * (own * values[0] if kind != "allocated" else 1.0)
            held += outside * values[1] if kind == "device" else 0.0
            result.append(np.log(held / measured))
        return np.array(result)

    def residuals(x: Floats) -> Floats:
        return np.concatenate([soft(errors(old * np.exp(x * spread)) / MEMORY_NOISE)[0], x])

    low = np.log(np.array([CONSTANTS[n].low for n in names]) / old) / spread
    high = np.log(np.array([CONSTANTS[n].high for n in names]) / old) / spread
    found = least_squares(residuals, np.zeros(2), bounds=(low - 1e-6, high + 1e-6))
    values = old * np.exp(found.x * spread)
    weights = np.clip(1.0 - np.diag(np.linalg.inv(found.jac.T @ found.jac)), 0.0, 1.0)
    moved = tuple(Moved(n, float(a), float(b), float(w)) for n, a, b, w in zip(names, old, values, weights, strict=True))
    return moved, np.expm1(errors(old)), np.expm1(errors(values))


def profile_document(profile: str, name: str, fits: list[EngineFit], source: str) -> dict[str, object]:
    """The calibrated profile as plain data: it extends the old one and holds the constants that moved."""
    engines: dict[str, object] = {}
    for fit in fits:
        moved = [m for m in (*fit.constants, *fit.memory) if m.weight >= 0.02]
        constants = {
            m.name: {
                "value": float(f"{m.after:.4g}"), "provenance": "fitted",
                "source": f"{fit.rows if m in fit.constants else fit.memory_rows} runs of {source}",
                "note": f"prior {m.before:.4g}, weight {m.weight:.2f}",
            }
            for m in moved
        }  # fmt: skip
        entry: dict[str, object] = {"constants": constants}
        for key, errors in (("time_error", fit.left_out), ("memory_error", fit.memory_after)):
            entry[key] = None  # an error recorded for other constants no longer holds
            if (value := residual(errors)) is not None:
                how = "left-out runs" if key == "time_error" else "runs"
                entry[key] = {
                    "value": float(f"{value:.3g}"), "provenance": "fitted", "source": f"80 % of {len(errors)} {how} of {source}"
                }  # fmt: skip
        engines[fit.engine] = entry
    return {"extends": profile, "name": name, "description": f"{profile}, calibrated on {source}", "engines": engines}
