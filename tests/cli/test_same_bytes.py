"""The same inputs give the same bytes of plan file: in any process, under any hash seed, thread count or order of asking."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command import planner
from search.instances import instance, mixed_instance, mixture_instance

import planner as api
from planner.search import solve
from planner.search.space import Rows, enumerate_rows

JOBS = {
    "dense": ["llama3-8b", "--hw", "h100-sxm", "--nodes", "2", "--seq-len", "8192", "--global-batch", "128"],
    "experts": ["mixtral-8x7b", "--hw", "h100-sxm", "--nodes", "2", "--seq-len", "4096", "--global-batch", "128",
                "--engine", "megatron"],
    "mixed": ["gemma3-27b", "--hw", "h100-sxm", "--nodes", "4", "--seq-len", "8192", "--global-batch", "128",
              "--engine", "megatron"],
}  # fmt: skip
FLAGS = ["--pin", "micro_batch=1,2", "--pin", "zero=0,1", "--forbid", "cp", "--forbid", "full"]
OTHER_ORDER = ["--forbid", "full,cp", "--pin", "zero=1,0", "--pin", "mbs=2,1"]


def written(folder: Path, job: list[str], *flags: str, **env: str) -> bytes:
    path = folder / "plan.json"
    result = planner("plan", *job, *flags, "-o", str(path), **env)
    assert result.returncode == 0, result.stderr
    return path.read_bytes()


@pytest.mark.parametrize("name", ["dense", "mixed", pytest.param("experts", marks=pytest.mark.slow)])
def test_the_same_bytes_in_another_process(tmp_path, name):
    once = written(tmp_path, JOBS[name], *FLAGS, PYTHONHASHSEED="1", OMP_NUM_THREADS="1")
    again = written(tmp_path, JOBS[name], *OTHER_ORDER, PYTHONHASHSEED="2", OMP_NUM_THREADS="2", LC_ALL="C", TZ="Asia/Tokyo")
    assert once == again


def test_the_python_interface_writes_the_same(tmp_path):
    job = {"nodes": 2, "seq_len": 8192, "global_batch": 128, "pin": {"zero": (1, 0), "micro_batch": [2, 1]}}
    plan = api.plan("llama3-8b", "h100-sxm", forbid=("full", "cp"), **job)
    assert plan.to_json().encode() == written(tmp_path, JOBS["dense"], *FLAGS)
    assert plan.certificate.seconds > 0
    assert "seconds" not in json.loads(plan.to_json())["certificate"]


def shuffled(seed: int):
    """`enumerate_rows` with its rows in another order."""

    def rows(*args) -> Rows:
        found = enumerate_rows(*args)
        order = np.random.default_rng(seed).permutation(len(found.layouts))
        return Rows(found.layouts.take(order), found.enumerated, found.rejected)

    return rows


@pytest.mark.parametrize("made", [instance, mixture_instance, mixed_instance])
@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_rows_never_matters(monkeypatch, made, seed):
    task = made(seed)
    once = solve.search(*task, k=4)
    monkeypatch.setattr(solve, "enumerate_rows", shuffled(seed))
    again = solve.search(*task, k=4)
    assert [(c.step_ns, c.layout) for c in again.candidates] == [(c.step_ns, c.layout) for c in once.candidates]
    assert (again.counts, again.status, again.bound_ns) == (once.counts, once.status, once.bound_ns)


def test_the_order_of_rows_never_matters_for_a_real_job(monkeypatch):
    job = {"gpus": 64, "seq_len": 8192, "global_batch": 512, "engine": "megatron"}
    once = api.plan("llama3-70b", "h100-sxm", **job)
    monkeypatch.setattr(solve, "enumerate_rows", shuffled(7))
    assert api.plan("llama3-70b", "h100-sxm", **job).to_json() == once.to_json()


def test_orders_of_floats_are_stable():
    """Sorts of equal values depend on the platform unless they are stable."""
    folder = Path(api.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if "argsort(" in line or "np.sort(" in line:
                assert 'kind="stable"' in line or "stable=True" in line, f"{path.relative_to(folder)}:{number}"
