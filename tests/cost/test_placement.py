"""Where ranks and optimizer states live: rank order and offload in memory, traffic and rules."""

from __future__ import annotations

import numpy as np
import pytest
from machines import llama, profile, task

from planner.cost import primitives
from planner.cost.task import LayoutArray
from planner.cost.traffic import HOST_BANDWIDTH
from planner.engines.base import layout_problems
from planner.engines.registry import engine_named
from planner.planning.estimate import estimate_layout
from planner.search.solve import search
from planner.search.space import declared_space
from planner.specs.layout import Layout, even_stages


def layout(**named) -> Layout:
    stages = [s.model_dump() for s in even_stages(llama().n_layers, named.get("pp", 1))]
    return Layout.model_validate({"stages": stages, **named})


def test_offloaded_states_leave_the_device_and_are_updated_slowly():
    t = task(llama(), 8, engine="megatron")
    here, away = (estimate_layout(t, layout(dp=8, zero=1, offload=o)) for o in ("none", "optimizer"))
    a, b = here.memory.stages[0], away.memory.stages[0]
    params = t.model.total_params
    assert a.optimizer * 2**30 == pytest.approx(12 * params / 8, rel=1e-6)
    assert b.optimizer == 0
    assert away.memory.host_gib == pytest.approx(a.optimizer, rel=1e-6)
    assert here.memory.host_gib == 0
    link = t.hardware.device.host_link.base
    slow = params / 8 * (6 / link + 28 / HOST_BANDWIDTH)
    assert away.breakdown.optimizer == pytest.approx(here.breakdown.optimizer * 6 / (6 + 36 / 8) + slow, rel=1e-3)
    assert away.step_time_s > here.step_time_s


def test_stages_beside_each_other_move_the_slow_link_from_the_pipeline_to_the_replicas():
    """Two nodes of four, pp 2 x dp 4: apart, replicas share a node; beside each other, stages do."""
    t = task(llama(), 8, engine="megatron", hardware=profile(node_size=4, nic="5 GB/s"))
    x = LayoutArray.of([layout(pp=2, dp=4, schedule="1f1b", zero=1, order=o) for o in ("tp-cp-dp-pp", "tp-cp-pp-dp")], t.job)
    p = primitives.price(t, x)
    assert int(p.p2p[1]) < int(p.p2p[0])
    assert int(p.comm[1]) > int(p.comm[0])
    assert np.array_equal(x.span, [8, 2])
    assert np.array_equal(x.apart, [1, 2])


@pytest.mark.parametrize(
    ("engine", "named", "code"),
    [
        ("nanotron", {"dp": 8, "zero": 1, "offload": "optimizer"}, "PLN226"),
        ("torchtitan", {"pp": 2, "dp": 4, "schedule": "1f1b", "zero": 2, "order": "tp-cp-pp-dp"}, "PLN227"),
        ("megatron", {"dp": 8, "offload": "optimizer"}, "PLN228"),
        ("megatron", {"dp": 8, "zero": 1, "order": "tp-cp-pp-dp"}, "PLN225"),
        ("megatron", {"pp": 2, "cp": 2, "dp": 2, "schedule": "1f1b", "zero": 1, "order": "tp-cp-pp-dp"}, "PLN525"),
    ],
)
def test_rules_of_placement(engine, named, code):
    t = task(llama(), 8, engine=engine, hardware=profile(node_size=4))
    assert code in {p.code for p in layout_problems(t, engine_named(engine), layout(**named))}


def test_both_axes_are_searched_and_can_be_forbidden():
    t, engine = task(llama(), 8, engine="megatron", hardware=profile(memory="40 GiB", node_size=4)), engine_named("megatron")
    wide = search(t, engine, declared_space(t, engine, {}, []))
    narrow = search(t, engine, declared_space(t, engine, {}, ["offload", "order"]))
    assert narrow.counts.enumerated * 4 == wide.counts.enumerated
    if narrow.candidates:
        assert wide.candidates[0].step_ns <= narrow.candidates[0].step_ns
        assert narrow.candidates[0].layout.offload == "none"
