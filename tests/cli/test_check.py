"""`planner check` on configurations: findings with places, in every format, read back by the formats' own parsers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import planner
from junitparser import Error, Failure, JUnitXml

GOOD = """\
model: llama3-8b
hardware: h100-sxm
nodes: 1
job: {seq_len: 8192, global_batch: 64}
layout:
  tp: 2
  dp: 4
  zero: 1
  sequence_parallel: true
  stages:
    - {layers: 32, recompute: full}
"""


def configuration(tmp_path: Path, *changes: tuple[str, str]) -> Path:
    text = GOOD
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return path


def findings(path: Path, *words: str):
    result = planner("check", path.name, *words, cwd=path.parent)
    assert "Traceback" not in result.stderr
    return result


def test_a_feasible_configuration(tmp_path):
    result = findings(configuration(tmp_path))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[0].startswith("job.yaml: feasible, ")


@pytest.mark.parametrize(("old", "new", "place", "code"), [
    ("tp: 2\n  dp: 4", "tp: 3\n  dp: 4", "job.yaml:6:3", "PLN201"),
    ("global_batch: 64", "global_batch: 63", "job.yaml:4:22", "PLN205"),
    ("sequence_parallel: true", "sequence_parallel: false", "job.yaml:6:3", "PLN513"),
    ("zero: 1", "zero: 0\n  cp: 8", "job.yaml:9:3", "PLN514"),
    ("layers: 32", "layers: 31", "job.yaml:10:3", "PLN222"),
    ("recompute: full", "recompute: none", "job.yaml:11:7", "PLN301"),
])  # fmt: skip
def test_findings_point_to_their_cause(tmp_path, old, new, place, code):
    changes = [(old, new)]
    if code == "PLN301":
        changes.append(("dp: 4\n", "dp: 4\n  micro_batch: 16\n"))
        place = "job.yaml:12:7"
    result = findings(configuration(tmp_path, *changes))
    assert result.returncode == 1
    assert any(line.startswith(f"{place}: {code} ") for line in result.stdout.splitlines()), result.stdout


def test_memory_findings_have_numbers_and_a_fix(tmp_path):
    text = findings(
        configuration(tmp_path, ("recompute: full", "recompute: none"), ("zero: 1", "zero: 1\n  micro_batch: 16"))
    ).stdout
    assert "stage 0 needs" in text
    assert "why: activations" in text
    assert "fix: free" in text


def test_json(tmp_path):
    result = findings(configuration(tmp_path, ("tp: 2\n", "tp: 3\n")), "--output-format", "json")
    data = json.loads(result.stdout)
    assert result.returncode == 1
    assert not data["feasible"]
    assert data["files"][0]["findings"][0]["location"] == {"file": "job.yaml", "line": 6, "col": 3}


def test_github_annotations_are_escaped(tmp_path):
    path = configuration(tmp_path, ("recompute: full", "recompute: none"), ("zero: 1", "zero: 1\n  micro_batch: 16"))
    result = findings(path, "--output-format", "github")
    (line,) = result.stdout.splitlines()
    assert line.startswith("::error title=PLN301,file=job.yaml,line=12,col=7::stage 0 needs")
    assert "%0Awhy: " in line


def test_junit_is_read_by_a_real_parser(tmp_path):
    path = configuration(tmp_path, ("recompute: full", "recompute: none"), ("zero: 1", "zero: 1\n  micro_batch: 16"))
    out = tmp_path / "junit.xml"
    result = findings(path, "--output-format", "junit", "--output-file", str(out))
    assert result.returncode == 1
    (suite,) = list(JUnitXml.fromfile(str(out)))
    failed = [case.name for case in suite if any(isinstance(r, (Failure, Error)) for r in case.result)]
    assert (suite.name, failed) == ("job.yaml", ["PLN301"])
    assert suite.tests > 20


def test_several_files_and_an_unreadable_one(tmp_path):
    good = configuration(tmp_path)
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: llama3-8b\nlayout: [1\n")
    result = planner("check", good.name, broken.name, "gone.yaml", cwd=tmp_path)
    assert result.returncode == 2
    assert "job.yaml: feasible" in result.stdout
    assert "broken.yaml:3:1: PLN102" in result.stderr
    assert "PLN101 gone.yaml does not exist" in result.stderr


def test_a_configuration_of_unknown_things(tmp_path):
    for old, new, place, code in (
        ("model: llama3-8b", "model: llama9", "1:1", "PLN110"),
        ("hardware: h100-sxm", "hardware: h900", "2:1", "PLN110"),
        ("tp: 2", "tpp: 2", "6:3", "PLN104"),
        ("seq_len: 8192", "seq_len: -1", "4:7", "PLN107"),
    ):
        result = findings(configuration(tmp_path, (old, new)))
        assert result.returncode == 2
        assert result.stderr.startswith(f"job.yaml:{place}: {code} "), result.stderr


def test_another_kind_of_file_is_named(tmp_path):
    (tmp_path / "model.yaml").write_text("name: x\nhidden: 8\nvocab: 8\nlayers: []\n")
    result = planner("check", "model.yaml", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("model.yaml:1:1: PLN117 check reads plans and configurations, this is a model")
    as_json = planner("check", "model.yaml", "--output-format", "json", cwd=tmp_path)
    assert json.loads(as_json.stdout)["files"][0]["kind"] == "unreadable"
    assert as_json.returncode == 2


def test_a_missing_profile_is_reported_where_it_is_named(tmp_path):
    result = findings(configuration(tmp_path, ("hardware: h100-sxm", "hardware: ./mine.yaml")))
    assert result.returncode == 2
    assert result.stderr.startswith("job.yaml:2:1: PLN101 "), result.stderr


def test_profiles_that_extend_each_other(tmp_path):
    (tmp_path / "a.yaml").write_text("name: a\nextends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("name: b\nextends: a.yaml\n")
    result = planner("hardware", "validate", "a.yaml", cwd=tmp_path)
    assert result.returncode == 2
    assert "a.yaml extends b.yaml extends a.yaml" in result.stderr
