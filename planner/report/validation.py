"""Predictions against measured runs: tables for the terminal, plain data, CSV.

Comes in: predictions and the figures of `planner.validation.metrics`. Goes out: text and dictionaries.
"""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from planner.units import seconds
from planner.validation import metrics
from planner.validation.metrics import Summary
from planner.validation.prediction import Predicted, Prediction

POOLED, AVERAGED = "all rows", "mean of groups"
_TIME = (
    ("rows", "rows", "count"), ("timed", "time_rows", "count"), ("MAPE", "time_mape", "share"),
    ("median", "time_median", "share"), ("bias", "time_bias", "error"), ("90th\npct.", "time_p90", "share"),
    ("within\n10 %", "time_within_10", "share"), ("in\nrange", "interval_coverage", "share"),
)  # fmt: skip
_OTHER = (
    ("mem.\nrows", "memory_rows", "count"), ("MAPE", "memory_mape", "share"), ("worst\nunder", "memory_worst_under", "error"),
    ("sweeps", "ranking_sweeps", "count"), ("regret\nmedian", "regret_median", "share"),
    ("regret\nmean", "regret_mean", "share"), ("OOM\nright", "oom_accuracy", "share"),
)  # fmt: skip


def percent(value: float | None, signed: bool = False) -> str:
    """A fraction as "4.2 %", with a sign when it is a signed error; a dash when it is not defined."""
    if value is None:
        return "–"
    return f"{value * 100:+,.1f} %" if signed else f"{value * 100:,.1f} %"


def figure(value: float | None, kind: str) -> str:
    """One figure of a group as text: a count, a share, or a signed error."""
    if kind == "count":
        return "" if value is None else f"{value:,}"
    return percent(value, signed=kind == "error")


def group_lines(summary: Summary) -> list[tuple[str, dict[str, Any]]]:
    """(name, figures) of every group, then of all rows pooled, then the mean of the groups."""
    lines = [(name, m.to_dict()) for name, m in summary.groups.items()]
    average = {name.removeprefix("macro_"): value for name, value in summary.macro().items()}
    return [*lines, (POOLED, summary.overall.to_dict()), (AVERAGED, average)]


def print_summary(summary: Summary, predicted: Predicted, out: Console, all_rows: bool = False) -> None:
    """The whole report: groups, feasibility, what was left out, and the worst rows or all of them."""
    lines = group_lines(summary)
    out.print(_group_table("Step time, predicted against measured", summary.by, _TIME, lines))
    out.print(_group_table("\nMemory, ranking of layouts, feasibility", summary.by, _OTHER, lines))
    out.print(_remarks(summary))
    if all_rows:
        out.print(_row_table("All rows, step time", predicted.rows, "time"))
        out.print(_row_table("\nAll rows, memory", predicted.rows, "memory"))
        return
    if worst := metrics.worst_rows(predicted, 8):
        out.print(_row_table("Worst rows, step time", worst, "time"))
    if worst := metrics.worst_rows(predicted, 5, "memory"):
        out.print(_row_table("\nWorst rows, memory", worst, "memory"))


def skip_lines(skipped: dict[str, int]) -> list[str]:
    """ "12 reason" for every reason, the most frequent first."""
    return [f"{n:,} {reason}" for reason, n in skipped.items()]


def summary_csv(summary: Summary) -> str:
    """One line a group, then the pooled figures and the mean of the groups."""
    lines = [{summary.by: name} | _flat(figures) for name, figures in group_lines(summary)]
    return _csv(lines)


def rows_csv(predicted: Predicted) -> str:
    """One line a row, with its errors; the parts of the predicted step as term_<name>."""
    return _csv([_flat_row(row) for row in predicted.rows])


def _table(title: str) -> Table:
    # A space between columns leaves room for long names of sources at 80 columns.
    return Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0)
    )


def _group_table(
    title: str, by: str, columns: tuple[tuple[str, str, str], ...], lines: list[tuple[str, dict[str, Any]]]
) -> Table:
    table = _table(title)
    table.add_column(by, overflow="fold", min_width=14)
    for header, _, _ in columns:
        table.add_column(header, justify="right", no_wrap=True)
    for name, figures in lines:
        cells = [figure(figures.get(key), kind) for _, key, kind in columns]
        total = name in (POOLED, AVERAGED)
        if name == POOLED:
            table.add_section()
        table.add_row(Text(name), *(Text(cell) for cell in cells), style="bold" if total else "")
    return table


def _remarks(summary: Summary) -> Text:
    """The confusion matrix, and what was excluded or skipped with the reasons."""
    f, overall = summary.overall.feasibility, summary.overall
    lines = [
        f"feasibility: of {f.fits_ran + f.refused_ran:,} runs that ran, {f.fits_ran:,} were said to fit; "
        f"of {f.fits_failed + f.refused_failed:,} out of memory, {f.refused_failed:,} were refused"
    ]
    if f.fits_failed:
        lines[0] += f" ({percent(f.false_fit_share)} of the rows said to fit did not)"
    if weak := f.weak_fits + f.weak_refused:
        lines.append(f"weak labels: {weak:,} runs failed for an unknown reason, {f.weak_refused:,} of them refused")
    if overall.time.excluded:
        share = f"the MAPE of time with them is {percent(overall.time.mape_all)}"
        lines.append(f"left out of time and ranking ({share}): {'; '.join(skip_lines(overall.time.excluded))}")
    ranks = overall.ranking
    if ranks.regret_mean != ranks.regret_mean_with_stalled:
        lines.append(f"mean regret with the stalled runs: {percent(ranks.regret_mean_with_stalled)}")
    if overall.memory.excluded:
        lines.append(f"left out of memory: {'; '.join(skip_lines(overall.memory.excluded))}")
    if summary.skipped:
        lines.append(f"not predicted, {sum(summary.skipped.values()):,} rows: {'; '.join(skip_lines(summary.skipped))}")
    return Text("\n" + "\n".join(lines) + "\n")


def _row_table(title: str, rows: list[Prediction] | tuple[Prediction, ...], what: str) -> Table:
    table = _table(title)
    for name in ("row", "layout"):
        table.add_column(name, overflow="fold")
    for name in ("measured", "predicted", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(Text(row.row_id), Text(row.layout), *_row_figures(row, what))
    return table


def _row_figures(row: Prediction, what: str) -> tuple[Text, Text, Text]:
    """Measured, predicted and error; the outcome stands for the figure of a run that did not finish."""
    if what == "time":
        measured, predicted, error = row.measured_time, seconds(row.predicted_time), metrics.signed_time_error(row)
        shown = None if measured is None else seconds(measured)
    else:
        measured, error = row.measured_memory, metrics.signed_memory_error(row)
        predicted = f"{row.predicted_memory:,.1f} GiB" + ("" if row.fits else ", refused")
        shown = None if measured is None else f"{measured:,.1f} GiB"
    return Text(shown or ("–" if row.outcome == "ran" else row.outcome)), Text(predicted), Text(percent(error, signed=True))


def _flat(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures of a group in one level; reasons as one text."""
    flat: dict[str, Any] = {}
    for name, value in figures.items():
        if name in ("excluded", "memory_excluded"):
            flat[name] = "; ".join(skip_lines(value))
        elif isinstance(value, dict):
            flat |= {f"{name}_{k}": v for k, v in value.items()}
        else:
            flat[name] = value
    return flat


def _flat_row(row: Prediction) -> dict[str, Any]:
    data = metrics.row_dict(row)
    low, high = data.pop("time_interval")
    terms = data.pop("terms")
    return data | {"time_low": low, "time_high": high} | {f"term_{k}": v for k, v in terms.items()}


def _csv(lines: list[dict[str, Any]]) -> str:
    """Lines with the union of their names; nothing for None, true and false as JSON writes them."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, restval="", lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({k: json.dumps(v) if isinstance(v, bool) else v for k, v in line.items()})
    return stream.getvalue()
