"""`planner plan --pareto`: the front of step time against memory, devices or cost, and its chart."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from planner.cli import common, scale
from planner.errors import input_error

if TYPE_CHECKING:
    from planner.planning.pareto import Front


def front(flags: dict[str, Any]) -> None:
    """Find the front, print it, write it, draw it. Raises PlannerError, TimeoutError or KeyboardInterrupt."""
    from planner import planfile
    from planner.cli import plan as command
    from planner.planning import pareto
    from planner.planning.counts import parse_counts
    from planner.report import frontchart

    against = pareto.checked_against(flags["pareto"])
    _refuse_others(flags)
    output, chart = scale.checked_output(flags["output"]), flags["chart"]
    common.writable(chart)
    frontchart.checked_chart(chart)
    unit = "gpus" if flags["nodes"] is None else "nodes"
    counts = () if flags[unit] is None else parse_counts(flags[unit], f"--{unit}")
    request = command.request_of(flags)
    with command.progress() as report:
        made = pareto.pareto(request, against, flags["points"], counts, report, flags["time_limit"])
    if output is not None and output.suffix == ".json":
        planfile.write_text(common.to_json(made.to_data()), output)
    elif output is not None:
        scale.write_frame(made.frame, output)
    if chart is not None:
        frontchart.draw(made, chart)
    _print(made, flags["output_format"])
    for path, what in ((output, "front"), (chart, "chart")):
        if path is not None:
            print(f"{what} written to {path}", file=sys.stderr)
    if made.stopped:
        print(f"planner: {command.what_ended()}: points are missing", file=sys.stderr)


def _refuse_others(flags: dict[str, Any]) -> None:
    """Flags that mean nothing here. Raises InputError."""
    if flags["objective"] != "throughput":
        why = "a front has no single best plan"
        raise input_error("PLN129", f"--objective {flags['objective']} with --pareto", why, "leave one of them out")
    if flags["deadline_days"] is not None:
        raise input_error("PLN129", "--deadline-days with --pareto", "a front has late plans too", "leave one of them out")


def checked_without(flags: dict[str, Any]) -> None:
    """Flags of a front without one. Raises InputError."""
    for name in ("chart", "points"):
        if flags[name] is not None:
            raise input_error("PLN129", f"--{name} without --pareto", "it is about a front", "add --pareto memory")


def _print(made: Front, output_format: str) -> None:
    if output_format == "json":
        common.write_result(common.to_json(made.to_data()))
    elif output_format == "yaml":
        common.write_result(common.to_yaml(made.to_data()))
    elif output_format == "csv":
        common.write_result(made.frame.to_csv(index=False, lineterminator="\n"))
    elif output_format == "markdown":
        from planner.report import frames

        common.write_result(frames.markdown(made.frame))
    else:
        from planner.report import front as report
        from planner.report import terminal

        report.print_front(made, terminal.console())
