"""The described space is the searched one, and its counts are exact."""

from __future__ import annotations

import json

import numpy as np
import pytest
from command import one_line_error, planner
from machines import llama, profile
from search.brute import mixes, splits
from search.instances import instance

from planner.planning.request import Request
from planner.planning.spaceview import _inside, explicit_layouts, space_view
from planner.report.space import many
from planner.search.solve import search
from planner.specs.job import Job

GPT3 = ["plan", "gpt3-175b", "--hw", "a100-80gb-sxm", "--gpus", "1024", "--seq-len", "2048", "--global-batch", "1536",
        "--engine", "megatron", "--space"]  # fmt: skip


@pytest.mark.parametrize("modes", [(0,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize(("layers", "pp", "v"), [(6, 1, 1), (6, 3, 1), (5, 4, 1), (8, 2, 2), (12, 3, 2)])
def test_layouts_of_a_row_are_counted(layers, pp, v, modes):
    expected = sum(
        int(np.prod([len(mixes(n, modes, v > 1)) for n in split]))
        for split in splits(layers, pp, v)
        if all(n % v == 0 for n in split)
    )
    assert _inside(layers, pp, v, len(modes)) == expected


def test_the_described_space_is_the_searched_one():
    pins = {"tp": [1, 2], "micro_batch": [1]}
    request = Request(llama(4), profile(memory="30 GiB"), Job(seq_len=512, global_batch=8), gpus=8, pins=pins, forbid=["full"])
    view = space_view(request)
    from planner.planning.make import make_plan

    counted = make_plan(request).certificate.space
    assert (view.enumerated, view.enumerated - view.kept) == (counted.enumerated, counted.by_rule)
    assert dict(view.rules) == counted.rules
    axes = {axis.name: axis for axis in view.axes}
    assert axes["tp"].values == (1, 2)
    assert axes["tp"].without == (4, 8)
    assert axes["tp"].restricted == "--pin tp=1,2"
    assert axes["recompute"].without == ("full",)
    assert all(axis.why for axis in view.axes)


def test_rows_of_every_kind_are_counted():
    task, engine, space = instance(5)
    from planner.search.space import enumerate_rows

    rows = enumerate_rows(task, engine, space)
    assert explicit_layouts(rows.layouts, task.model, space.modes) >= len(rows.layouts)
    assert search(task, engine, space).counts.by_rule == rows.by_rule


def test_command():
    table = planner(*GPT3, "--pin", "tp=8")
    assert table.returncode == 0, table.stderr
    assert "--pin tp=8, which takes away 1 2 4" in " ".join(table.stdout.split())
    data = json.loads(planner(*GPT3, "--format", "json").stdout)
    assert data["enumerated"] == data["by_rule"] + data["kept"]
    assert data["by_rule"] == sum(data["rules"].values())
    assert (data["enumerated"], data["kept"]) == (141120, 12873)  # as the README says
    assert many(int(data["layouts"])) == "1.1e67"


@pytest.mark.parametrize("words", [["--pareto", "memory"], ["-o", "plan.json"], ["--format", "csv"], ["--gpus", "8,16"]])
def test_bad_flags(words):
    one_line_error(planner(*GPT3, *words), "PLN1")
