"""`planner validate`: every format, its options, and how it refuses."""

from __future__ import annotations

import csv
import io
import json
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from predictions import predicted, prediction, timed
from typer.testing import CliRunner

from planner.cli.main import app

ROWS = [
    *timed((1.1, 1.0), (1.9, 2.0), (3.3, 3.0), source="Sweep [A] <b>", terms={"compute": 0.8}),
    prediction(row_id="big", layout="tp64", measured_time=20.0, predicted_time=10.0, excluded="tp over nodes on A100"),
    prediction(row_id="heavy", measured_memory=50.0, source="other & co"),
    prediction(row_id="oom", outcome="oom", measured_time=None, fits=False, source="other & co"),
    prediction(row_id="weak", outcome="failed", measured_time=None, source="other & co"),
]


@pytest.fixture
def run(monkeypatch):
    """Runs the command on ROWS; `calls` are the arguments that predict_file got."""
    calls = []

    def command(*words, result=None):
        def predict_file(path, profile_map, quality):
            calls.append((path, profile_map, quality))
            return predicted(*ROWS, no_profile_for_GB300=65) if result is None else result

        monkeypatch.setitem(sys.modules, "planner.validation.predict", SimpleNamespace(predict_file=predict_file))
        return CliRunner().invoke(app, ["validate", "runs.csv", *map(str, words)])

    command.calls = calls
    return command


@pytest.mark.parametrize("columns", ["80", "140"])
def test_table(run, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    result = run()
    assert result.exit_code == 0, result.stderr
    words = " ".join(result.stdout.split())
    for expected in ("Sweep [A] <b>", "all rows", "mean of groups", "tp over nodes on A100", "65 no profile for GB300",
                     "1 runs failed for an unknown reason", "+10.0 %", "-20.0 %"):  # fmt: skip
        assert expected in words
    assert "…" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= int(columns)
    assert run.calls == [("runs.csv", None, frozenset({"A", "B"}))]


def test_json_has_what_is_promised(run):
    result = run("--format", "json", "--quality", "a, C", "--profile-map", "map.yaml")
    data = json.loads(result.stdout, parse_constant=pytest.fail)
    assert data.keys() == {"overall", "groups", "skipped"}
    assert {
        "rows", "time_mape", "time_median", "time_bias", "memory_rows", "memory_mape", "memory_worst_under",
        "ranking_sweeps", "regret_mean", "regret_median", "oom_accuracy", "time_p90", "time_within_10", "time_within_20",
        "time_excluded", "excluded", "time_mape_all", "interval_coverage", "memory_worst_over", "memory_bias",
        "spearman_mean", "feasibility", "weak_failed", "false_fit_share", "regret_top3_mean", "ranking_sweeps5",
        "regret5_mean", "regret5_median",
    } <= data["groups"]["other & co"].keys()  # fmt: skip
    assert {"macro_time_mape", "macro_time_bias", "macro_regret_median"} <= data["overall"].keys()
    assert data["skipped"] == {"no profile for GB300": 65}
    assert run.calls == [("runs.csv", "map.yaml", frozenset({"A", "C"}))]


def test_json_rows(run):
    data = json.loads(run("--format", "json", "--rows").stdout)
    assert [row["row_id"] for row in data["rows"]] == [row.row_id for row in ROWS]
    assert data["rows"][0]["time_error"] == pytest.approx(0.1)
    assert data["rows"][5]["time_error"] is None


def test_csv_of_groups_and_of_rows(run):
    result = run("--format", "csv", "--by", "engine")
    groups = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [line["engine"] for line in groups] == ["megatron", "all rows", "mean of groups"]
    assert groups[0]["feasibility_fits_ran"] == "5"
    assert "65 no profile for GB300" in result.stderr
    rows = list(csv.DictReader(io.StringIO(run("--format", "csv", "--rows").stdout)))
    assert len(rows) == len(ROWS)
    assert (rows[0]["fits"], rows[0]["time_low"], rows[0]["term_compute"]) == ("true", "0.9", "0.8")
    assert (rows[3]["term_compute"], rows[5]["time_error"]) == ("", "")


def test_table_of_all_rows(run):
    assert all(row.row_id in run("--rows").stdout for row in ROWS)


class _Page(HTMLParser):
    """Checks that every element is closed in order, and collects tags and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.text = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_html_is_one_page_without_assets(run, tmp_path):
    path = tmp_path / "report.html"
    result = run("--format", "html", "-o", path)
    assert result.exit_code == 0, result.stderr
    assert "mean of groups" in result.stdout
    text = path.read_text(encoding="utf-8")
    page = _Page(text)
    assert page.open == []
    assert "http:" not in text
    assert "https:" not in text
    assert not [a for _, attrs in page.seen for a in attrs if a in ("src", "href")]
    tags = [tag for tag, _ in page.seen]
    assert tags.count("svg") == 2
    assert tags.count("circle") == 5
    assert "b" not in tags  # the name of a source is text
    assert {"Sweep [A] <b>", "other & co", "65 no profile for GB300"} <= {t.strip() for t in page.text}


def test_html_without_any_timed_row(run):
    result = run("--format", "html", result=predicted(ROWS[5]))
    assert result.exit_code == 0, result.stderr
    assert _Page(result.stdout).open == []


@pytest.mark.parametrize("output_format", ["table", "json", "csv"])
def test_output_file_holds_the_result(run, tmp_path, output_format):
    path = tmp_path / "out"
    result = run("--format", output_format, "-o", path)
    assert result.exit_code == 0, result.stderr
    assert path.read_text(encoding="utf-8") == run("--format", output_format).stdout
    assert "mean of groups" in result.stdout


@pytest.mark.parametrize(("words", "code", "names"), [
    (["--by", "colour"], "PLN107", "source, hardware, engine, model"),
    (["--format", "pdf"], "PLN107", "table, json, html, csv"),
    (["--quality", "A,Z"], "PLN107", "'Z' is not a quality"),
    (["--quality", ""], "PLN107", "is not a quality"),
    (["-o", "no/such/folder/x"], "PLN113", "not a writable folder"),
])  # fmt: skip
def test_wrong_options_are_refused_before_any_work(run, words, code, names):
    result = run(*words)
    assert (result.exit_code, result.stdout, run.calls) == (2, "", [])
    assert result.stderr.startswith(code)
    assert names in result.stderr


def test_nothing_predicted_says_why(run):
    result = run(result=predicted(no_profile_for_GB300=65, no_time=2))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("PLN145 runs.csv: no row could be predicted")
    assert "67 rows skipped: 65 no profile for GB300; 2 no time" in result.stderr
    assert run(result=predicted()).exit_code == 2
