"""Figures of validation against numbers worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
from predictions import predicted, prediction, timed

from planner.validation import metrics
from planner.validation.metrics import feasibility, memory_errors, ranking, summarize, sweeps, time_errors, worst_rows


def test_errors_of_time():
    # Signed errors +10 %, -20 %, 0, +50 %.
    errors = time_errors(timed((1.1, 1.0), (1.6, 2.0), (4.0, 4.0), (1.5, 1.0), time_interval=(1.0, 2.0)))
    assert errors.rows == 4
    assert errors.mape == pytest.approx(0.20)
    assert errors.median == pytest.approx(0.15)
    assert errors.bias == pytest.approx(0.10)
    assert errors.p90 == pytest.approx(0.2 + 0.7 * 0.3)  # position 0.9 * 3 = 2.7 of 0, .1, .2, .5
    assert (errors.within_10, errors.within_20) == (0.5, 0.75)
    assert errors.interval_coverage == 0.75  # 1.0, 2.0 and 1.0 are inside, ends included; 4.0 is not
    assert errors.excluded == {}
    assert errors.mape_all == errors.mape


def test_within_includes_the_limit():
    # 1.1 / 1.0 - 1 is a little above 0.1 in binary.
    errors = time_errors(timed((1.1, 1.0), (0.8, 1.0), (1.2, 1.0), (1.21, 1.0)))
    assert (errors.within_10, errors.within_20) == (0.25, 0.75)


def test_excluded_rows_leave_time_and_ranking_but_are_reported():
    rows = timed((1.1, 1.0), (1.1, 1.0)) + timed((3.0, 1.0), excluded="tp over nodes")
    assert time_errors(rows).mape == pytest.approx(0.1)
    assert time_errors(rows).mape_all == pytest.approx(2.2 / 3)
    assert time_errors(rows).excluded == {"tp over nodes": 1}
    group = metrics.metrics_of(rows).to_dict()
    assert (group["rows"], group["time_rows"], group["time_excluded"]) == (3, 2, 1)
    assert sweeps(timed((1, 1), (2, 2)) + timed((0.5, 0.5), (0.6, 0.6), (0.7, 0.7), excluded="x")) == []


def test_rows_that_did_not_run_have_no_time_or_memory():
    failed = [prediction(outcome=o, measured_memory=79.0, measured_time=1.0) for o in ("oom", "failed")]
    assert time_errors(failed).rows == 0
    assert memory_errors(failed).rows == 0
    assert time_errors([prediction(measured_time=None), prediction(measured_time=0.0)]).rows == 0


def test_errors_of_memory():
    rows = [prediction(predicted_memory=p, measured_memory=40.0) for p in (36.0, 44.0, 60.0)]
    rows.append(prediction(measured_memory=1.0, memory_excluded="another kind of figure"))
    errors = memory_errors(rows)
    assert errors.rows == 3
    assert errors.mape == pytest.approx((0.1 + 0.1 + 0.5) / 3)
    assert errors.bias == pytest.approx(0.5 / 3)
    assert errors.worst_under == pytest.approx(-0.1)
    assert errors.worst_over == pytest.approx(0.5)
    assert errors.excluded == {"another kind of figure": 1}


def test_worst_is_zero_when_no_row_is_on_that_side():
    over = memory_errors([prediction(predicted_memory=50.0, measured_memory=40.0)])
    under = memory_errors([prediction(predicted_memory=30.0, measured_memory=40.0)])
    assert (over.worst_under, under.worst_over) == (0.0, 0.0)


def test_regret_and_rank_correlation():
    # Predicted order: 0, 1, 2, 3; measured order: 1, 0, 2, 3. The first choice takes 3, the best takes 2.
    (sweep,) = sweeps(timed((1, 3), (2, 2), (3, 4), (4, 5)))
    assert sweep.layouts == 4
    assert sweep.regret == pytest.approx(0.5)
    assert sweep.regret_top3 == 0.0
    assert sweep.spearman == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_layouts_predicted_equally_fast_count_with_their_mean():
    rows = [prediction(layout=name, measured_time=t) for name, t in (("b", 1.0), ("c", 2.0), ("a", 4.0))]
    (sweep,) = sweeps(rows)
    assert sweep.regret == pytest.approx(4.0 / 3.0)  # all are predicted the same: (1 + 2 + 4) / 3 against 1
    assert sweep.spearman is None
    assert ranking(rows).spearman_mean is None
    assert ranking(rows).regret_mean == pytest.approx(4.0 / 3.0)


def test_stalled_runs_are_left_out_and_reported_with_and_without():
    rows = timed((1.0, 1.0), (2.0, 2.0), (3.0, 3.0))
    rows.append(prediction(layout="tp9", predicted_time=0.5, measured_time=8.0, excluded="stalled: over 3 x"))
    result = ranking(rows)
    assert (result.regret_mean, result.regret_mean_with_stalled) == (0.0, 7.0)
    errors = time_errors([*rows, *timed((2.0, 1.0), excluded="another rule")])
    assert errors.mape == 0.0
    assert errors.mape_with_stalled == pytest.approx((0 + 0 + 0 + 7.5 / 8.0) / 4)
    assert errors.mape_all == pytest.approx((7.5 / 8.0 + 1.0) / 5)


def test_repeats_are_averaged_and_are_one_layout():
    twice = timed((1, 1), (2, 2)) + timed((1, 3), (2, 2))
    assert sweeps(twice) == []  # two layouts, four rows
    (sweep,) = sweeps([*twice, prediction(layout="tp9", predicted_time=3.0, measured_time=1.0)])
    assert sweep.layouts == 3
    assert sweep.regret == 1.0  # tp0 takes (1 + 3) / 2, the best takes 1


def test_larger_sweeps_are_counted_apart():
    three = timed((1, 2), (2, 1), (3, 3))
    five = timed((1, 5), (2, 4), (3, 3), (4, 2), (5, 4), global_batch=128)
    result = ranking(three + five)
    assert (result.sweeps, result.sweeps5) == (2, 1)
    assert result.regret_mean == pytest.approx((1.0 + 1.5) / 2)
    assert result.regret_median == pytest.approx(1.25)
    assert (result.regret5_mean, result.regret5_median) == (1.5, 1.5)
    assert result.regret_top3_mean == pytest.approx((0.0 + 0.5) / 2)
    assert result.regret5_top3_mean == pytest.approx(0.5)


def test_feasibility_counts_and_weak_labels():
    rows = [prediction(outcome=o, fits=f) for o, f in
            [("ran", True), ("ran", True), ("ran", False), ("oom", False), ("oom", True),
             ("failed", True), ("failed", False), ("failed", False)]]  # fmt: skip
    result = metrics.metrics_of(rows).to_dict()
    assert result["feasibility"] == {"fits_ran": 2, "fits_failed": 1, "refused_ran": 1, "refused_failed": 1}
    assert result["weak_failed"] == {"fits": 1, "refused": 2}
    assert result["oom_accuracy"] == pytest.approx(3 / 5)
    assert result["false_fit_share"] == pytest.approx(1 / 3)


def test_accuracy_needs_a_source_that_reports_runs_out_of_memory():
    silent = [prediction(source="silent") for _ in range(100)]
    assert feasibility(silent).oom_accuracy is None
    mixed = feasibility([*silent, prediction(outcome="oom", fits=True), prediction(outcome="ran", fits=True)])
    assert (mixed.oom_accuracy, mixed.labelled_rows) == (0.5, 2)
    assert mixed.fits_ran == 101


def test_averages_over_groups_are_not_pooled():
    rows = timed(*[(1.1, 1.0)] * 9, source="large") + timed((1.5, 1.0), source="small")
    rows.append(prediction(source="oom only", outcome="oom", measured_time=None, fits=False))
    data = summarize(predicted(*rows, no_profile=3)).to_dict()
    assert list(data["groups"]) == ["large", "oom only", "small"]
    assert data["overall"]["time_mape"] == pytest.approx(0.14)
    assert data["overall"]["macro_time_mape"] == pytest.approx(0.30)  # groups without a time have no part
    assert data["overall"]["macro_time_bias"] == pytest.approx(0.30)
    assert data["overall"]["macro_regret_median"] == 0.0
    assert data["overall"]["macro_oom_accuracy"] == 1.0
    assert data["skipped"] == {"no profile": 3}


@pytest.mark.parametrize("by", metrics.GROUPINGS)
def test_groups_by_every_field(by):
    rows = [prediction(**{by: "x"}), prediction(**{by: "y"}), prediction(**{by: ""})]
    assert set(summarize(predicted(*rows), by).groups) == {"x", "y", "(not given)"}


def test_unknown_grouping():
    with pytest.raises(ValueError, match="source, hardware"):
        summarize(predicted(), "colour")


def test_nothing_is_defined_without_rows():
    data = summarize(predicted()).to_dict()
    overall = data["overall"]
    counts = {"rows", "time_rows", "time_excluded", "memory_rows", "ranking_sweeps", "ranking_sweeps5", "oom_rows"}
    assert data["groups"] == {}
    assert {overall[name] for name in counts} == {0}
    figures = {k: v for k, v in overall.items() if k not in counts and not isinstance(v, dict)}
    assert set(figures.values()) == {None}
    assert not any(overall["feasibility"].values())


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_json_is_strict(bad):
    rows = [prediction(predicted_time=bad, predicted_memory=bad, measured_memory=1.0, terms={"compute": bad})]
    data = summarize(predicted(*rows, *timed((1, 1), (2, 2)))).to_dict()
    data["rows"] = [metrics.row_dict(row) for row in rows]
    again = json.loads(json.dumps(data, allow_nan=False))
    assert again["groups"]["s"]["time_mape"] is None
    assert again["rows"][0]["predicted_time"] is None
    assert again["rows"][0]["terms"] == {"compute": None}


def test_worst_rows():
    rows = [*timed((1.1, 1.0), (0.4, 1.0), (1.2, 1.0)), prediction(row_id="X", predicted_time=9.0, excluded="rule")]
    assert [r.row_id for r in worst_rows(predicted(*rows), 2)] == ["R1", "R2"]
    assert worst_rows(predicted(*rows), 2, "memory") == []
    heavy = prediction(row_id="M", measured_memory=10.0)
    assert worst_rows(predicted(*rows, heavy), 2, "memory") == [heavy]
