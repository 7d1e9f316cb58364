"""The verifier's own parts: tables against brute force, labels against all splits, simulations against the closed form."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from machines import llama, mixed, profile, task
from search.brute import mixes, row_values
from search.instances import instance, mixed_instance

from planner import planfile
from planner.cost import simulated, step
from planner.errors import InputError
from planner.planfile import Declared, Inputs
from planner.specs.layout import RECOMPUTE_MODES, SCHEDULES, Layout, Stage
from planner.verify import chains, labels, memory, rows, simulation, space, tables
from planner.verify.layouts import evaluate
from planner.verify.tables import NEVER
from planner.verify.windows import runs
from verify.plans import random_plan


def declared_of(made) -> Declared:
    """A search's space as a plan file records it."""
    chunks: dict[str, list[int]] = {}
    for code, v in made.schedules:
        chunks.setdefault(SCHEDULES[code], []).append(v)
    axes = ("tp", "cp", "pp", "dp", "ep", "etp", "micro_batch", "zero")
    return Declared(
        **{axis: list(getattr(made, axis)) for axis in axes}, any_etp=made.any_etp, schedules=chunks,
        sequence_parallel=[bool(v) for v in made.sequence_parallel], recompute=[RECOMPUTE_MODES[m] for m in made.modes],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("maker", "seed"), [(instance, s) for s in range(300, 310)] + [(mixed_instance, s) for s in (1, 3, 4, 5)]
)
def test_rows_are_settled_as_brute_force_does(maker, seed):
    """Which rows fit, and which have a layout below any cutoff: every row of small spaces, with its least time."""
    t, engine, declared = maker(seed)
    x = space.enumerate_space(t, engine, declared_of(declared)).layouts
    values = row_values(t, x, declared.modes)
    priced = tables.price(t, x)
    fits = memory.fitting(priced, declared.modes, lambda *_: None)
    assert fits.tolist() == [v is not None for v in values]
    finite = np.array([v for v in values if v is not None], dtype=np.int64)
    kept = priced.take(np.nonzero(fits)[0])
    for cutoff in (finite, finite + 1, finite * 3 // 2 + 1):
        settled = rows.settle(kept, declared.modes, cutoff, lambda *_: None)
        expected = {i: int(v) for i, v in enumerate(finite) if v < cutoff[i]}
        assert settled.below == expected
        assert settled.by_bound + settled.by_table + settled.by_labels + len(expected) == len(finite)


@pytest.mark.parametrize("modes", [(0, 1, 2), (0, 2), (0, 1), (1, 2), (1,), (2,), (0,)])
@pytest.mark.parametrize("seed", [1, 4, 7])
def test_least_recompute_is_that_of_all_mixes(modes, seed):
    """Every rank and run of some rows: all (selective, full) counts, each priced by the cost model."""
    t, engine, declared = instance(seed)
    x = space.enumerate_space(t, engine, declared_of(declared)).layouts
    plain = np.nonzero(x.virtual_stages == 1)[0][::5][:12]
    priced = tables.price(t, x)
    for batch in tables.batches(x, plain):
        r = tables.ranks_of(priced.take(batch), modes, t.model.n_layers)
        again = tables.recompute_time(r)
        p, many = priced.take(batch).kinds[0], x.take(batch)
        for (i, s, e), n in ((index, index[2] + 1) for index in np.ndindex(*again.shape)):
            options = mixes(n, modes, False)
            entries = np.array([(i, s, 1, n, n1, n2) for n1, n2 in options], dtype=np.int64)
            cost = step.stage_cost(p, many, step.StageArray(*entries.T))
            fit = cost.allocated <= p.capacity[i]
            time = [n1 * int(p.recompute1[i]) + n2 * int(p.recompute2[i]) for n1, n2 in options]
            expected = min((c for c, ok in zip(time, fit.tolist(), strict=True) if ok), default=int(NEVER))
            assert int(again[i, s, e]) == expected


@pytest.mark.parametrize("seed", range(20))
def test_labels_find_the_least_of_all_splits(seed):
    rng = np.random.default_rng(seed)
    kinds = tuple(int(k) for k in rng.integers(0, int(rng.integers(1, 4)), 7))
    kinds = tuple(sorted(set(kinds)).index(k) for k in kinds)
    w, pp, factor = runs(kinds, 1, 7), int(rng.integers(1, 5)), int(rng.integers(0, 9))
    credit = int(rng.choice([0, rng.integers(0, 150)]))
    time = rng.integers(1, 60, (pp, len(w.counts))).astype(np.int64)
    time[rng.random(time.shape) < 0.2] = NEVER
    once = rng.integers(0, 80, time.shape).astype(np.int64)
    best = int(NEVER)
    for cuts in itertools.combinations(range(1, 7), pp - 1):
        places = (0, *cuts, 7)
        entries = [int(w.number[a, b - a]) for a, b in itertools.pairwise(places)]
        chosen = [int(time[s, e]) for s, e in enumerate(entries)]
        if max(chosen) < NEVER:
            pipeline = max(factor * max(chosen) + sum(chosen) - credit, (factor + 1) * max(chosen))
            best = min(best, pipeline + max(int(once[s, e]) for s, e in enumerate(entries)))
    rests = [
        chains.to_the_end(v[None], w, join)[0]
        for v, join in ((time, np.maximum), (np.where(time < NEVER, once, NEVER), np.maximum), (time, np.add))
    ]
    assert bool(chains.exists((time < NEVER)[None], w)[0]) == (best < NEVER)
    for limit in (best, best - 1, best + 50):
        found = labels.least_value(time, once, w, (factor, credit), (rests[0], rests[1], rests[2]), limit)
        assert found == (best if best <= limit and best < NEVER else None)


def layout_of(schedule: str, pp: int, v: int = 1) -> Layout:
    return Layout(pp=pp, schedule=schedule, virtual_stages=v, stages=[Stage(layers=v)] * pp)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(60))
def test_whole_ranks_take_the_closed_form(seed):
    """1F1B and GPipe: any ranks. With chunks: times that rise and then fall, or all but one equal."""
    rng = np.random.default_rng(seed)
    pp, m, v = int(rng.integers(2, 8)), int(rng.integers(1, 25)), int(rng.integers(2, 5))
    times = [int(t) for t in rng.integers(1, 40, pp)]
    for schedule in ("1f1b", "gpipe"):
        whole = simulation.run(layout_of(schedule, pp), m, [[0]] * pp, [[t] for t in times])
        assert whole.makespan == (m - 1) * max(times) + sum(times)
    peak = int(rng.integers(0, pp))
    hill = sorted(times)[:peak] + sorted(times)[peak:][::-1]
    one_slow = [7] * pp
    one_slow[peak] = int(rng.integers(1, 30))
    for ranks in (hill, one_slow):
        assert simulation.exact(layout_of("interleaved", pp, v), ranks)
        rounds = pp * int(rng.integers(1, 5))
        whole = simulation.run(layout_of("interleaved", pp, v), rounds, [[0] * v] * pp, [[t] * v for t in ranks])
        assert whole.makespan == (v * rounds - 1) * max(ranks) + sum(ranks)


@pytest.mark.parametrize("seed", range(60))
def test_forward_and_backward_apart(seed):
    """A common share: 1F1B takes the closed form exactly if the last rank is a slowest one, less otherwise."""
    rng = np.random.default_rng(seed)
    pp, m = int(rng.integers(2, 8)), int(rng.integers(2, 25))
    times = [int(t) for t in rng.integers(1, 40, pp)]
    if seed % 2:
        times[-1] = max(times)
    apart = simulation.run(layout_of("1f1b", pp), m, [[t] for t in times], [[2 * t] for t in times])
    closed = 3 * ((m - 1) * max(times) + sum(times))
    assert apart.makespan <= closed
    assert (apart.makespan == closed) == (times[-1] == max(times))
    forward, backward = rng.integers(0, 30, (2, pp)).tolist()
    gpipe = simulation.run(layout_of("gpipe", pp), m, [[f] for f in forward], [[b] for b in backward])
    assert gpipe.makespan == sum(forward) + sum(backward) + (m - 1) * (max(forward) + max(backward))


@pytest.mark.parametrize(("schedule", "v"), [("1f1b", 1), ("gpipe", 1), ("interleaved", 3)])
@pytest.mark.parametrize("seed", range(6))
def test_long_steps_are_extrapolated_exactly(schedule, v, seed, monkeypatch):
    rng = np.random.default_rng(seed)
    pp = int(rng.integers(2, 6))
    m = 40 * pp + (0 if v > 1 else int(rng.integers(0, pp)))
    forward, backward = ([[int(t)] * v for t in rng.integers(20, 30, pp)] for _ in range(2))
    for times in (([[0] * v] * pp, [[25] * v] * (pp - 1) + [[40] * v]), (forward, backward)):
        full = simulation.run(layout_of(schedule, pp, v), m, *times)
        with monkeypatch.context() as patched:
            patched.setattr(simulated, "MOST_ACTIONS", 100 * pp * v)
            short = simulation.run(layout_of(schedule, pp, v), m, *times)
        assert len(full.simulated) == 1
        assert max(short.simulated) < m
        assert short.affine
        assert short.makespan == full.makespan


@pytest.mark.parametrize("seed", range(12))
def test_pieces_add_up_to_ranks(seed):
    plan = random_plan(seed)
    if plan is None:
        return
    t = task(plan.model, plan.cluster.gpus, plan.job.seq_len, plan.job.global_batch, plan.engine, plan.hardware)
    e = evaluate(replace(t, job=plan.job), plan.layout)
    forward, backward = e.pieces.forward, e.pieces.backward
    for s, whole in enumerate(e.time.tolist()):
        assert sum(forward[s]) + sum(backward[s]) == whole * plan.layout.virtual_stages
        assert min(*forward[s], *backward[s]) >= 0


def test_runs_of_chunks_hold_what_the_cost_model_says():
    import random

    model = mixed("alternating", 12, 512, random.Random(1))
    t = task(model, 4, 512, 8, "megatron", profile())
    w = runs(model.kind_of_layer, 3, 4)
    layout = Layout(pp=2, virtual_stages=3, schedule="interleaved", stages=[Stage(layers=3), Stage(layers=9)])
    held = step.chunks_by_kind(t, layout)
    assert held.tolist() == [w.counts[w.number[0, 1]].tolist(), w.counts[w.number[1, 3]].tolist()]


def test_older_plan_files_are_still_read(tmp_path):
    """A file without what 2.1 added has the digest of its own content, and a changed one is refused all the same."""
    plan = next(p for p in map(random_plan, range(20)) if p is not None)
    data = plan.model_dump(mode="json")
    del data["certificate"]["declared"], data["certificate"]["complete"], data["inputs"]["contents"]
    proof = {k: v for k, v in data["certificate"].items() if k != "seconds"}
    digest = hashlib.sha256(planfile.canonical(data | {"certificate": proof}).encode()).hexdigest()
    path = tmp_path / "old.json"
    path.write_text(json.dumps(data | {"digest": f"sha256:{digest}"}))
    assert planfile.read(path).layout == plan.layout
    path.write_text(json.dumps(data | {"engine": "torchtitan", "digest": f"sha256:{digest}"}))
    with pytest.raises(InputError, match="PLN116"):
        planfile.read(path)


def test_documented_axes_follow_pins_and_forbids():
    t = task(llama(8), 8, 2048, 32)
    from planner.engines.registry import engine_named

    inputs = Inputs(model="m", hardware="h", digests={}, pins={"tp": [2, "4"], "sp": ["on"]}, forbidden=["interleaved", "zero"])
    d = space.documented_axes(t, engine_named("bundled"), inputs)
    assert (d.tp, d.zero, d.sequence_parallel) == ([2, 4], [0], [True])
    assert "interleaved" not in d.schedules
