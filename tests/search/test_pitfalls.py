"""What went wrong, or could, in searches like this one, each as a test: solvers that err, ties, leaking bounds, rounding."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from machines import llama, profile, task

from planner.cost import primitives
from planner.cost.task import LayoutArray
from planner.engines.registry import engine_named
from planner.planning.request import LONGEST_STEP_DAYS
from planner.search import bounds, incumbent, solve, stages
from planner.search.bounds import BIG
from planner.search.solve import search
from planner.search.space import declared_space, enumerate_rows
from search.grids import grid, on_two_types, solved, tight, violations
from search.instances import instance

NONE = {"memory": 0, "simple": 0, "target": 0}


# ---- a solver that errs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["INFEASIBLE", "UNKNOWN", "FEASIBLE", "MODEL_INVALID"])
@pytest.mark.parametrize("name", ["dense", "mixed"])
def test_no_proof_rests_on_one_status_of_cp_sat(monkeypatch, name, status):
    """A wrong or missing answer to "is there a plan this fast" contradicts dynamic programming, and is no proof."""
    g, real = grid(name), stages.cp_sat

    def wrong(t, below, canonical=False):
        verdict = real(t, below, canonical)
        return replace(verdict, status=status) if verdict.status == "OPTIMAL" else verdict

    monkeypatch.setattr(stages, "cp_sat", wrong)
    with pytest.raises(solve.SearchError):
        search(g.task, g.engine, g.space, k=1)


@pytest.mark.parametrize("status", ["UNKNOWN", "OPTIMAL"])
def test_a_refutation_that_is_none_is_refused(monkeypatch, status):
    """So does a wrong or missing answer to "is there a faster one"."""
    g, real = grid("dense"), stages.cp_sat

    def wrong(t, below, canonical=False):
        verdict = real(t, below, canonical)
        return replace(verdict, status=status) if verdict.status == "INFEASIBLE" else verdict

    monkeypatch.setattr(stages, "cp_sat", wrong)
    with pytest.raises(solve.SearchError):
        search(g.task, g.engine, g.space, k=1)


def test_a_plan_that_prices_otherwise_is_refused(monkeypatch):
    """The cost model has the last word on the plan, and the certificate names the solver's version."""
    from importlib.metadata import version

    g, real = grid("dense"), solve._evaluate

    def slower(*args):
        cost = real(*args)
        return replace(cost, step=cost.step + 1)

    assert version("ortools") in search(g.task, g.engine, g.space, k=1).solver
    monkeypatch.setattr(solve, "_evaluate", slower)
    with pytest.raises(solve.SearchError, match="evaluates to"):
        search(g.task, g.engine, g.space, k=1)


# ---- ties ------------------------------------------------------------------------------------------------------------


def seeded(seed: int, workers: int):
    """The solver with another seed and number of workers."""
    real = stages.deterministic_solver

    def solver():
        found = real()
        found.parameters.random_seed, found.parameters.num_workers = seed, workers
        return found

    return solver


@pytest.mark.parametrize("made", [lambda: grid("dense"), lambda: grid("mixed"), lambda: on_two_types(3)])
def test_seeds_and_workers_give_the_same_plans(monkeypatch, made):
    g = made()
    once = search(g.task, g.engine, g.space, k=4)
    for seed, workers in ((7, 1), (123, 1), (1, 2), (5, 4)):
        with monkeypatch.context() as patch:
            patch.setattr(stages, "deterministic_solver", seeded(seed, workers))
            again = search(g.task, g.engine, g.space, k=4)
        assert again.candidates == once.candidates
        assert again.counts == once.counts


def test_a_plateau_has_one_plan():
    """128 layers on 24 ranks: many splits take the same time, and the most even one, later ranks heavier, is the plan."""
    t = task(llama(128, 1024, 8, 4, 2048), 24, 1024, 96, "bundled", profile(memory="60 GiB", node_size=8))
    engine = engine_named("bundled")
    space = declared_space(t, engine, {"pp": [24], "micro_batch": [1], "schedule": ["1f1b"], "zero": [0]}, ["cp"])
    plans = []
    for seed in (1, 2, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stages, "deterministic_solver", seeded(seed, 1 + seed % 2))
            plans.append(search(t, engine, space, k=1).candidates[0].layout)
    layers = [s.layers for s in plans[0].stages]
    assert plans[0] == plans[1] == plans[2]
    inner = layers[1:-1]
    assert inner == sorted(inner)
    assert max(inner) - min(inner) <= 1


# ---- bounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "experts", "mixed"])
def test_a_bound_never_leaks_above_its_target(name):
    """Windows are cut off by the target: what is known of a row is no more than that."""
    g = grid(name)
    x, (p, stack) = g.layouts, solve.price(g.task, g.layouts)
    best = int(g.exact[g.exact >= 0].min())
    for rows in bounds.same_pipeline(x, np.arange(len(x)), g.task.model):
        group = solve.group_of(g.task, g.space.modes, x, p, stack, rows)
        for target in (best // 2, best, best + 1, 2 * best, int(bounds.INFINITE)):
            assert np.all(solve._target_bound(g.task, group, target) <= target)


def test_infeasible_is_said_after_an_infinite_target_only(monkeypatch):
    """Rows that no finite target excludes are bounded once more under the last one."""
    g, targets = tight("mixed"), []
    real = solve._refine
    monkeypatch.setattr(solve, "memory_feasible", lambda task, group: np.ones(len(group.layouts), dtype=bool))
    monkeypatch.setattr(solve, "_refine", lambda state, target, k: (targets.append(target), real(state, target, k))[1])
    nothing = replace(g.task, max_memory_fraction=g.task.max_memory_fraction * 0.9)
    assert search(nothing, g.engine, g.space, k=1).status == "infeasible"
    assert targets[-1] == bounds.INFINITE


def test_step_wise_terms_that_fall_with_the_layers_are_not_taken_for_growing(monkeypatch):
    """Where more layers hide more traffic, the pigeonhole over prefixes does not hold for d."""
    g = grid("experts")
    p = primitives.price(g.task, g.layouts)
    assert np.any((p.comm - p.hide + p.update < 0) & (g.layouts.pp > 1))
    assert violations(g) == NONE
    assert any(_wrong_without_the_guard(monkeypatch, seed) for seed in (0, 1, 6, 9, 18, 27, 36))


def _wrong_without_the_guard(monkeypatch, seed: int) -> bool:
    """Whether the least maximum of d is wrong for some row when it is taken to grow, and right as it is."""
    t, engine, space = instance(seed)
    x = enumerate_rows(t, engine, space).layouts
    p, found = primitives.price(t, x), False
    for rows in bounds.same_pipeline(x, np.arange(len(x)), t.model):
        if bounds.by_place(t.model, x.virtual_stages[rows])[0] or int(x.pp[rows[0]]) == 1:
            continue
        group = bounds.group_of(p.take(rows), x.take(rows), t.model.n_layers, space.modes)
        least, most = int(group.least.max()), t.model.n_layers - (group.pp - 1) * int(group.least.max())
        layers = np.arange(least, most + 1)[None, None, :]
        time = np.zeros((len(rows), group.pp, layers.shape[2]), dtype=np.int64)
        safe = bounds._smallest_once(group, time, layers)
        once = bounds.step.stage_once(group.deep, group.first[:, :, None], group.last[:, :, None], layers)
        once = np.broadcast_to(once, time.shape)
        taken = bounds._smallest_maximum(group, once, layers)
        true = _least_largest(once, layers[0, 0], t.model.n_layers)
        assert np.all(safe <= true)
        found = found or bool(np.any((taken > true) & (taken < BIG)))
    return found


def _least_largest(values: np.ndarray, layers: np.ndarray, whole: int) -> np.ndarray:
    """The least max of values over splits, by all of them."""
    best = np.full((len(values), whole + 1), BIG)
    best[:, 0] = -BIG
    for s in range(values.shape[1]):
        following = np.full_like(best, BIG)
        for i, n in enumerate(layers):
            reached = np.maximum(best[:, : whole + 1 - n], values[:, s, i][:, None])
            following[:, n:] = np.minimum(following[:, n:], reached)
        best = following
    return best[:, whole]


@pytest.mark.parametrize("seed", range(5))
def test_fractions_of_layers_are_rounded_down_at_any_size(seed):
    """Against rational numbers, with bytes of up to petabytes and times of days."""
    rng = np.random.default_rng(seed)
    for _ in range(40):
        act = np.sort(rng.integers(1, 2 ** int(rng.integers(8, 46)), 3))[::-1]
        cost = np.concatenate([[0], np.sort(rng.integers(1, 2 ** int(rng.integers(8, 46)), 2))])
        n, flight = int(rng.integers(1, 200)), int(rng.integers(1, 500))
        short = int(rng.integers(0, int(n * flight * (act[0] - act[2])) + 1))
        one = {f"act{m}": np.full((1, 1, 1), act[m]) for m in range(3)}
        p = SimpleNamespace(
            **one, saved=lambda m, a=act: np.full((1, 1, 1), a[m]), again=lambda m, c=cost: np.full((1, 1, 1), c[m])
        )
        g = SimpleNamespace(flight=np.full((1, 1), flight), deep=p)
        found = int(bounds._relaxed(g, np.full((1, 1, 1), n), np.full((1, 1, 1), short), (0, 1, 2))[0, 0, 0])
        # Whole layers: no mix that saves enough costs less than the fractions do.
        saves = [int(act[0] - act[m]) for m in range(3)]
        need = Fraction(short, flight)
        fewest = [
            n1 * int(cost[1]) + n2 * int(cost[2])
            for n2 in range(n + 1)
            for n1 in {0, min(n - n2, max(0, -((n2 * saves[2] - need) // saves[1]) if saves[1] else 0))}
            if n1 * saves[1] + n2 * saves[2] >= need
        ]
        assert fewest
        assert found <= min(fewest)


def test_one_micro_batch_cuts_off_no_window():
    """The slowest rank then counts no more than the others: v m - 1 is 0."""
    t = task(llama(5, 2048, 16, 8, 5632, 32000), 8, 1024, 2, "megatron", profile(memory="14 GiB", node_size=4))
    engine = engine_named("megatron")
    space = declared_space(t, engine, {"pp": [2, 4], "micro_batch": [1, 2], "schedule": ["1f1b"]}, ["cp"])
    g = solved(t, "megatron", space)
    single = (g.layouts.microbatches == 1) & (g.layouts.virtual_stages == 1)
    assert np.any(single & (g.exact >= 0))
    assert violations(g) == NONE
    x = g.layouts.take(single)
    p = primitives.price(t, x)
    for rows in bounds.same_pipeline(x, np.arange(len(x)), t.model):
        group = bounds.group_of(p.take(rows), x.take(rows), t.model.n_layers, space.modes)
        assert np.all(bounds.allowed_bottleneck(group, int(bounds.INFINITE), np.int64(0), np.int64(0)) >= BIG // 2)
    outcome = search(t, engine, space, k=1)
    assert outcome.candidates[0].step_ns == int(g.exact[g.exact >= 0].min())


def test_sentinels_stay_inside_64_bits():
    """Two infinities never meet, and the last target times any number of chunks is a number."""
    assert int(BIG) + int(bounds.INFINITE) * 16 < 2**63
    assert 2 * int(BIG) < 2**63
    assert int(bounds.INFINITE) * 64 <= int(BIG)


def test_no_step_that_is_planned_reaches_the_infinite_target():
    """Jobs of longer steps at the peak rate are refused; a plan may reach a twentieth of it."""
    assert int(bounds.INFINITE) >= LONGEST_STEP_DAYS * 20 * 86400 * 10**9


# ---- the model's holes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [2, 3])
def test_traffic_of_every_micro_batch_is_in_a_layers_time(zero):
    """A search would love a stage whose gathers and reductions were counted once a step."""
    t = task(llama(8, 2048, 16, 8, 5632, 32000), 16, 2048, 64, "deepspeed", profile(memory="60 GiB", node_size=4, nic="5 GB/s"))
    one = np.ones(2, dtype=np.int64)
    x = LayoutArray(one, one, one, 16 * one, one, one, np.array([0, zero]), one, 0 * one, one, 0 * one, 4 * one)
    p = primitives.price(t, x)
    assert int((p.forward + p.backward)[1]) > int((p.forward + p.backward)[0])


def test_no_plan_is_needed_to_prove_one(monkeypatch):
    """61 layers have no even split over 4 ranks: the proof looks at no incumbent, and solves few rows."""
    monkeypatch.setattr(incumbent, "best_even", lambda *args: pytest.fail("an incumbent was asked for"))
    t = task(llama(61, 1024, 8, 4, 2048), 16, 1024, 64, "megatron", profile(memory="6 GiB", node_size=4))
    engine = engine_named("megatron")
    outcome = search(t, engine, declared_space(t, engine, {"pp": [4, 8]}, []), k=1)
    assert (outcome.status, outcome.counts.open) == ("optimal", 0)
    assert outcome.counts.exact <= 20
