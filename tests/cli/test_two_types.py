"""Two device types on the command line: --hardware NAME:NODES, twice."""

from __future__ import annotations

import json

import pytest
from command import one_line_error, planner

JOB = ["llama3-8b", "--seq-len", "2048", "--global-batch", "48"]
TWO = ["--hardware", "h100-sxm:1", "--hardware", "a100-40gb-sxm:1"]


def test_a_plan_is_made_explained_and_verified(tmp_path):
    path = str(tmp_path / "plan.json")
    made = planner("plan", *JOB, *TWO, "--top-k", "1", "-o", path)
    assert made.returncode == 0, made.stderr
    assert "8 x NVIDIA H100 80GB HBM3 + 8 x NVIDIA A100-SXM4-40GB" in made.stdout
    assert "of each rank on h100-sxm: " in made.stdout
    assert "of each rank on a100-40gb-sxm: " in made.stdout
    assert planner("explain", path, "--verify").returncode == 0
    told = planner("explain", path).stdout
    assert "h100-sxm alone (8)" in told
    assert "every device a a100-40gb-sxm (16)" in told
    checked = planner("check", path)
    assert checked.returncode == 0, checked.stdout
    plan = json.loads(planner("estimate", path, "--format", "json").stdout)
    assert [t["hardware"] for t in plan["cluster"]["types"]] == ["h100-sxm", "a100-40gb-sxm"]


def test_the_space_says_what_is_searched():
    view = json.loads(planner("plan", *JOB, *TWO, "--space", "--format", "json").stdout)
    axes = {axis["name"]: axis for axis in view["axes"]}
    assert axes["type_order"]["values"] == ["as-named", "reversed"]
    assert view["rules"]["device types: whole stages"] > 0
    one = json.loads(planner("plan", *JOB, "--hardware", "h100-sxm", "--nodes", "2", "--space", "--format", "json").stdout)
    assert "type_order" not in {axis["name"] for axis in one["axes"]}


@pytest.mark.parametrize(("code", "words"), [
    ("PLN150", ["--hardware", "h100-sxm:2"]),
    ("PLN151", [*TWO, "--nodes", "2"]),
    ("PLN152", ["--hardware", "h100-sxm:2", "--hw", "h100-sxm:1"]),
    ("PLN154", [*TWO, "--pareto", "memory"]),
    ("PLN157", ["--hardware", "h100-sxm:2", "--hardware", "a100-40gb-sxm"]),
    ("PLN578", [*TWO, "--engine", "nanotron"]),
])  # fmt: skip
def test_wrong_types_are_one_clear_error(code, words):
    one_line_error(planner("plan", *JOB, *words), code)
