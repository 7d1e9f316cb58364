"""Speed, reported and never asserted: these machines are shared. Run with

python -m pytest tests/benchmarks --benchmark-enable --benchmark-only
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
from machines import task

from planner.cost import even
from planner.cost.task import INTERLEAVED, NONE, ONE_F_ONE_B, LayoutArray
from planner.engines.registry import engine_named
from planner.search.solve import search
from planner.search.space import declared_space
from planner.specs import files

CASES = {
    "llama3-405b, 16,384 H100, bundled": ("llama3-405b", "h100-sxm", 16384, 8192, 2048, "bundled"),
    "gpt3-175b, 1,024 A100, bundled": ("gpt3-175b", "a100-80gb-sxm", 1024, 2048, 1536, "bundled"),
    "llama3-70b, 64 H100, bundled": ("llama3-70b", "h100-sxm", 64, 8192, 512, "bundled"),
}


def layouts(n: int) -> LayoutArray:
    """`n` random layouts of a thousand devices, every schedule among them."""
    rng = np.random.default_rng(0)
    tp, pp = 2 ** rng.integers(0, 4, n), 2 ** rng.integers(0, 5, n)
    one = np.ones(n, dtype=np.int64)
    dp, micro = np.maximum(1, 1024 // (tp * pp)), 2 ** rng.integers(0, 3, n)
    v = np.where((pp > 1) & (rng.random(n) < 0.3), 2, 1)
    schedule = np.where(pp == 1, NONE, np.where(v > 1, INTERLEAVED, ONE_F_ONE_B))
    sequence = (tp > 1).astype(np.int64)
    m = np.maximum(1, 2048 // (dp * micro))
    return LayoutArray(tp, one, pp, dp, one, one, rng.integers(0, 4, n), micro, schedule, v, sequence, m)


def different_layouts(n: int) -> LayoutArray:
    """`n` layouts of a thousand devices, no two of them equal: a grid of degrees, micro-batches, schedules and batches."""
    powers = 2 ** np.arange(5)
    axes = (powers[:4], powers, powers, powers, np.arange(4), np.arange(2), np.arange(2), np.arange(1, 25))
    tp, pp, cp, micro, zero, sequence, chunked, rounds = (a.ravel() for a in np.meshgrid(*axes))
    kept = (tp * pp * cp <= 1024) & ((sequence == 0) | (tp > 1)) & ((chunked == 0) | (pp > 1))
    rows = np.sort(np.random.default_rng(0).permutation(np.nonzero(kept)[0])[:n])
    tp, pp, cp, micro, zero, sequence, chunked, rounds = (a[rows] for a in (tp, pp, cp, micro, zero, sequence, chunked, rounds))
    one = np.ones(n, dtype=np.int64)
    schedule = np.where(pp == 1, NONE, np.where(chunked == 1, INTERLEAVED, ONE_F_ONE_B))
    return LayoutArray(tp, cp, pp, 1024 // (tp * pp * cp), one, one, zero, micro, schedule, 1 + chunked, sequence, pp * rounds)


@pytest.mark.parametrize("made", [layouts, different_layouts])
def test_estimate_on_arrays(benchmark, made):
    t = task(files.load_model("llama3-70b")[0], 1024, 8192, 2048, hardware=files.load_hardware("h100-sxm")[0])
    n = 131072
    many = made(n)
    cost = benchmark(lambda: even.even_step_cost(t, many, 2))
    assert 0 < cost.fits.sum() < n
    table = np.stack([getattr(many, f.name) for f in fields(many)])
    benchmark.extra_info["different ones"] = np.unique(table, axis=1).shape[1]
    assert made is layouts or benchmark.extra_info["different ones"] == n
    if benchmark.stats:
        benchmark.extra_info["layouts per second"] = round(n / benchmark.stats.stats.median)


@pytest.mark.parametrize("case", CASES)
def test_search(benchmark, case):
    model, hardware, gpus, seq_len, batch, engine = CASES[case]
    t = task(files.load_model(model)[0], gpus, seq_len, batch, engine, files.load_hardware(hardware)[0])
    e = engine_named(engine)
    space = declared_space(t, e, {}, [])
    outcome = benchmark(lambda: search(t, e, space, k=1))
    assert (outcome.status, outcome.counts.open) == ("optimal", 0)
    benchmark.extra_info["layouts"] = outcome.counts.enumerated
    benchmark.extra_info["solved exactly"] = outcome.counts.exact


def process(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "planner", *words], check=True, capture_output=True, timeout=60)


def test_help_process(benchmark):
    benchmark(lambda: process("--help"))


def test_plan_process(benchmark):
    words = ["plan", "llama3-405b", "--hardware", "h100-sxm", "--gpus", "16384", "--seq-len", "8192", "--global-batch", "2048"]
    benchmark(lambda: process(*words))
