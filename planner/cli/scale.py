"""`planner plan` on several cluster sizes: the table, what is written of it, and which size the objective picks."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner import stopping
from planner.cli import common
from planner.errors import MissingPartError, Problem, input_error

if TYPE_CHECKING:
    import pandas as pd

    from planner.planning.scale import Scaling

SUFFIXES = (".json", ".csv", ".parquet")


def scaling(flags: dict[str, Any]) -> None:
    """Plan every count; print the table, write it or the chosen plan. Raises InfeasibleError when none is picked."""
    from planner.cli import plan as command
    from planner.planning import scale
    from planner.planning.counts import parse_counts

    output = checked_output(flags["output"])
    request = command.request_of(flags)
    unit = "gpus" if flags["nodes"] is None else "nodes"
    if flags["nodes"] is not None and flags["gpus"] is not None:
        raise input_error("PLN131", "give --nodes or --gpus, one of them", "", "for example --nodes 8,16,32")
    counts = parse_counts(flags[unit], f"--{unit}")
    with command.progress() as report:
        made = scale.scale(request, counts, flags["top_k"], report, flags["time_limit"])
    cut = any(row.status == "open" for row in made.rows)
    if made.plan is None and cut:
        raise KeyboardInterrupt if stopping.received() else TimeoutError
    print_scaling(made, flags["output_format"])
    proofs = [plan.certificate for plan in made.plans.values()]
    if cut or any(proof is not None and proof.status == "interrupted" for proof in proofs):
        print(f"planner: {command.what_ended()}: the table says which sizes were planned", file=sys.stderr)
    plan = made.require()
    if output is not None:
        write(made, output)
        what = f"plan of {plan.cluster.gpus:,} devices" if output.suffix == ".json" else "table"
        print(f"{what} written to {output}", file=sys.stderr)


def checked_output(path: Path | None) -> Path | None:
    """A file that a table of counts can be written to, by its suffix. Raises InputError or MissingPartError."""
    if path is None:
        return None
    if path.suffix not in SUFFIXES:
        why = "the suffix says what is written: .json the chosen plan, .csv and .parquet the table"
        raise input_error(
            "PLN128", f"-o {path}: {path.suffix or 'no suffix'} is not one for several counts", why, "-o plan.json"
        )
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        fix = "pip install 'planner[parquet]', or write .csv"
        raise MissingPartError(Problem("PLN555", "pyarrow is not installed", f"pandas writes {path.name} with it", fix))
    return path


def write(made: Scaling, path: Path) -> None:
    """The chosen plan, or the table."""
    from planner import planfile

    if path.suffix == ".json":
        planfile.write(made.require(), path)
    else:
        write_frame(made.frame, path)


def write_frame(frame: pd.DataFrame, path: Path) -> None:
    """A table, as its suffix says."""
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path, index=False)


def print_scaling(made: Scaling, output_format: str) -> None:
    """The table in one of the formats."""
    if output_format == "json":
        common.write_result(common.to_json(made.to_data()))
    elif output_format == "yaml":
        common.write_result(common.to_yaml(made.to_data()))
    elif output_format == "csv":
        common.write_result(made.frame.to_csv(index=False))
    elif output_format == "markdown":
        from planner.report import frames

        common.write_result(frames.markdown(made.frame))
    else:
        from planner.report import scaling, terminal

        scaling.print_scaling(made, terminal.console())
