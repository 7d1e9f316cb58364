"""Predictions against measured runs as one HTML page that needs nothing else: tables, two plots, sorting.

Comes in: predictions and the figures of `planner.validation.metrics`. Goes out: the text of the page.
"""

from __future__ import annotations

import math
from collections import Counter
from html import escape
from string import Template

from planner.report.validation import figure, group_lines, percent
from planner.units import seconds
from planner.validation.metrics import Summary, signed_memory_error, signed_time_error
from planner.validation.prediction import Predicted, Prediction

_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c6d1f", "#5b3fa0")
_REST = "#8a8a8a"
_SIZE, _MARGIN = 420, 62
_BIN = 0.05
_COLUMNS = (
    ("rows", "rows", "count"), ("timed", "time_rows", "count"), ("excluded", "time_excluded", "count"),
    ("MAPE", "time_mape", "share"), ("median", "time_median", "share"), ("bias", "time_bias", "error"),
    ("90th percentile", "time_p90", "share"), ("within 10 %", "time_within_10", "share"),
    ("within 20 %", "time_within_20", "share"), ("in interval", "interval_coverage", "share"),
    ("memory rows", "memory_rows", "count"), ("memory MAPE", "memory_mape", "share"),
    ("worst under", "memory_worst_under", "error"), ("worst over", "memory_worst_over", "error"),
    ("sweeps", "ranking_sweeps", "count"), ("Spearman", "spearman_mean", "plain"),
    ("regret median", "regret_median", "share"), ("regret mean", "regret_mean", "share"),
    ("OOM right", "oom_accuracy", "share"),
)  # fmt: skip

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --line: #8886; --soft: #8882; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 1500px; padding: 0 1rem; }
h2 { margin-top: 2rem; } .scroll { overflow-x: auto; } .plots { display: flex; flex-wrap: wrap; gap: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th.text, td.text { text-align: left; max-width: 30rem; overflow-wrap: anywhere; }
th button { all: unset; cursor: pointer; font-weight: 600; } th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
tr.total { font-weight: 600; background: var(--soft); } figure { margin: 0; } figcaption { max-width: 420px; font-size: 13px; }
svg { width: 420px; max-width: 100%; height: auto; } svg text { font-size: 11px; fill: currentColor; }
.key { display: inline-block; margin-right: .8rem; } .key i { display: inline-block; width: .7em; height: .7em; }
</style></head><body>
<h1>$title</h1>
<p>$lead</p>
<h2>By $by</h2>
<p>Errors are shares of the measured figure; a sign means predicted − measured.</p>
<div class="scroll">$groups</div>
<h2>Step time</h2>
<div class="plots"><figure>$scatter<figcaption>$legend<br>On the line: predicted = measured. Dashed: ±20 %. Hollow: excluded by
a rule.</figcaption></figure>
<figure>$histogram<figcaption>Signed error of the counted rows, bins of 5 %; the last bin holds all of +100 % and
more.</figcaption></figure></div>
<h2>Feasibility</h2>
<div class="scroll">$confusion</div>
<h2>Left out</h2>
$left_out
<h2>Rows</h2>
<div class="scroll">$rows</div>
<script>
document.querySelectorAll("table.sortable").forEach(function (table) {
  var heads = table.querySelectorAll("thead th");
  heads.forEach(function (head, column) {
    head.querySelector("button").addEventListener("click", function () {
      var up = head.getAttribute("aria-sort") !== "ascending", body = table.tBodies[0];
      heads.forEach(function (h) { h.removeAttribute("aria-sort"); });
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      Array.from(body.rows).map(function (row) {
        return [row.cells[column].getAttribute("data-v") || row.cells[column].textContent, row];
      }).sort(function (a, b) {
        if (a[0] === "–" || b[0] === "–") { return (a[0] === "–") - (b[0] === "–"); }
        var x = Number(a[0]), y = Number(b[0]);
        var order = isNaN(x) || isNaN(y) ? String(a[0]).localeCompare(b[0]) : x - y;
        return up ? order : -order;
      }).forEach(function (pair) { body.appendChild(pair[1]); });
    });
  });
});
</script>
</body></html>
""")


def page(summary: Summary, predicted: Predicted, name: str) -> str:
    """The whole page; `name` is the table of runs that it is about."""
    time, memory = summary.overall.time, summary.overall.memory
    lead = (
        f"{summary.overall.rows:,} rows predicted; step time: mean absolute error {percent(time.mape)}, median "
        f"{percent(time.median)} over {time.rows:,} rows; memory: {percent(memory.mape)} over {memory.rows:,} rows."
    )
    colours = dict(zip(summary.groups, _COLOURS, strict=False))
    timed = [row for row in predicted.rows if signed_time_error(row) is not None and row.predicted_time > 0]
    return _PAGE.substitute(
        title=escape(f"Predicted against measured: {name}"),
        lead=escape(lead),
        by=escape(summary.by),
        groups=_group_table(summary),
        scatter=_scatter(timed, summary.by, colours),
        legend=_legend(summary, colours),
        histogram=_histogram([e for r in timed if not r.excluded and (e := signed_time_error(r)) is not None]),
        confusion=_confusion(summary),
        left_out=_left_out(summary),
        rows=_row_table(predicted),
    )


def _group_table(summary: Summary) -> str:
    body: list[list[str]] = []
    totals: list[list[str]] = []
    for i, (name, figures) in enumerate(group_lines(summary)):
        cells = [_cell(name, text=True)]
        for _, key, kind in _COLUMNS:
            value = figures.get(key)
            if kind == "plain":
                cells.append(_cell("–" if value is None else f"{value:.2f}", value))
            else:
                cells.append(_cell(figure(value, kind), value))
        (body if i < len(summary.groups) else totals).append(cells)
    return _table([summary.by, *(header for header, _, _ in _COLUMNS)], {0}, body, totals)


def _row_table(predicted: Predicted) -> str:
    headers = ["row", "source", "model", "hardware", "engine", "layout", "GPUs", "outcome", "measured", "predicted",
               "error", "memory measured, GiB", "predicted, GiB", "error", "fits", "left out"]  # fmt: skip
    return _table(headers, {*range(6), 7, 14, 15}, [_row_cells(row) for row in predicted.rows])


def _row_cells(row: Prediction) -> list[str]:
    time_error, memory_error = signed_time_error(row), signed_memory_error(row)
    words = [row.row_id, row.source, row.model, row.hardware, row.engine, row.layout]
    return [
        *(_cell(word, text=True) for word in words),
        _cell(str(row.gpus)),
        _cell(row.outcome, text=True),
        _cell("–" if row.measured_time is None else seconds(row.measured_time), row.measured_time),
        _cell(seconds(row.predicted_time), row.predicted_time),
        _cell(percent(time_error, signed=True), time_error),
        _cell("–" if row.measured_memory is None else f"{row.measured_memory:.1f}", row.measured_memory),
        _cell(f"{row.predicted_memory:.1f}", row.predicted_memory),
        _cell(percent(memory_error, signed=True), memory_error),
        _cell("yes" if row.fits else "no", text=True),
        _cell("; ".join(dict.fromkeys(r for r in (row.excluded, row.memory_excluded) if r)), text=True),
    ]


def _cell(shown: str, value: float | None = None, text: bool = False) -> str:
    """A table cell; `value` is what it is sorted by when the text is not a number."""
    sort = "" if value is None else f' data-v="{value:.6g}"'
    return f"<td{' class=text' if text else ''}{sort}>{escape(shown)}</td>"


def _table(headers: list[str], text: set[int], body: list[list[str]], totals: list[list[str]] | None = None) -> str:
    """A table that sorts by a click on a header; totals stay below. `text` are the columns that are not numbers."""
    head = "".join(
        f'<th scope="col"{" class=text" if i in text else ""}><button type="button">{escape(header)}</button></th>'
        for i, header in enumerate(headers)
    )
    lines = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in body)
    foot = "".join(f'<tr class="total">{"".join(cells)}</tr>' for cells in totals or [])
    return (
        f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody>'
        + (f"<tfoot>{foot}</tfoot>" if foot else "")
        + "</table>"
    )


def _scatter(rows: list[Prediction], by: str, colours: dict[str, str]) -> str:
    """Predicted over measured step time, both axes logarithmic and the same."""
    if not rows:
        return "<p>No row has a measured step time.</p>"
    values = [v for row in rows for v in (row.predicted_time, row.measured_time or 0.0)]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    span = _SIZE - 2 * _MARGIN

    def at(value: float) -> float:
        return span * (math.log10(value) - low) / (high - low)

    parts = [_frame()]
    for power in range(low, high + 1):
        x, label = at(10.0**power), escape(seconds(10.0**power))
        parts.append(f'<text x="{_MARGIN + x:.1f}" y="{_SIZE - _MARGIN + 15}" text-anchor="middle">{label}</text>')
        parts.append(f'<text x="{_MARGIN - 5}" y="{_SIZE - _MARGIN - x + 4:.1f}" text-anchor="end">{label}</text>')
    for factor, dash in ((1.0, ""), (0.8, "4 4"), (1.2, "4 4")):
        parts.append(_diagonal(span * math.log10(factor) / (high - low), span, dash))
    for row in rows:
        x, y = _MARGIN + at(row.measured_time or 0.0), _SIZE - _MARGIN - at(row.predicted_time)
        parts.append(_point(row, x, y, colours.get(getattr(row, by), _REST)))
    return _svg("Predicted over measured step time", "measured step time", "predicted step time", parts)


def _diagonal(shift: float, span: float, dash: str) -> str:
    """The line predicted = measured, moved up by `shift` and cut at the frame."""
    start, end = max(0.0, -shift), min(span, span - shift)
    x1, x2 = _MARGIN + start, _MARGIN + end
    y1, y2 = _SIZE - _MARGIN - start - shift, _SIZE - _MARGIN - end - shift
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
        f'stroke="currentColor" stroke-opacity=".5" stroke-dasharray="{dash or "none"}"/>'
    )


def _point(row: Prediction, x: float, y: float, colour: str) -> str:
    title = f"{row.row_id}: {row.layout}, {percent(signed_time_error(row), signed=True)}"
    fill = "none" if row.excluded else colour
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{fill}" fill-opacity=".55" stroke="{colour}">'
        f"<title>{escape(title)}</title></circle>"
    )


def _histogram(errors: list[float]) -> str:
    """How many rows have which signed error, from -100 % to +100 %."""
    if not errors:
        return "<p>No row counts for the errors of time.</p>"
    last = round(1.0 / _BIN)
    # The small shift keeps an error of exactly 5 % out of the bin below when it is 0.0499999....
    counts = Counter(min(math.floor(error / _BIN + 1e-9), last) for error in errors)
    span, most = _SIZE - 2 * _MARGIN, max(counts.values())
    width = span / (2 * last + 1)
    parts = [_frame()]
    for i, n in sorted(counts.items()):
        height = span * n / most
        label = "+100 % and more" if i == last else f"{percent(i * _BIN, True)} to {percent((i + 1) * _BIN, True)}"
        parts.append(
            f'<rect x="{_MARGIN + (i + last) * width:.1f}" y="{_SIZE - _MARGIN - height:.1f}" width="{width - 1:.1f}" '
            f'height="{height:.1f}" fill="{_COLOURS[0]}"><title>{escape(label)}: {n:,} rows</title></rect>'
        )
    for share in (-1.0, -0.5, 0.0, 0.5, 1.0):
        x = _MARGIN + (share / _BIN + last) * width
        text = f"{share * 100:+.0f} %" if share else "0"
        parts.append(f'<text x="{x:.1f}" y="{_SIZE - _MARGIN + 15}" text-anchor="middle">{text}</text>')
    parts.append(f'<text x="{_MARGIN - 5}" y="{_MARGIN + 4}" text-anchor="end">{most:,}</text>')
    return _svg("Distribution of the signed error of step time", "predicted / measured − 1", "rows", parts)


def _frame() -> str:
    span = _SIZE - 2 * _MARGIN
    return f'<rect x="{_MARGIN}" y="{_MARGIN}" width="{span}" height="{span}" fill="none" stroke="currentColor" opacity=".3"/>'


def _svg(label: str, below: str, left: str, parts: list[str]) -> str:
    middle = _SIZE // 2
    axes = (
        f'<text x="{middle}" y="{_SIZE - 12}" text-anchor="middle">{escape(below)}</text>'
        f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">{escape(left)}</text>'
    )
    return f'<svg viewBox="0 0 {_SIZE} {_SIZE}" role="img" aria-label="{escape(label)}">{axes}{"".join(parts)}</svg>'


def _legend(summary: Summary, colours: dict[str, str]) -> str:
    keys = [*colours.items()]
    if len(summary.groups) > len(colours):
        keys.append((f"{len(summary.groups) - len(colours)} others", _REST))
    return "".join(f'<span class="key"><i style="background:{colour}"></i> {escape(name)}</span>' for name, colour in keys)


def _confusion(summary: Summary) -> str:
    """What was said against what happened."""
    f = summary.overall.feasibility
    lines = [
        ("ran", f.fits_ran, f.refused_ran),
        ("out of memory", f.fits_failed, f.refused_failed),
        ("failed, cause unknown", f.weak_fits, f.weak_refused),
    ]
    body = "".join(f'<tr><th class="text" scope="row">{name}</th><td>{a:,}</td><td>{b:,}</td></tr>' for name, a, b in lines)
    accuracy = "no run out of memory is reported" if f.oom_accuracy is None else f"{percent(f.oom_accuracy)} right"
    return (
        '<table><thead><tr><th class="text">outcome</th><th>said to fit</th><th>refused</th></tr></thead>'
        f"<tbody>{body}</tbody></table><p>{accuracy}, over the {f.labelled_rows:,} rows of sources that report runs out of "
        f"memory; {percent(f.false_fit_share)} of the rows said to fit did not.</p>"
    )


def _left_out(summary: Summary) -> str:
    overall = summary.overall
    tables = [
        ("Timed rows that a rule keeps out of the errors of time and of the ranking", overall.time.excluded),
        ("Rows that a rule keeps out of the errors of memory", overall.memory.excluded),
        ("Rows that could not be predicted", summary.skipped),
    ]
    shown = [f"<h3>{title}: {sum(reasons.values()):,}</h3>{_reasons(reasons)}" for title, reasons in tables if reasons]
    if overall.time.excluded:
        shown.append(f"<p>With the excluded rows the mean absolute error of time is {percent(overall.time.mape_all)}.</p>")
    return "\n".join(shown) or "<p>Nothing.</p>"


def _reasons(reasons: dict[str, int]) -> str:
    return "<ul>" + "".join(f"<li>{n:,} {escape(reason)}</li>" for reason, n in reasons.items()) + "</ul>"
