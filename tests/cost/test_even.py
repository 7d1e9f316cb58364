"""Even splits by parts that layouts share give the same integers as every rank of every layout priced by itself."""

from __future__ import annotations

import numpy as np
import pytest
from machines import llama, mixture, profile, task

from planner.cost import even, primitives, step
from planner.cost.task import even_runs
from planner.engines.registry import engine_named
from planner.search.space import declared_space, enumerate_rows

CASES = {
    "megatron": llama(12, 2048, 16, 8, 5632, 32000),
    "megatron+deep-ep": mixture(6, 1024, 8, 2, 1024),
    "torchtitan+eager": llama(16, 1024, 8, 4, 2048, 32000),  # every schedule
    "bundled": llama(10, 1024, 8, 4, 2048, 32000),
    "deepspeed": llama(7, 1024, 8, 4, 2048, 32000),
}


def rows(engine: str, accumulating: bool) -> tuple:
    t = task(CASES[engine], 16, 1024, 64 if accumulating else 16, engine, profile(memory="40 GiB", node_size=4))
    e = engine_named(engine)
    x = enumerate_rows(t, e, declared_space(t, e, {"micro_batch": [1, 2]}, [])).layouts
    return t, x.take(x.pp * x.virtual_stages <= t.model.n_layers)


@pytest.mark.parametrize("recompute", range(3))
@pytest.mark.parametrize("accumulating", [False, True])
@pytest.mark.parametrize("engine", CASES)
def test_parts_that_layouts_share_add_up_to_the_cost_of_each(monkeypatch, engine, accumulating, recompute):
    """Whatever the pieces are that they are worked on in."""
    t, x = rows(engine, accumulating)
    each = step.step_cost(primitives.price(t, x), x, even_runs(x, t.model.n_layers, recompute))
    for piece in (4096, 37):
        monkeypatch.setattr(even, "_PIECE", piece)
        parts = even.even_step_cost(t, x, recompute)
        for name in ("step", "allocated", "excess"):
            assert np.array_equal(getattr(parts, name), getattr(each, name)), name
    assert len(np.unique(x.schedule)) >= (2 if engine in ("deepspeed", "megatron+deep-ep") else 3)


@pytest.mark.parametrize(("size", "most"), [(0, 1), (1, 1), (500, 7), (500, 3999), (500, 10**12)])
def test_distinct_keys_are_those_of_a_sort(size, most):
    key = np.random.default_rng(size).integers(0, most, size)
    _, first, kind = np.unique(key, return_index=True, return_inverse=True)
    found = primitives.distinct_keys(key)
    assert np.array_equal(found[0], first)
    assert np.array_equal(found[1], kind.ravel())


def test_quiet_primitives_leave_out_nothing_that_a_combination_decides():
    """A field that moves with the layout is among those of `own`, any other is the same for all that share a combination."""
    t, x = rows("torchtitan+eager", True)
    table = primitives.primitive_table(t, x)
    own = table.own(x, table.share)
    whole, quiet = table.of(slice(None)), table.quiet(table.share)
    for name in primitives.NAMES:
        assert name in own or np.array_equal(getattr(whole, name), getattr(quiet, name)), name
