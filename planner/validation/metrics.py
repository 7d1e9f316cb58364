"""How far predictions are from measured runs: step time, memory, the ranking of layouts, what fits.

Comes in: predictions. Goes out: frozen figures and plain dictionaries. Errors are fractions of the measured figure
(0.05 = 5 %), a signed error is predicted / measured - 1, and None stands where a figure is not defined.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np

from planner.validation.prediction import Predicted, Prediction
from planner.validation.stalled import STALLED

GROUPINGS = ("source", "hardware", "engine", "model")
"""Fields of a prediction that rows can be grouped by."""
SMALLEST_SWEEP = 3
"""Layouts that a sweep needs before it can rank them."""
LARGER_SWEEP = 5
_ROUNDING = 1e-9


@dataclass(frozen=True)
class TimeErrors:
    """Errors of the step time over the rows that ran and were timed."""

    rows: int
    mape: float | None
    """Mean absolute error."""
    median: float | None
    """Median absolute error."""
    bias: float | None
    """Mean signed error."""
    p90: float | None
    within_10: float | None
    """Share of rows with an absolute error of at most 10 %."""
    within_20: float | None
    interval_coverage: float | None
    """Share of measured times inside the predicted interval."""
    excluded: dict[str, int]
    """Timed rows that a rule keeps out of all of these and of the ranking, by rule."""
    mape_all: float | None
    """Mean absolute error with the excluded rows."""
    mape_with_stalled: float | None
    """Mean absolute error with the rows that were left out as stalled, but no others."""


@dataclass(frozen=True)
class MemoryErrors:
    """Errors of the peak memory over the rows that ran and have a comparable figure."""

    rows: int
    mape: float | None
    bias: float | None
    worst_under: float | None
    """The most negative signed error, 0 when no row is under-predicted."""
    worst_over: float | None
    excluded: dict[str, int]


@dataclass(frozen=True)
class Sweep:
    """One job measured under several layouts, and how well the predictions rank them."""

    key: tuple[str, str, str, int, int, int, str, str]
    layouts: int
    spearman: float | None
    """Rank correlation of predicted and measured times; None when all of either are equal."""
    regret: float
    """Measured time of the layout predicted fastest (the mean of those predicted equally fast) / the best measured - 1."""
    regret_top3: float
    """The same for the best of the three layouts predicted fastest."""


@dataclass(frozen=True)
class Ranking:
    """Ranking of layouts over sweeps; the figures with a 5 are of sweeps with five layouts or more."""

    sweeps: int
    spearman_mean: float | None
    regret_mean: float | None
    regret_median: float | None
    regret_top3_mean: float | None
    sweeps5: int
    regret5_mean: float | None
    regret5_median: float | None
    regret5_top3_mean: float | None
    regret_mean_with_stalled: float | None
    """The same with the runs that were left out as stalled."""
    regret5_mean_with_stalled: float | None


@dataclass(frozen=True)
class Feasibility:
    """Predicted against observed feasibility. Rows that failed for an unknown reason are weak labels, counted apart."""

    fits_ran: int
    fits_failed: int
    refused_ran: int
    refused_failed: int
    weak_fits: int
    weak_refused: int
    labelled_rows: int
    """Rows behind `oom_accuracy`: of sources that report at least one out-of-memory run."""
    oom_accuracy: float | None
    false_fit_share: float | None
    """Share of rows predicted to fit that ran out of memory."""


@dataclass(frozen=True)
class Metrics:
    """All figures of one group of rows."""

    rows: int
    time: TimeErrors
    memory: MemoryErrors
    ranking: Ranking
    feasibility: Feasibility

    def to_dict(self) -> dict[str, Any]:
        """The figures under flat names, ready for JSON."""
        f = self.feasibility
        return {
            "rows": self.rows,
            "time_rows": self.time.rows,
            **{f"time_{k}": getattr(self.time, k) for k in ("mape", "median", "bias", "p90", "within_10", "within_20")},
            "time_mape_all": self.time.mape_all,
            "time_mape_with_stalled": self.time.mape_with_stalled,
            "time_excluded": sum(self.time.excluded.values()),
            "excluded": dict(self.time.excluded),
            "interval_coverage": self.time.interval_coverage,
            **{f"memory_{x.name}": getattr(self.memory, x.name) for x in fields(self.memory) if x.name != "excluded"},
            "memory_excluded": dict(self.memory.excluded),
            **{f"ranking_{k}" if k.startswith("sweeps") else k: v for k, v in asdict(self.ranking).items()},
            "feasibility": {k: getattr(f, k) for k in ("fits_ran", "fits_failed", "refused_ran", "refused_failed")},
            "weak_failed": {"fits": f.weak_fits, "refused": f.weak_refused},
            "oom_rows": f.labelled_rows,
            "oom_accuracy": f.oom_accuracy,
            "false_fit_share": f.false_fit_share,
        }


MACRO = (
    "time_mape", "time_median", "time_bias", "time_p90", "time_within_10", "time_within_20", "time_mape_all",
    "interval_coverage", "memory_mape", "memory_bias", "spearman_mean", "regret_mean", "regret_median",
    "regret_top3_mean", "regret5_mean", "regret5_median", "regret5_top3_mean", "oom_accuracy", "false_fit_share",
)  # fmt: skip
"""Figures with an average over groups, as the pooled ones are those of the largest source."""


@dataclass(frozen=True)
class Summary:
    """The figures of a table of runs, pooled and by group; groups with more rows come first."""

    by: str
    overall: Metrics
    groups: dict[str, Metrics]
    skipped: dict[str, int]
    """Rows that could not be predicted, by reason."""

    def macro(self) -> dict[str, float | None]:
        """`macro_<figure>`: its mean over the groups that have it."""
        groups = [g.to_dict() for g in self.groups.values()]
        return {f"macro_{name}": _mean([g[name] for g in groups if g[name] is not None]) for name in MACRO}

    def to_dict(self) -> dict[str, Any]:
        """overall, groups and skipped, ready for strict JSON."""
        groups = {name: metrics.to_dict() for name, metrics in self.groups.items()}
        return {"overall": self.overall.to_dict() | self.macro(), "groups": groups, "skipped": dict(self.skipped)}


def summarize(predicted: Predicted, by: str = "source") -> Summary:
    """The figures of all rows, and of the rows grouped by one of GROUPINGS. Raises ValueError for another name."""
    if by not in GROUPINGS:
        raise ValueError(f"no grouping '{by}': one of {', '.join(GROUPINGS)}")
    groups: dict[str, list[Prediction]] = {}
    for row in predicted.rows:
        groups.setdefault(getattr(row, by) or "(not given)", []).append(row)
    order = sorted(groups, key=lambda name: (-len(groups[name]), name))
    return Summary(
        by, metrics_of(predicted.rows), {name: metrics_of(groups[name]) for name in order}, _by_count(predicted.skipped)
    )


def metrics_of(rows: Sequence[Prediction]) -> Metrics:
    """All figures of some rows; rows may be empty."""
    return Metrics(len(rows), time_errors(rows), memory_errors(rows), ranking(rows), feasibility(rows))


def signed_time_error(row: Prediction) -> float | None:
    """predicted / measured - 1 of a run that finished and was timed, None for others."""
    return _signed(row, row.predicted_time, row.measured_time)


def signed_memory_error(row: Prediction) -> float | None:
    """predicted / measured - 1 of the peak memory of a run that finished, None for others."""
    return _signed(row, row.predicted_memory, row.measured_memory)


def time_errors(rows: Iterable[Prediction]) -> TimeErrors:
    """Errors of the step time."""
    timed = [(row, error) for row in rows if (error := signed_time_error(row)) is not None]
    counted = [(row, error) for row, error in timed if not row.excluded]
    signed = [error for _, error in counted]
    absolute = [abs(error) for error in signed]
    inside = [row.time_interval[0] <= (row.measured_time or 0.0) <= row.time_interval[1] for row, _ in counted]
    return TimeErrors(
        rows=len(signed),
        mape=_mean(absolute),
        median=_median(absolute),
        bias=_mean(signed),
        p90=_number(np.percentile(absolute, 90)) if absolute else None,
        within_10=_mean([error <= 0.10 + _ROUNDING for error in absolute]),
        within_20=_mean([error <= 0.20 + _ROUNDING for error in absolute]),
        interval_coverage=_mean(inside),
        excluded=_by_count(Counter(row.excluded for row, _ in timed if row.excluded)),
        mape_all=_mean([abs(error) for _, error in timed]),
        mape_with_stalled=_mean([abs(error) for row, error in timed if _counts(row, with_stalled=True)]),
    )


def memory_errors(rows: Iterable[Prediction]) -> MemoryErrors:
    """Errors of the peak memory."""
    measured = [(row, error) for row in rows if (error := signed_memory_error(row)) is not None]
    signed = [error for row, error in measured if not row.memory_excluded]
    return MemoryErrors(
        rows=len(signed),
        mape=_mean([abs(error) for error in signed]),
        bias=_mean(signed),
        worst_under=_number(min(0.0, *signed)) if signed else None,
        worst_over=_number(max(0.0, *signed)) if signed else None,
        excluded=_by_count(Counter(row.memory_excluded for row, _ in measured if row.memory_excluded)),
    )


def sweeps(rows: Iterable[Prediction], with_stalled: bool = False) -> list[Sweep]:
    """Every sweep with at least SMALLEST_SWEEP layouts among the timed rows; repeats of a layout are averaged first."""
    found: dict[tuple[str, str, str, int, int, int, str, str], dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        if signed_time_error(row) is not None and _counts(row, with_stalled) and row.measured_time is not None:
            runs = found.setdefault(row.sweep, {}).setdefault(row.layout, [])
            runs.append((row.predicted_time, row.measured_time))
    return [_sweep(key, layouts) for key, layouts in found.items() if len(layouts) >= SMALLEST_SWEEP]


def ranking(rows: Iterable[Prediction]) -> Ranking:
    """How well predictions rank the layouts of each sweep."""
    rows = list(rows)
    found = sweeps(rows)
    larger = [s for s in found if s.layouts >= LARGER_SWEEP]
    everything = sweeps(rows, with_stalled=True)
    return Ranking(
        sweeps=len(found),
        spearman_mean=_mean([s.spearman for s in found if s.spearman is not None]),
        regret_mean=_mean([s.regret for s in found]),
        regret_median=_median([s.regret for s in found]),
        regret_top3_mean=_mean([s.regret_top3 for s in found]),
        sweeps5=len(larger),
        regret5_mean=_mean([s.regret for s in larger]),
        regret5_median=_median([s.regret for s in larger]),
        regret5_top3_mean=_mean([s.regret_top3 for s in larger]),
        regret_mean_with_stalled=_mean([s.regret for s in everything]),
        regret5_mean_with_stalled=_mean([s.regret for s in everything if s.layouts >= LARGER_SWEEP]),
    )


def feasibility(rows: Sequence[Prediction]) -> Feasibility:
    """The confusion matrix of fitting, and its accuracy over sources that report runs out of memory at all."""
    cells = Counter((row.fits, row.outcome) for row in rows)
    reporting = {row.source for row in rows if row.outcome == "oom"}
    labelled = [row for row in rows if row.source in reporting and row.outcome != "failed"]
    fits = cells[True, "ran"] + cells[True, "oom"]
    return Feasibility(
        fits_ran=cells[True, "ran"],
        fits_failed=cells[True, "oom"],
        refused_ran=cells[False, "ran"],
        refused_failed=cells[False, "oom"],
        weak_fits=cells[True, "failed"],
        weak_refused=cells[False, "failed"],
        labelled_rows=len(labelled),
        oom_accuracy=_mean([row.fits == (row.outcome == "ran") for row in labelled]),
        false_fit_share=cells[True, "oom"] / fits if fits else None,
    )


def worst_rows(predicted: Predicted, n: int, of: Literal["time", "memory"] = "time") -> list[Prediction]:
    """The `n` counted rows with the largest absolute error of time or memory, largest first."""
    if of == "time":
        errors = [(row, signed_time_error(row)) for row in predicted.rows if not row.excluded]
    else:
        errors = [(row, signed_memory_error(row)) for row in predicted.rows if not row.memory_excluded]
    known = [(row, error) for row, error in errors if error is not None]
    known.sort(key=lambda pair: (-abs(pair[1]), pair[0].line))
    return [row for row, _ in known[:n]]


def row_dict(row: Prediction) -> dict[str, Any]:
    """A prediction with its errors, ready for strict JSON."""
    data = asdict(row) | {"time_error": signed_time_error(row), "memory_error": signed_memory_error(row)}
    data["time_interval"] = [_number(end) for end in row.time_interval]
    data["terms"] = {name: _number(value) for name, value in row.terms.items()}
    return {k: _number(v) if isinstance(v, float) else v for k, v in data.items()}


def _counts(row: Prediction, with_stalled: bool) -> bool:
    """Whether no rule leaves the row out of times and rankings."""
    return not row.excluded or (with_stalled and row.excluded.startswith(STALLED))


def _sweep(key: tuple[str, str, str, int, int, int, str, str], layouts: dict[str, list[tuple[float, float]]]) -> Sweep:
    """The ranking of one sweep's layouts, given each one's (predicted, measured) times."""
    names = sorted(layouts)
    predicted, measured = np.array([np.mean(layouts[name], axis=0) for name in names]).T
    order = np.argsort(predicted, kind="stable")  # ties stay in the order of their names
    best = float(measured.min())
    tied = predicted <= predicted.min() * (1.0 + _ROUNDING)
    first, first3 = float(measured[tied].mean()), float(measured[order[:3]].min())
    return Sweep(key, len(names), _spearman(predicted, measured), first / best - 1.0, first3 / best - 1.0)


def _spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    from scipy.stats import spearmanr  # type: ignore[import-untyped, unused-ignore]

    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return _number(spearmanr(a, b).statistic)


def _signed(row: Prediction, predicted: float, measured: float | None) -> float | None:
    if row.outcome != "ran" or measured is None or not measured > 0:
        return None
    return predicted / measured - 1.0


def _mean(values: Sequence[float]) -> float | None:
    return _number(np.mean(values)) if values else None


def _median(values: Sequence[float]) -> float | None:
    return _number(np.median(values)) if values else None


def _number(value: Any) -> float | None:
    """A plain float; None for what JSON cannot hold."""
    return float(value) if math.isfinite(value) else None


def _by_count(reasons: Counter[str]) -> dict[str, int]:
    """Reasons, the most frequent first."""
    return dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))
