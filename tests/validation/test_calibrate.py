"""Calibration finds constants that made the runs, keeps its priors where the runs say nothing, and refuses sick runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planner.specs import files
from planner.validation import calibrate, predict, profilemap
from planner.validation.constants import TIME_CONSTANTS, step_seconds, to_values, to_vector
from tests.command import planner
from tests.validation.runs import rows_of_layouts, write

TRUE = {"compute": 1.2, "tp": 1.6, "dp": 1.3}
PROFILE = "h100-sxm"


def made_runs(tmp_path: Path, noise: float = 0.0, **true: float) -> str:
    """A table whose times the cost model made with other constants."""
    rows = rows_of_layouts()
    table = predict.load_table(write(tmp_path / "blank.csv", rows), profilemap.load_map(None), profile=PROFILE)
    rng = np.random.default_rng(0)
    for batch in table.batches:
        prior = {n: batch.task.calibration.value(n) for n in TIME_CONSTANTS}
        seconds = step_seconds(batch, prior | {k: prior[k] * v for k, v in true.items()})
        for entry, value in zip(batch.entries, seconds, strict=True):
            rows[int(entry.row["row_id"])]["iteration_time_s"] = float(value * np.exp(rng.normal(0, noise)))
    return write(tmp_path / "runs.csv", rows)


def test_constants_that_made_the_runs_are_found(tmp_path: Path) -> None:
    (fit,) = calibrate.calibrate(made_runs(tmp_path, **TRUE), PROFILE)
    assert np.abs(fit.before).mean() > 0.1
    assert np.abs(fit.after).mean() < 0.02
    moved = {m.name: m.after / m.before for m in fit.constants}
    assert moved["compute"] == pytest.approx(1.2, rel=0.04)
    assert moved["tp"] > 1.15
    assert fit.left_out.size == 10
    assert np.abs(fit.left_out).mean() < 0.05


def test_one_run_is_enough_to_help(tmp_path: Path) -> None:
    table = Path(made_runs(tmp_path, compute=1.25))
    head, first, *_ = table.read_text(encoding="utf-8").splitlines()
    one = tmp_path / "one.csv"
    one.write_text(f"{head}\n{first}\n", encoding="utf-8")
    out = tmp_path / "mine.yaml"
    assert planner("calibrate", str(one), "--profile", PROFILE, "-o", str(out)).returncode == 0
    own = tmp_path / "map.yaml"
    own.write_text(f"profiles:\n  - {{when: {{}}, profile: {out}}}\n", encoding="utf-8")
    before = predict.predict_file(str(table)).rows[1:]
    after = predict.predict_file(str(table), str(own)).rows[1:]
    errors = [np.mean([abs(r.time_error or 0.0) for r in rows]) for rows in (before, after)]
    assert errors[1] < 0.5 * errors[0]


def test_what_runs_do_not_tell_stays_at_its_prior(tmp_path: Path) -> None:
    (fit,) = calibrate.calibrate(made_runs(tmp_path, **TRUE), PROFILE)
    ep = next(m for m in fit.constants if m.name == "ep")
    assert (ep.after, ep.weight) == (ep.before, 0.0)


def test_a_sick_run_is_refused_and_named(tmp_path: Path) -> None:
    table = Path(made_runs(tmp_path, noise=0.01))
    lines = table.read_text(encoding="utf-8").splitlines()
    column = lines[0].split(",").index("iteration_time_s")
    cells = lines[4].split(",")
    cells[column] = str(float(cells[column]) * 5)
    lines[4] = ",".join(cells)
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (fit,) = calibrate.calibrate(str(table), PROFILE)
    assert fit.refused == ("5",)
    assert fit.rows == 9
    assert np.abs(fit.after).mean() < 0.02


def test_memory_constants(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = rows_of_layouts()
    for r, p in zip(rows, predict.predict_file(write(tmp_path / "blank.csv", rows)).rows, strict=True):
        r["peak_memory_gib"], r["memory_kind"] = p.predicted_memory * 1.12, "peak reserved, GiB"
    (fit,) = calibrate.calibrate(write(tmp_path / "runs.csv", rows), PROFILE)
    assert fit.memory_rows == 10
    assert np.abs(fit.memory_after).mean() < 0.5 * np.abs(fit.memory_before).mean()


def test_constants_stay_inside_their_bounds() -> None:
    extreme = to_values(to_vector(dict.fromkeys(TIME_CONSTANTS, 1.0) | {"scale": 0.5}) + 10.0)
    from planner.specs.calibration import CONSTANTS

    assert all(CONSTANTS[n].low <= v <= CONSTANTS[n].high for n, v in extreme.items())


def test_the_written_profile_extends_and_reproduces(tmp_path: Path) -> None:
    table, out = made_runs(tmp_path, **TRUE), tmp_path / "mine.yaml"
    result = planner("calibrate", table, "--profile", PROFILE, "-o", str(out), "--format", "json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)["engines"]["megatron"]
    assert report["time_mape_after"] < report["time_mape_before"]
    hardware, _ = files.load_hardware(str(out))
    calibration = hardware.calibration("megatron")
    assert calibration.constants["compute"].provenance == "fitted"
    assert "runs.csv" in calibration.constants["compute"].source
    assert calibration.time_error is not None
    check = planner("validate", table, "--profile-map", str(_map(tmp_path, out)), "--format", "json")
    assert json.loads(check.stdout)["overall"]["time_mape"] == pytest.approx(report["time_mape_after"], abs=0.002)


def _map(tmp_path: Path, profile: Path) -> Path:
    own = tmp_path / "map.yaml"
    own.write_text(f"profiles:\n  - {{when: {{}}, profile: {profile}}}\n", encoding="utf-8")
    return own


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["missing.csv", "--profile", PROFILE], "PLN101"),
        (["RUNS", "--profile", "h100"], "PLN"),
        (["RUNS", "--profile", PROFILE, "--engine", "nanotron"], "its usable runs are of megatron"),
        (["RUNS", "--profile", PROFILE, "--engine", "megatrn"], "PLN501"),
        (["RUNS", "--profile", "a100-80gb-sxm"], "another device than the profile's"),
        (["RUNS", "--profile", PROFILE, "-o", "RUNS"], "PLN114"),
    ],
)
def test_bad_input_is_one_message(tmp_path: Path, arguments: list[str], code: str) -> None:
    table = write(tmp_path / "runs.csv", rows_of_layouts())
    before = Path(table).read_text(encoding="utf-8")
    result = planner("calibrate", *[table if a == "RUNS" else a for a in arguments])
    assert result.returncode == 2
    assert Path(table).read_text(encoding="utf-8") == before
    assert code in result.stderr
    assert "Traceback" not in result.stderr


def test_calibrating_twice_on_the_same_runs_is_said(tmp_path: Path) -> None:
    table, first, second = made_runs(tmp_path, **TRUE), tmp_path / "mine.yaml", tmp_path / "again.yaml"
    assert planner("calibrate", table, "--profile", PROFILE, "-o", str(first)).returncode == 0
    result = planner("calibrate", table, "--profile", str(first), "-o", str(second))
    assert "was already calibrated on runs.csv" in result.stderr


def test_an_inherited_error_does_not_outlive_its_constants(tmp_path: Path) -> None:
    """Too few rows for an error of their own: none is recorded, though the base had one."""
    table = Path(made_runs(tmp_path, **TRUE))
    assert files.load_hardware(PROFILE)[0].calibration("megatron").time_error is not None
    one, out = tmp_path / "one.csv", tmp_path / "mine.yaml"
    one.write_text("\n".join(table.read_text(encoding="utf-8").splitlines()[:2]) + "\n", encoding="utf-8")
    assert planner("calibrate", str(one), "--profile", PROFILE, "-o", str(out)).returncode == 0
    assert files.load_hardware(str(out))[0].calibration("megatron").time_error is None
