"""Where a pipeline's gradients do not exist yet, or chunks are unequal: rows fit from the byte on that brute force finds, by
the search and by the verifier."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from machines import llama, profile, task

from planner.cost import primitives, step
from planner.cost.even import even_step_cost
from planner.cost.primitives import Primitives
from planner.cost.task import Ints, LayoutArray, StageArray, Task, even_runs
from planner.engines.registry import engine_named
from planner.search import bounds, solve
from planner.search.solve import search
from planner.search.space import Space, declared_space, enumerate_rows
from planner.verify import memory, tables
from search.brute import mixes, splits
from search.grids import under

CASES = {
    # A round of as many micro-batches as stages, and two: gradients are all there only in the second case.
    "1f1b": (6, ("1f1b",), (4, 8)),
    "gpipe": (5, ("gpipe",), (4, 8)),
    "interleaved": (8, ("interleaved",), (4, 8)),
    "unequal chunks": (9, ("interleaved",), (4, 8)),
    "more unequal chunks": (15, ("interleaved",), (4, 16)),
}
SHAPES = {"activations": (4096, 8192), "gradients": (256, 8192), "vocabulary": (1024, 131072)}
"""What takes most: (tokens of a sequence, vocabulary)."""


def rows_of(name: str, shape: str) -> tuple[Task, Space, LayoutArray]:
    """Pipelines of two and four GPUs of one node."""
    layers, schedules, batches = CASES[name]
    (seq_len, vocab), engine = SHAPES[shape], engine_named("bundled")
    model = llama(layers, 1024, heads=8, kv_heads=8, width=3072, vocab=vocab)
    found, t = [], None
    for gpus in (2, 4):
        for batch in batches:
            t = task(model, gpus, seq_len, batch, "bundled", profile())
            pins: dict[str, list[object]] = {"pp": [gpus], "schedule": list(schedules), "micro_batch": [1, 2]}
            space = declared_space(t, engine, pins, [])
            found.append((t, space, enumerate_rows(t, engine, space).layouts))
    return found


def ranks_bytes(p: Primitives, one: LayoutArray, place: list[tuple[int, int]], mix: np.ndarray) -> Ints:
    """Bytes of ranks (index, layers) of one row."""
    index, layers = (np.array([r[k] for r in place], dtype=np.int64) for k in range(2))
    zero = np.zeros(len(place), dtype=np.int64)
    return step.stage_cost(p, one, StageArray(zero, index, zero + 1, layers, mix[:, 0], mix[:, 1])).allocated


def least_bytes(t: Task, x: LayoutArray, modes: tuple[int, ...]) -> Ints:
    """What devices must hold at least for each row, over all splits and recompute."""
    p, needed = primitives.price(t, x), []
    for row in range(len(x)):
        one, own = x.take(np.array([row])), p.take(np.array([row]))
        pp, v, n = int(one.pp[0]), int(one.virtual_stages[0]), t.model.n_layers
        held = [s for s in splits(n, pp, v) if not any(k % v for k in s[:-1])]
        options = {(s, k): mixes(k, modes, v > 1) for split in held for s, k in enumerate(split)}
        places = [place for place, some in options.items() for _ in some]
        each = ranks_bytes(own, one, places, np.array([mix for some in options.values() for mix in some]))
        least: dict[tuple[int, int], int] = {}
        for place, n_bytes in zip(places, each.tolist(), strict=True):
            least[place] = min(least.get(place, n_bytes), n_bytes)
        needed.append(min(max(least[s, k] for s, k in enumerate(split)) for split in held))
    return np.array(needed, dtype=np.int64)


def found_by_search(t: Task, x: LayoutArray, modes: tuple[int, ...], capacity: Ints) -> np.ndarray:
    p, answer = replace(primitives.price(t, x), capacity=capacity), np.zeros(len(x), dtype=bool)
    for rows in bounds.same_pipeline(x, np.arange(len(x)), t.model):
        answer[rows] = solve.memory_feasible(t, solve.group_of(t, modes, x, p, None, rows))
    return answer


def found_by_verifier(t: Task, x: LayoutArray, modes: tuple[int, ...], capacity: Ints) -> np.ndarray:
    priced = tables.price(t, x)
    kinds = tuple(replace(kind, capacity=capacity) for kind in priced.kinds)
    return memory.fitting(replace(priced, kinds=kinds), modes, lambda *_: None)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_rows_fit_from_the_byte_on_that_brute_force_finds(name: str, shape: str) -> None:
    seen = 0
    for t, space, x in rows_of(name, shape):
        needed = least_bytes(t, x, space.modes)
        for found in (found_by_search, found_by_verifier):
            assert found(t, x, space.modes, needed).all()
            assert not found(t, x, space.modes, needed - 1).any()
        seen += len(x)
    assert seen >= 4


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_even_splits_are_priced_alike(name: str, shape: str) -> None:
    for t, _, x in rows_of(name, shape):
        for mode in (0, 2):
            runs = even_runs(x, t.model.n_layers, mode)
            whole = step.step_cost(primitives.price(t, x), x, runs)
            assert np.array_equal(even_step_cost(t, x, mode).allocated, whole.allocated)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_found_under_the_lowest_limit_that_there_is_one_for(name: str, shape: str) -> None:
    for t, space, x in rows_of(name, shape):
        p, needed = primitives.price(t, x), least_bytes(t, x, space.modes)
        limit = int((np.ceil(needed * t.reserved_ratio).astype(np.int64) + p.outside).min())
        there = search(under(t, limit), engine_named("bundled"), space, k=1)
        assert len(there.candidates) == 1
        assert search(under(t, limit - 3), engine_named("bundled"), space, k=1).status == "infeasible"
