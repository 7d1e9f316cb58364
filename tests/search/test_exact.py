"""The search equals brute force, bounds never exceed exact values, and every row is accounted for."""

from __future__ import annotations

import numpy as np
import pytest
from machines import llama, mixture, profile, task

from planner.cost import primitives
from planner.engines.registry import engine_named
from planner.search import bounds, mixed
from planner.search.solve import group_of, price, search
from planner.search.space import declared_space, enumerate_rows
from planner.specs.layout import SCHEDULES, SPLIT_BACKWARD
from search.brute import all_rows
from search.instances import adapter_instance, instance, mixed_instance, mixture_instance

FAST, MORE = range(60), range(60, 400)


def check_instance(seed: int, made=instance) -> bool:
    """Compare one instance with brute force; returns whether anything fits."""
    return check_outcome(*made(seed))


def check_outcome(task, engine, space) -> bool:
    """The search equals brute force: values, alternatives and counts. Returns whether anything fits."""
    x, values = all_rows(task, engine, space)
    outcome = search(task, engine, space, k=3)
    c = outcome.counts
    assert c.by_rule + c.by_memory + c.by_bound + c.exact == c.enumerated
    assert c.open == 0
    assert c.by_memory == sum(v is None for v in values)
    finite = [v for v in values if v is not None]
    if not finite:
        assert outcome.status == "infeasible"
        assert not outcome.candidates
        return False
    assert outcome.status == "optimal"
    assert outcome.candidates[0].step_ns == min(finite) == outcome.bound_ns
    check_alternatives(x, values, outcome, 3)
    return True


def check_alternatives(x, values, outcome, k) -> None:
    """The k best distinct in (tp, cp, pp, ep), by value."""
    best: dict[tuple[int, ...], int] = {}
    for row, value in enumerate(values):
        if value is not None:
            key = tuple(int(a[row]) for a in (x.tp, x.cp, x.pp, x.ep))
            best[key] = min(best.get(key, value), value)
    assert [c.step_ns for c in outcome.candidates] == sorted(best.values())[:k]


@pytest.mark.parametrize("seed", FAST)
def test_search_equals_brute_force(seed):
    check_instance(seed)


@pytest.mark.parametrize(("made", "seed"), [
    (instance, 400), (instance, 402), (mixture_instance, 50), (mixed_instance, 51),
    *(pytest.param(made, seed, marks=pytest.mark.slow) for made in (instance, mixture_instance, mixed_instance)
      for seed in range(403, 413)),
])  # fmt: skip
def test_the_k_best_are_the_k_best(made, seed):
    """Every alternative is the best of its (tp, cp, pp, ep), and no group between two of them is left out."""
    task, engine, space = made(seed)
    x, values = all_rows(task, engine, space)
    for k in range(1, 7):
        outcome = search(task, engine, space, k=k)
        check_alternatives(x, values, outcome, k)
        for c in outcome.candidates:
            assert values[c.row] == c.step_ns
            assert (c.layout.tp, c.layout.pp) == (int(x.tp[c.row]), int(x.pp[c.row]))


@pytest.mark.parametrize("seed", range(12))
def test_search_over_experts_equals_brute_force(seed):
    check_instance(seed, mixture_instance)


@pytest.mark.parametrize("seed", range(40))
def test_search_over_several_kinds_of_layers_equals_brute_force(seed):
    check_instance(seed, mixed_instance)


def test_expert_tensor_parallelism_is_in_the_space():
    model = mixture(4, 1024, 8, 2, 1024)
    t, engine = task(model, 8, 1024, 8, "megatron", profile(memory="60 GiB")), engine_named("megatron")
    rows = enumerate_rows(t, engine, declared_space(t, engine, {}, [])).layouts
    assert set(zip(rows.tp.tolist(), rows.etp.tolist(), strict=True)) >= {(2, 1), (2, 2), (4, 4), (8, 1)}
    assert np.all((rows.etp == 1) | (rows.etp == rows.tp))
    pinned = enumerate_rows(t, engine, declared_space(t, engine, {"etp": [2]}, [])).layouts
    assert {(1, 2), (4, 2)} <= set(zip(pinned.tp.tolist(), pinned.etp.tolist(), strict=True))


def test_search_with_adapters_equals_brute_force():
    feasible = [check_instance(seed, adapter_instance) for seed in range(16)]
    assert 0.3 < np.mean(feasible) < 1


@pytest.mark.slow
def test_search_equals_brute_force_on_many():
    feasible = [check_instance(seed) for seed in MORE]
    assert 0.2 < np.mean(feasible) < 0.98


@pytest.mark.parametrize("seed", range(12))
def test_bounds_never_exceed_exact_values(seed):
    task, engine, space = instance(1000 + seed)
    x, values = all_rows(task, engine, space)
    p = primitives.price(task, x)
    for rows in bounds.same_pipeline(x, np.arange(len(x)), task.model):
        if bounds.by_place(task.model, x.virtual_stages[rows])[0]:
            continue
        group = bounds.group_of(p.take(rows), x.take(rows), task.model.n_layers, space.modes)
        fits, simple = bounds.memory_feasible(group), bounds.simple_bound(group)
        exact = np.array([-1 if values[r] is None else values[r] for r in rows])
        assert np.array_equal(fits, exact >= 0)
        assert np.all(simple[fits] <= exact[fits])
        for factor in (1.0001, 1.02, 1.3, 4.0):
            if fits.any():
                target = int(exact[fits].min() * factor)
                bound = bounds.target_bound(group, target)
                assert np.all(bound[fits] <= np.minimum(exact[fits], target))


@pytest.mark.parametrize("seed", range(4))
def test_the_last_target_is_infinite(seed):
    """Rows are settled even when no plan lies below any finite target of their own."""
    task, engine, space = instance(2000 + seed)
    outcome = search(task, engine, space, k=50)
    rows = enumerate_rows(task, engine, space)
    assert outcome.counts.by_rule == rows.by_rule
    assert outcome.counts.open == 0


@pytest.mark.parametrize("engine", ["bundled", "torchtitan+eager"])
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
def test_zero_bubble_rows_equal_brute_force(seed, engine):
    """Split backwards, both ends on the first rank, a head from light to heavier than all layers; tight and loose memory."""
    rng = np.random.default_rng(seed)
    layers, memory = int(rng.choice([6, 8, 10, 12])), float(rng.uniform(2.4, 7.0))
    vocab = int(rng.choice([1024, 32000, 262144]))
    model = llama(layers, 1024, 8, 4, 2048, vocab=vocab)
    t, e = task(model, 4, 1024, 24, engine, profile(memory=f"{memory} GiB", node_size=4)), engine_named(engine)
    pins = {"schedule": list(SPLIT_BACKWARD), "pp": [2, 3, 4], "tp": [1], "micro_batch": [1, 2]}
    space = declared_space(t, e, pins, [])
    x, values = all_rows(t, e, space)
    assert set(x.schedule.tolist()) == {SCHEDULES.index(name) for name in SPLIT_BACKWARD}
    outcome, finite = search(t, e, space, k=3), [v for v in values if v is not None]
    assert [c.step_ns for c in outcome.candidates[:1]] == ([min(finite)] if finite else [])
    assert outcome.counts.by_memory == values.count(None)
    assert outcome.counts.open == 0
    p = primitives.price(t, x)
    for rows in bounds.same_pipeline(x, np.arange(len(x)), model):
        group = bounds.group_of(p.take(rows), x.take(rows), layers, space.modes)
        exact = np.array([bounds.BIG if values[r] is None else values[r] for r in rows])
        assert np.array_equal(bounds.memory_feasible(group), exact < bounds.BIG)
        assert np.all(bounds.simple_bound(group) <= exact)
        for target in (int(min(finite, default=1) * f) for f in (1.0001, 1.02, 1.3, 4.0)):
            assert np.all(bounds.target_bound(group, target) <= np.minimum(exact, target))


@pytest.mark.parametrize("seed", range(6))
def test_deep_interleaved_rows_equal_brute_force(seed):
    """Many chunks a rank: up to 16, where the last target times v is largest."""
    rng = np.random.default_rng(seed)
    layers, memory = int(rng.choice([8, 10, 12, 16, 18, 20])), float(rng.uniform(2.3, 8.0))
    t = task(llama(layers, 1024, 8, 4, 2048), 4, 1024, 8, "bundled", profile(memory=f"{memory} GiB", node_size=4))
    e = engine_named("bundled")
    space = declared_space(t, e, {"schedule": ["interleaved"], "pp": [2], "micro_batch": [1], "zero": [0, 3]}, [])
    x, values = all_rows(t, e, space)
    assert int(x.virtual_stages.max()) >= 4
    outcome = search(t, e, space, k=3)
    finite = [v for v in values if v is not None]
    assert [c.step_ns for c in outcome.candidates[:1]] == ([min(finite)] if finite else [])
    assert outcome.counts.by_memory == values.count(None)
    (p, stack), exact = price(t, x), np.array([bounds.BIG if v is None else v for v in values])
    for rows in bounds.same_pipeline(x, np.arange(len(x)), t.model):
        group = group_of(t, space.modes, x, p, stack, rows)
        for target in (min(finite, default=1) * 2, int(bounds.INFINITE)):
            bound = mixed.target_bound(t, group, target) if group.stack else bounds.target_bound(group, target)
            assert np.all(bound <= np.minimum(exact[rows], target))
