"""Runs that stalled are told by measured times alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner.validation import metrics, predict
from planner.validation.stalled import STALLED, Measured, stalled
from tests.validation.runs import row, write


def run(name: str, devices: int, seconds: float, micro_batch: int = 1, alike: str = "tp1 pp2") -> Measured:
    return Measured(name, alike, devices, micro_batch, seconds)


def test_longer_than_on_fewer_devices() -> None:
    runs = [run("a", 8, 4.0), run("b", 16, 12.1), run("c", 32, 12.0)]
    assert stalled(runs, 3.0, 100.0) == {"b"}  # c takes three times a, not more


def test_more_device_time_than_on_more_devices() -> None:
    runs = [run("a", 8, 20.1), run("b", 64, 1.25), run("c", 16, 10.0)]
    assert stalled(runs, 3.0, 2.0) == {"a"}  # 161 device seconds against 80; c's 160 are twice, not more
    assert stalled([run("a", 8, 20.1), run("b", 64, 1.25, micro_batch=2)], 3.0, 2.0) == set()


@pytest.mark.parametrize(("micro_batch", "found"), [(1, True), (2, True), (4, False)])
def test_micro_batches_are_compared_within_a_factor_of_two(micro_batch: int, found: bool) -> None:
    runs = [run("good", 8, 1.0, micro_batch=1), run("bad", 8, 9.0, micro_batch=micro_batch)]
    assert ("bad" in stalled(runs, 3.0, 2.0)) is found


def test_only_like_runs_are_compared() -> None:
    assert stalled([run("a", 8, 1.0), run("b", 8, 9.0, alike="tp8 pp1")], 3.0, 2.0) == set()


def table(tmp_path: Path) -> str:
    """Three healthy runs, one that stalled, and one whose layout is slow."""
    rows = [
        row(row_id="1", gpus=16, dp=8, iteration_time_s=4.0),
        row(row_id="2", gpus=32, dp=16, iteration_time_s=2.1),
        row(row_id="3", gpus=16, dp=8, micro_batch=2, iteration_time_s=3.9),
        row(row_id="4", gpus=32, dp=16, micro_batch=2, shard_stage=0, iteration_time_s=12.0),
        row(row_id="5", gpus=32, tp=8, dp=4, iteration_time_s=30.0),
    ]
    return write(tmp_path / "runs.csv", rows)


def test_rows_of_a_table(tmp_path: Path) -> None:
    predicted = predict.predict_file(table(tmp_path))
    assert [r.row_id for r in predicted.rows if r.excluded.startswith(STALLED)] == ["4"]
    errors = metrics.time_errors(predicted.rows)
    assert errors.rows == 4
    assert list(errors.excluded.values()) == [1]


def test_the_rule_does_not_look_at_the_prediction(tmp_path: Path) -> None:
    own = tmp_path / "map.yaml"
    own.write_text("profiles: [{when: {}, profile: rtx4090}]\n", encoding="utf-8")
    slower = predict.predict_file(table(tmp_path), str(own))
    assert [r.row_id for r in slower.rows if r.excluded] == ["4"]


def test_a_users_map_moves_or_lifts_the_rule(tmp_path: Path) -> None:
    own = tmp_path / "map.yaml"
    own.write_text("stalled: {slower: 1000, dearer: 1000}\n", encoding="utf-8")
    assert not any(r.excluded for r in predict.predict_file(table(tmp_path), str(own)).rows)
