"""Conflicts are unsatisfiable, lose that with any member, and say so whatever the instance; extra memory is the least."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from planner.search import conflicts, extra, stages
from planner.search.bounds import BIG
from planner.search.explain import any_fits
from planner.search.solve import group_of, memory_feasible, price
from planner.search.space import enumerate_rows, unruled_rows, with_pins
from planner.search.stages import Tables
from planner.units import MIB
from search.instances import instance, mixed_instance, mixture_instance

FAMILIES = {"one kind": instance, "mixed": mixed_instance, "experts": mixture_instance}


def satisfiable(t: Tables, limited: set[int], placed: bool) -> bool:
    """Whether any positions where ranks end keep the limits of some ranks, by trying all of them."""
    pp, end = t.time.shape[0], t.positions
    for ends in itertools.combinations(range(1, end + 1), pp):
        if placed and ends[-1] != end:
            continue
        starts = (0, *ends[:-1])
        if all(_fits(t, s, starts[s], ends[s] - starts[s]) for s in limited):
            return True
    return False


def _fits(t: Tables, s: int, start: int, size: int) -> bool:
    line = t.at[0 if t.anywhere else start]
    entry = int(line[size]) if size < len(line) else -1
    return entry >= 0 and bool(t.time[s, entry] < BIG)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(8))
def test_memory_cores_are_minimal(family, seed):
    task, engine, space = FAMILIES[family](seed)
    rng = random.Random(seed)
    task = replace(task, max_memory_fraction=task.max_memory_fraction * rng.choice((0.3, 0.6, 0.9, 1.0)))
    x = enumerate_rows(task, engine, space).layouts
    if not len(x):
        return
    p, stack = price(task, x)
    for row in rng.sample(range(len(x)), min(12, len(x))):
        t = stages.tables(group_of(task, space.modes, x, p, stack, np.array([row])), task)
        core = conflicts.memory_core(t)
        every = set(range(t.time.shape[0]))
        assert (core is None) == satisfiable(t, every, True)
        if core is None:
            continue
        limited = set(core.stages)
        assert not satisfiable(t, limited, core.placed)
        assert all(satisfiable(t, limited - {s}, core.placed) for s in limited)
        assert not core.placed or satisfiable(t, limited, False)


@pytest.mark.parametrize("seed", range(12))
def test_rule_cores_are_minimal(seed):
    task, engine, space = FAMILIES[random.Random(seed).choice(list(FAMILIES))](seed)
    rng = random.Random(seed)
    pins = {"tp": [rng.choice((3, 5, 7, 8))], "pp": [rng.choice((1, 2, 3))], "micro_batch": [rng.choice((1, 5))]}
    pins["virtual_stages"] = [rng.choice((1, 2))]
    space = with_pins(space, dict(rng.sample(list(pins.items()), 3)))
    x = unruled_rows(task, space)
    breaks = conflicts.broken(task, engine, x)
    core = conflicts.rule_core(engine, breaks)
    some_obey = bool((~breaks.any(axis=1)).any())
    assert some_obey == bool(len(enumerate_rows(task, engine, space).layouts))
    assert (not core) == some_obey
    members = [engine.all_rules.index(rule) for rule in core]
    if members:
        assert breaks[:, members].any(axis=1).all()
    for member in members:
        rest = [i for i in members if i != member]
        assert not breaks[:, rest].any(axis=1).all()


def test_nothing_conflicts_where_all_hold():
    assert conflicts.minimal_core(2, lambda model, literals: None) is None
    assert conflicts.minimal_core(3, lambda m, x: m.add_bool_or([~x[0], ~x[2]])) == (0, 2)
    assert conflicts.minimal_core(2, lambda m, x: m.add_bool_or([~x[1]])) == (1,)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(4))
def test_extra_memory_is_the_least(family, seed):
    task, engine, space = FAMILIES[family](seed)
    task = replace(task, max_memory_fraction=0.4 * task.max_memory_fraction, max_oom_probability=(None, 0.2)[seed % 2])
    found = extra.least_extra_memory(task, engine, space)
    if found is None:
        assert not len(enumerate_rows(task, engine, space).layouts)
        return
    assert any_fits(extra.with_memory(task, found), engine, space)
    assert found % MIB == 0
    assert found == 0 or not any_fits(extra.with_memory(task, found - MIB), engine, space)


@pytest.mark.parametrize("seed", range(6))
def test_rows_with_chunks_that_fit_have_a_plan(seed):
    """The memory test knows that chunks are equal: every row that it leaves has a finite table."""
    task, engine, space = instance(seed)
    space = with_pins(space, {"virtual_stages": [2]})
    x = enumerate_rows(task, engine, space).layouts
    if not len(x):
        return
    p, stack = price(task, x)
    tight = replace(p, capacity=np.maximum(p.capacity // 2, 1))
    from planner.search import bounds

    for chunk in bounds.same_pipeline(x, np.arange(len(x)), task.model):
        fits = memory_feasible(task, group_of(task, space.modes, x, tight, stack, chunk))
        for row, fit in zip(chunk.tolist(), fits.tolist(), strict=True):
            t = stages.tables(group_of(task, space.modes, x, tight, stack, np.array([row])), task)
            assert fit == (conflicts.memory_core(t) is None)
