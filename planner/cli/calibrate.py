"""`planner calibrate`: fit a profile's few constants to measured runs, and write a profile that extends it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli import common

if TYPE_CHECKING:
    from planner.specs.hardware import HardwareProfile
    from planner.validation.calibrate import EngineFit


@common.guarded
def calibrate(
    runs: Annotated[str, typer.Argument(help="A table of measured runs (CSV), or what run --measure wrote; one is enough.")],
    profile: Annotated[str, typer.Option("--profile", help="The hardware profile they ran on: a file or a shipped name.")],
    output: Annotated[Path | None, typer.Option("-o", "--out", help="Write the calibrated profile here (YAML).")] = None,
    engine: Annotated[str | None, typer.Option("--engine", help="Only runs of this engine.")] = None,
    profile_map: Annotated[
        str | None, typer.Option("--profile-map", help="Rules that choose engine accountings, before the shipped ones.")
    ] = None,
    output_format: Annotated[str, typer.Option("--format", help="table or json.")] = "table",
) -> None:
    """Fit the named constants of a profile to measured runs, with priors and bounds; errors before, after, and left out."""
    from planner.specs import files
    from planner.validation import calibrate as fitting

    common.checked_format(output_format, ("table", "json"))
    common.writable(output)
    base, document = files.load_hardware(profile)
    common.distinct(output, runs, profile_map, document.path)
    _warn_of_repeats(base, runs)
    fits = fitting.calibrate(runs, profile, profile_map, engine)
    if output is not None:
        reference = profile if not Path(profile).is_file() else str(Path(profile).resolve())
        data = fitting.profile_document(reference, output.stem, fits, Path(runs).name)
        part = output.with_name(output.name + ".part")
        part.write_text(common.to_yaml(data), encoding="utf-8")
        files.load_hardware(str(part))
        part.replace(output)
    if output_format == "json":
        common.write_result(common.to_json({"profile": base.name, "engines": {f.engine: _as_dict(f) for f in fits}}))
    else:
        _print(fits, base.name)
    if output is None:
        print("nothing written: give -o FILE for a profile with these constants", file=sys.stderr)


def _warn_of_repeats(base: HardwareProfile, runs: str) -> None:
    """Constants that already come from the same table would count its runs twice."""
    name = Path(runs).name
    if any(name in f.source for c in base.engines.values() for f in c.constants.values()):
        print(f"{base.name} was already calibrated on {name}: calibrate the profile that it extends instead", file=sys.stderr)


def _mape(errors: Any) -> float | None:
    import numpy as np

    return float(np.mean(np.abs(errors))) if len(errors) else None


def _as_dict(fit: EngineFit) -> dict[str, Any]:
    constants = {m.name: {"before": m.before, "after": m.after, "weight": m.weight} for m in (*fit.constants, *fit.memory)}
    return {
        "rows": fit.rows, "time_mape_before": _mape(fit.before), "time_mape_after": _mape(fit.after),
        "time_mape_left_out": _mape(fit.left_out), "memory_rows": fit.memory_rows,
        "memory_mape_before": _mape(fit.memory_before), "memory_mape_after": _mape(fit.memory_after),
        "refused_lines": list(fit.refused), "constants": constants,
    }  # fmt: skip


def _print(fits: list[EngineFit], profile: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from planner.specs.calibration import CONSTANTS

    out = Console(highlight=False)
    for fit in fits:
        errors = [f"{name} {value:.1%}" for name, value in (
            ("before", _mape(fit.before)), ("after", _mape(fit.after)), ("left out", _mape(fit.left_out))
        ) if value is not None]  # fmt: skip
        out.print(f"[bold]{fit.engine} on {profile}[/bold]: {fit.rows} timed runs, mean error " + ", ".join(errors))
        if fit.memory_rows:
            before, after = _mape(fit.memory_before), _mape(fit.memory_after)
            out.print(f"  memory: {fit.memory_rows} runs, mean error before {before:.1%}, after {after:.1%}")
        if fit.refused:
            lines = ", ".join(fit.refused)
            out.print(f"  refused as sick (over twice off the others): line {lines}")
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("constant", "before", "after", "weight", "what it scales"):
            table.add_column(name, justify="left" if name in ("constant", "what it scales") else "right")
        for m in (*fit.constants, *fit.memory):
            if m.weight >= 0.02:
                table.add_row(m.name, f"{m.before:.3g}", f"{m.after:.3g}", f"{m.weight:.2f}", CONSTANTS[m.name].meaning)
        out.print(table)
