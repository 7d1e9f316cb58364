"""States shared by a group of the data-parallel ranks, with copies in the other groups: bytes and traffic by hand."""

from __future__ import annotations

import numpy as np
from machines import llama, profile, task

from planner.cost.collectives import collective_seconds
from planner.cost.primitives import price
from planner.cost.task import LayoutArray
from planner.specs.layout import Layout, Stage


def priced(shard: int | None, **layout):
    t = task(llama(), 32, 2048, 64, "bundled", profile())
    one = Layout(dp=32, shard=shard, stages=[Stage(layers=8, recompute="full")], **layout)
    return t, price(t, LayoutArray.of([one], t.job))


def test_states_are_divided_by_the_ranks_that_share_them():
    """12 bytes a parameter, and 4 that the allocator keeps of reduced gradients."""
    t, p = priced(8, zero=3, micro_batch=2)
    params = t.model.layer_params_of(t.model.layers[0])
    assert int(p.state[0]) == -(-16 * params // 8)
    assert int(priced(None, zero=3, micro_batch=2)[1].state[0]) == -(-16 * params // 32)


def test_copies_are_made_equal_once_a_step():
    """A part of 1/8 of the fp32 gradients, all-reduced over the four nodes."""
    t, p = priced(8, zero=3, micro_batch=1)
    n, stride, part = (np.array([v], float) for v in (4, 8, 4 * t.model.layer_params_of(t.model.layers[0]) / 8))
    expected = t.growth * t.constant("dp") * float(collective_seconds("all_reduce", n, stride, part, t.hardware)[0])
    assert int(p.comm[0]) == int(np.ceil(expected * 1e9))
    assert int(priced(None, zero=3, micro_batch=1)[1].comm[0]) == 0


def test_gathers_stay_inside_the_group():
    inside, across = (priced(shard, zero=3, micro_batch=1)[1] for shard in (8, None))
    assert int(inside.forward[0]) < int(across.forward[0])
