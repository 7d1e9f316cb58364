"""Plan files over versions: fields that a minor version added do not spoil older files, edits are still noticed."""

from __future__ import annotations

import hashlib
import json

import pytest

import planner
from planner import planfile
from planner.errors import InputError

ADDED = {
    "estimate": ("mfu_causal", "hfu", "flops_convention"),
    "certificate": ("lowest_memory",),
    "": ("objective", "count_choice", "economy", "compute_optimal"),
}
"""Fields that version 2.1 added, by the object that holds them."""


@pytest.fixture(scope="module")
def data() -> dict:
    plan = planner.plan("llama3-8b", "h100-sxm", nodes=1, seq_len=4096, global_batch=64, pin={"tp": 1}, alternatives=1)
    return json.loads(plan.to_json())


def old(data: dict, **changes) -> dict:
    """The plan as version 2.0 wrote it."""
    copy = json.loads(json.dumps(data)) | changes | {"version": "2.0"}
    for place, names in ADDED.items():
        for name in names:
            del (copy[place] if place else copy)[name]
    del copy["digest"]
    hashed = {**copy, "certificate": {k: v for k, v in copy["certificate"].items() if k != "seconds"}}
    copy["digest"] = "sha256:" + hashlib.sha256(planfile.canonical(hashed).encode()).hexdigest()
    return copy


def written(tmp_path, data: dict):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    return path


def test_round_trip(data, tmp_path):
    plan = planner.load_plan(str(written(tmp_path, data)))
    assert json.loads(plan.to_json()) == data


def test_round_trip_with_a_budget(tmp_path):
    sizes = {"nodes": [1, 2], "seq_len": 4096, "global_batch": 64, "pin": {"tp": 1}, "alternatives": 1}
    plan = planner.scale("llama3-8b", "h100-sxm", **sizes, objective="cost", tokens="1T", price=2, pue=1.1).require()
    path = tmp_path / "plan.json"
    planfile.write(plan, path)
    assert planner.load_plan(str(path)).to_json() == plan.to_json()
    assert plan.count_choice.compared == [8, 16]


def test_an_older_minor_version_loads(data, tmp_path):
    plan = planner.load_plan(str(written(tmp_path, old(data))))
    assert plan.version == "2.0"
    assert plan.estimate.hfu is None
    assert plan.economy is None
    assert plan.objective == "throughput"


def test_an_edit_of_an_older_file_is_noticed(data, tmp_path):
    changed = {**old(data), "engine": "megatron"}
    with pytest.raises(InputError, match="PLN116"):
        planner.load_plan(str(written(tmp_path, changed)))


@pytest.mark.parametrize("version", ["1.4", "3.0", ""])
def test_another_major_version_is_refused(data, tmp_path, version):
    with pytest.raises(InputError, match="PLN115"):
        planner.load_plan(str(written(tmp_path, {**data, "version": version})))
