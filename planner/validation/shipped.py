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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from planner.cost.task import Floats
from planner.specs import files
from planner.specs.calibration import without_recipe
from planner.validation.calibrate import posterior, residual, without_sick
from planner.validation.constants import PRIOR, TIME_CONSTANTS, TimedRuns, moves, soft, timed, to_values, with_constants
from planner.validation.predict import Batch, Table, load_table, predict_table
from planner.validation.prediction import Predicted, Prediction
from planner.validation.profilemap import load_map

WIDTHS: dict[str, dict[str, float]] = {
    "compute": {"all": 0.05, "device": 0.10, "engine": 0.08, "own": 0.06},
    "elementwise": {"all": 0.15, "device": 0.10, "engine": 0.15, "own": 0.25},
    "host": {"all": 0.30, "device": 0.05, "engine": 0.50, "own": 0.40},
    "tp": {"all": 0.15, "device": 0.15, "engine": 0.15, "own": 0.40},
    "dp": {"all": 0.20, "device": 0.05, "engine": 0.15, "own": 0.60},
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
FLOOR = 0.05
"""Intervals of fitted constants are not narrower: runs outside those that were fitted lie further off."""
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
            if e.is_timed:
                rows[e.source].append(e.name)
    keep: list[str] = []
    for source, lines in rows.items():
        if source != without:
            keep += [lines[i] for i in np.unique(np.linspace(0, len(lines) - 1, ROWS_A_SOURCE).round().astype(int))]
    groups: dict[tuple[str, str], list[Batch]] = defaultdict(list)
    for batch in table.batches:
        groups[(batch.entries[0].profile, batch.entries[0].base_engine)].append(batch)
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


def _widths(names: list[Effect]) -> Floats:
    return np.array([WIDTHS[TIME_CONSTANTS[k]][level] for level, _, k in names])


def _map(c: Class, index: dict[Effect, int], names: list[Effect]) -> Floats:
    """d constants / d scaled effects of a class, shape (constants, effects)."""
    width = _widths(names)
    m = np.zeros((len(TIME_CONSTANTS), len(names)))
    for k in range(len(TIME_CONSTANTS)):
        for e in c.effects(k):
            m[k, index[e]] += width[index[e]]
    return m


def _row_weights(sources: list[str]) -> Floats:
    """1 / noise of each row, less where its source has many."""
    counts: dict[str, int] = defaultdict(int)
    for s in sources:
        counts[s] += 1
    return np.array([np.sqrt(min(1.0, WEIGHT_A_SOURCE / counts[s])) for s in sources]) / NOISE


def fit(classes: list[Class], workers: int = 2, sweeps: int = 12) -> Fit:
    """Find all effects: scipy's least squares over analytic sums and finite differences of the cost model."""
    from scipy.optimize import least_squares

    names: list[Effect] = sorted({e for c in classes for k in range(len(TIME_CONSTANTS)) for e in c.effects(k)})
    index = {e: i for i, e in enumerate(names)}
    width = _widths(names)
    flat = _row_weights([s for c in classes for s in c.runs.sources])
    weights = np.split(flat, np.cumsum([len(c.runs.measured) for c in classes])[:-1])
    maps = [_map(c, index, names) for c in classes]
    global _CLASSES
    _CLASSES = classes
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:

        def evaluate(x: Floats, derivatives: bool) -> list[tuple[Floats, Floats | None]]:
            return list(pool.map(_evaluate, [(i, PRIOR + m @ x, derivatives) for i, m in enumerate(maps)]))

        def residuals(x: Floats) -> Floats:
            parts = [soft(e * w, ROBUST)[0] for (e, _), w in zip(evaluate(x, False), weights, strict=True)]
            return np.concatenate([*parts, x])

        def jacobian(x: Floats) -> Floats:
            parts = []
            for (e, j), w, m in zip(evaluate(x, True), weights, maps, strict=True):
                assert j is not None
                parts.append((soft(e * w, ROBUST)[1] * w)[:, None] * (j @ m))
            return np.concatenate([*parts, np.eye(len(x))])

        found = least_squares(
            residuals, np.zeros(len(names)), jac=jacobian, method="trf", max_nfev=sweeps, xtol=1e-3, ftol=1e-3
        )
    return Fit({e: float(v) for e, v in zip(names, found.x * width, strict=True)})


# ---- honest errors -------------------------------------------------------------------------------------------------


def predicted_with(table: Table, fit: Fit | None) -> Predicted:
    """The table predicted with fitted effects, or with every constant at its prior."""
    batches = []
    for b in table.batches:
        e = b.entries[0]
        vector = PRIOR if fit is None else fit.vector(e.profile, e.base_engine, b.task.hardware.device.name)
        batches.append(Batch(with_constants(b.task, to_values(vector)), b.entries))
    return predict_table(Table(tuple(batches), table.skipped))


@dataclass(frozen=True)
class Linearised:
    """Errors and derivatives of all classes at a fit: what leaving a source out is computed from."""

    fit: Fit
    names: list[Effect]
    errors: Floats
    slopes: Floats
    """d error / d scaled effect, shape (rows, effects)."""
    sources: list[str]

    def without(self, source: str) -> Fit:
        """The effects when a source is left out: Gauss-Newton steps from the common solution."""
        kept = np.array([s != source for s in self.sources])
        width = _widths(self.names)
        x0 = np.array([self.fit.effects[e] for e in self.names]) / width
        x = x0.copy()
        sources = [s for s, k in zip(self.sources, kept, strict=True) if k]
        w = _row_weights(sources)
        for _ in range(4):
            errors = (self.errors[kept] + self.slopes[kept] @ (x - x0)) * w
            values, slope = soft(errors, ROBUST)
            a = np.concatenate([(slope * w)[:, None] * self.slopes[kept], np.eye(len(x))])
            x = x + np.linalg.lstsq(a, -np.concatenate([values, x]), rcond=None)[0]
        return Fit({e: float(v) for e, v in zip(self.names, x * width, strict=True)})


def linearise(classes: list[Class], fit: Fit, workers: int = 2) -> Linearised:
    """Errors and derivatives at a fit."""
    names = sorted(fit.effects)
    index = {e: i for i, e in enumerate(names)}
    global _CLASSES
    _CLASSES = classes
    jobs = [(i, fit.vector(c.profile, c.engine, c.device), True) for i, c in enumerate(classes)]
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        done = list(pool.map(_evaluate, jobs))
    slopes = [j @ _map(c, index, names) for c, (_, j) in zip(classes, done, strict=True) if j is not None]
    sources = [s for c in classes for s in c.runs.sources]
    return Linearised(fit, names, np.concatenate([e for e, _ in done]), np.concatenate(slopes), sources)


def leave_one_out(table: Table, at: Linearised) -> Predicted:
    """Every source predicted with constants fitted without it."""
    rows: list[Prediction] = []
    for source in sorted(set(at.sources)):
        part = tuple(Batch(b.task, own) for b in table.batches if (own := [e for e in b.entries if e.source == source]))
        rows += predicted_with(Table(part, table.skipped), at.without(source)).rows
    return Predicted(tuple(rows), table.skipped)


def after_calibration(table: Table, at: Linearised, rows: int = 5, draws: int = 3) -> dict[str, float]:
    """Mean absolute error by source after calibrating each unseen machine on a few runs of its own, on the others.

    As `planner calibrate` does it: a source on several machines is calibrated machine by machine.
    """
    errors: dict[str, list[float]] = defaultdict(list)
    for source in sorted(set(at.sources)):
        fit = at.without(source)
        groups: dict[tuple[str, str], list[Batch]] = defaultdict(list)
        for b in table.batches:
            own = [e for e in b.entries if e.source == source]
            if own:
                groups[(own[0].profile, own[0].base_engine)].append(Batch(b.task, own))
        for (profile, engine), batches in groups.items():
            runs = timed(batches)
            if runs is not None and len(runs.ids) > rows:
                start = fit.vector(profile, engine, batches[0].task.hardware.device.name)
                for draw in range(draws):
                    errors[source] += _calibrated_errors(batches, list(runs.ids), start, rows, draw)
    return {source: float(np.mean(e)) for source, e in errors.items()}


def _calibrated_errors(batches: list[Batch], lines: list[str], start: Floats, rows: int, draw: int) -> list[float]:
    """Absolute errors of rows (at most 80) after calibrating on `rows` others, chosen at random."""
    chosen = set(np.random.default_rng(draw).permutation(lines)[:rows].tolist())
    rest = [x for x in lines if x not in chosen]
    rest = [rest[i] for i in np.unique(np.linspace(0, len(rest) - 1, 80).round().astype(int))]
    seen, unseen = timed(batches, list(chosen)), timed(batches, rest)
    assert seen is not None
    assert unseen is not None
    vector = posterior(without_sick(seen, start)[0], start)[0]
    return [float(x) for x in np.abs(np.expm1(unseen.log_errors(vector)))]


# ---- writing profiles ----------------------------------------------------------------------------------------------

CARRIED = "carried over: runs of this device and of this engine elsewhere"
_MARK = "# Fitted by planner.validation.shipped; do not edit by hand.\n"


ENGINES = ("megatron", "deepspeed", "torchtitan", "fsdp1", "nanotron")
"""Engines that every profile of a GPU gets constants for."""
GENERAL = ("compute", "elementwise", "tp", "dp", "scale")
"""Constants that engines without runs of their own take from the device's effects."""


def write_profiles(classes: list[Class], fit: Fit, predicted: Predicted, left_out: Predicted, folder: Path) -> None:
    """Replace the `engines` block at the end of the file of each profile of a GPU."""
    known = {(c.profile, c.engine): c for c in classes}
    for path in sorted(folder.glob("*.yaml")):
        hardware = files.load_hardware(str(path))[0]
        if hardware.device.kind == "cpu":
            continue
        lines = [_MARK, "engines:\n"]
        for engine in ENGINES:
            c = known.get((path.stem, engine))
            if c is not None:
                lines += _engine_lines(c, fit, predicted)
            else:
                lines += _carried_lines(path.stem, engine, hardware.device.name, fit, left_out)
        values = Fit({e: v for e, v in fit.effects.items() if e[0] in ("all", "device")}).values("", "", hardware.device.name)
        lines.append("  any:\n    constants:\n")
        lines += [_constant_line(name, values[name], "effects of this device over all engines") for name in GENERAL]
        text = path.read_text(encoding="utf-8").partition(_MARK)[0]
        path.write_text(text + "".join(lines), encoding="utf-8")


def _constant_line(name: str, value: float, source: str) -> str:
    return f"      {name}: {{value: {value:.4g}, provenance: fitted, source: {json.dumps(source)}}}\n"


def _carried_lines(profile: str, engine: str, device: str, fit: Fit, left_out: Predicted) -> list[str]:
    """An engine without runs on a machine: what other machines with its device and other runs of the engine say."""
    values = fit.values(profile, engine, device)
    lines = [f"  {engine}:\n    constants:\n"]
    lines += [_constant_line(name, values[name], CARRIED) for name in TIME_CONSTANTS]
    rows = [r for r in left_out.rows if without_recipe(r.engine) == engine]
    times = np.array([r.time_error for r in rows if r.time_error is not None and not r.excluded])
    if (value := residual(times)) is not None:
        source = f"80 % of {len(times)} runs of the engine lie within, their sources left out"
        lines.append(f"    time_error: {{value: {value:.3g}, provenance: fitted, source: {json.dumps(source)}}}\n")
    return lines


def _engine_lines(c: Class, fit: Fit, predicted: Predicted) -> list[str]:
    sources = sorted({s.split(" (")[0] for s in c.runs.sources})
    origin = f"{len(c.runs.measured)} runs: {'; '.join(sources)}"
    values = fit.values(c.profile, c.engine, c.device)
    active = {name for b in c.runs.batches for name in moves(b)}
    lines = [f"  {c.engine}:\n    runs: {json.dumps(origin)}\n    constants:\n"]
    for name in TIME_CONSTANTS:
        source = f"{len(c.runs.measured)} runs" if name in active else CARRIED
        lines.append(_constant_line(name, values[name], source))
    rows = [r for r in predicted.rows if r.profile == c.profile and without_recipe(r.engine) == c.engine]
    times = np.array([r.time_error for r in rows if r.time_error is not None and not r.excluded])
    sizes = np.array([r.memory_error for r in rows if r.memory_error is not None and not r.memory_excluded])
    for key, errors in (("time_error", times), ("memory_error", sizes)):
        if (value := residual(errors)) is not None:
            value = max(value, FLOOR)
            source = f"80 % of the {len(errors)} runs behind the constants lie within; not below {FLOOR:g}"
            lines.append(f"    {key}: {{value: {value:.3g}, provenance: fitted, source: {json.dumps(source)}}}\n")
    if any(r.outcome == "oom" for r in rows):
        lines.append(f"    memory_labels: {sum(r.outcome in ('oom', 'ran') for r in rows)}\n")
    return lines


def main() -> None:
    """Fit, report, and write the profiles if asked."""
    from planner.validation.metrics import summarize

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs")
    parser.add_argument("--write", metavar="FOLDER", help="rewrite the engines block of the profiles in this folder")
    parser.add_argument("--report", metavar="FILE", help="write all errors as JSON")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    table = load_table(options.runs, load_map(None), frozenset("AB"))
    classes = classes_of(table)
    found = fit(classes, options.workers)
    fitted = predicted_with(table, found)
    at = linearise(classes, found, options.workers)
    levels = {"nothing fitted": predicted_with(table, None), "fitted": fitted, "source left out": leave_one_out(table, at)}
    report: dict[str, object] = {name: summarize(p).to_dict() for name, p in levels.items()}
    report["after calibration on five runs"] = after_calibration(table, at)
    for name, p in levels.items():
        s = summarize(p)
        print(name, json.dumps({k: v for k, v in s.to_dict()["overall"].items() if k.startswith("macro_time")}))
    if options.report:
        Path(options.report).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.write:
        write_profiles(classes, found, fitted, levels["source left out"], Path(options.write))


if __name__ == "__main__":
    main()
