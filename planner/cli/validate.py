"""`planner validate`: how far the cost model is from runs that somebody measured."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from planner.cli import common
from planner.errors import InputError, input_error

if TYPE_CHECKING:
    from planner.validation.metrics import Summary
    from planner.validation.prediction import Predicted

FORMATS = ("table", "json", "html", "csv")
QUALITIES = ("A", "B", "C", "F")


@common.guarded
def validate(
    runs: Annotated[
        str,
        typer.Argument(metavar="RUNS", help="A table of measured runs (CSV), what run --measure wrote, or a folder of such."),
    ],
    profile_map: Annotated[
        str | None, typer.Option("--profile-map", help="A file that says which hardware profile stands for which rows.")
    ] = None,
    by: Annotated[str, typer.Option("--by", help="Group rows by source, hardware, engine or model.")] = "source",
    quality: Annotated[
        str, typer.Option("--quality", help="Qualities of rows that count; failed runs count for feasibility in any case.")
    ] = "A,B",
    output_format: Annotated[str, typer.Option("--format", help="table, json, html or csv.")] = "table",
    output: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write the result here; the table is printed as well.")
    ] = None,
    rows: Annotated[bool, typer.Option("--rows", help="Every row in the table, JSON or CSV, not the groups alone.")] = False,
) -> None:
    """Compare predictions with measured runs: errors of time and memory, ranking of layouts, what fits."""
    common.checked_format(output_format, FORMATS)
    qualities = _qualities(quality)
    _checked_grouping(by)
    common.writable(output)
    common.distinct(output, runs, profile_map)
    from planner.validation.metrics import summarize
    from planner.validation.predict import predict_file

    predicted = predict_file(runs, profile_map, qualities)
    if not predicted.rows:
        raise _nothing_predicted(runs, predicted, quality)
    summary = summarize(predicted, by)
    if output is not None:
        output.write_text(_rendered(output_format, summary, predicted, runs, rows), encoding="utf-8")
    elif output_format != "table":
        common.write_result(_rendered(output_format, summary, predicted, runs, rows))
    if output is not None or output_format == "table":
        _print(summary, predicted, rows and output_format == "table")
    elif output_format == "csv" and predicted.skipped:
        print(f"planner: not predicted, and not in this table: {_reasons(predicted)}", file=sys.stderr)


def _qualities(text: str) -> frozenset[str]:
    """`A,B` as a set. Raises InputError for an unknown one."""
    names = [name.strip().upper() for name in text.split(",")]
    for name in names:
        if name not in QUALITIES:
            raise input_error("PLN107", f"--quality {text}: '{name}' is not a quality", f"qualities are {', '.join(QUALITIES)}")
    return frozenset(names)


def _checked_grouping(by: str) -> None:
    from planner.validation.metrics import GROUPINGS

    if by not in GROUPINGS:
        raise input_error("PLN107", f"--by {by}: not a grouping", f"groupings are {', '.join(GROUPINGS)}")


def _nothing_predicted(runs: str, predicted: Predicted, quality: str) -> InputError:
    skipped = predicted.skipped.total()
    why = f"{skipped:,} rows skipped: {_reasons(predicted)}" if skipped else "it has no rows to predict"
    return input_error("PLN145", f"{runs}: no row could be predicted", why, f"see --profile-map and --quality (now {quality})")


def _reasons(predicted: Predicted) -> str:
    return "; ".join(f"{n:,} {reason}" for reason, n in predicted.skipped.most_common())


def _print(summary: Summary, predicted: Predicted, all_rows: bool, stream: TextIO | None = None) -> None:
    from planner.report import terminal
    from planner.report.validation import print_summary

    print_summary(summary, predicted, terminal.console(stream), all_rows)


def _rendered(output_format: str, summary: Summary, predicted: Predicted, runs: str, rows: bool) -> str:
    """The result as the text of a file."""
    from planner.report import validation, validationhtml
    from planner.validation.metrics import row_dict

    if output_format == "json":
        data = summary.to_dict()
        return common.to_json(data | {"rows": [row_dict(row) for row in predicted.rows]} if rows else data)
    if output_format == "html":
        return validationhtml.page(summary, predicted, Path(runs).name)
    if output_format == "csv":
        return validation.rows_csv(predicted) if rows else validation.summary_csv(summary)
    text = io.StringIO()
    _print(summary, predicted, rows, text)
    return text.getvalue()
