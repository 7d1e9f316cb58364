"""What the bundled runtime does beside products: copies around collectives, sums of gradients, a ring's kernels."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from machines import llama, llama_70b, profile, profile_data, task

from planner.cost import memory, operators
from planner.cost.task import LayoutArray
from planner.cost.traffic import copy_seconds
from planner.specs.hardware import HardwareProfile
from planner.specs.layout import Layout, even_stages


def layout(**named) -> Layout:
    stages = [s.model_dump() for s in even_stages(llama().n_layers, named.get("pp", 1))]
    return Layout.model_validate({"stages": stages, **named})


def copies(precision: str = "bf16", place: str = "layer", engine: str = "bundled", **named) -> float:
    """Bytes copied for each parameter of a layer, or of the head, in a step."""
    t = task(llama(), named.get("dp", 1) * named.get("tp", 1), engine=engine, global_batch=32, precision=precision)
    x = LayoutArray.of([layout(**named)], t.job)
    held = memory.rank_params(t, x)
    params = {"layer": held["layer"], "last": held["own_head"] + held["norm"] + held["modules"]}[place][0]
    device = t.hardware.device
    moved = copy_seconds(t, x)[place][0] * device.memory_bandwidth.base * device.memory_efficiency.base
    return float(moved) / params


OWN, WHOLE = task().accounting.gather_copies
REDUCED, ADDED = task().accounting.reduce_copies
ENGINES = task().accounting.engine_copies[0] + task().accounting.engine_copies[1] / 8
SUMMED = task().accounting.whole_sums


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({"dp": 8, "zero": 0, "micro_batch": 4}, OWN + REDUCED),
        ({"dp": 8, "zero": 1, "micro_batch": 4}, OWN / 8 + WHOLE + ENGINES),
        ({"dp": 8, "zero": 1, "micro_batch": 2}, OWN / 8 + WHOLE + ENGINES + 2 * SUMMED),
        ({"dp": 8, "zero": 2, "micro_batch": 2}, OWN / 8 + WHOLE + 2 * (ENGINES + ADDED / 8)),
        ({"dp": 8, "zero": 3, "micro_batch": 4}, 2 * (OWN / 8 + WHOLE) + ENGINES),
        ({"dp": 8, "zero": 3, "micro_batch": 2}, 4 * (OWN / 8 + WHOLE) + 2 * (ENGINES + ADDED / 8)),
        ({"dp": 8, "zero": 3, "micro_batch": 2, "shard": 4}, 4 * (OWN / 4 + WHOLE) + 2 * (REDUCED + ADDED / 4)),
        ({"dp": 16, "zero": 1, "micro_batch": 2}, OWN / 16 + WHOLE + REDUCED),
        ({"dp": 16, "zero": 3, "micro_batch": 1}, 4 * (OWN / 16 + WHOLE) + 2 * (REDUCED + ADDED / 16)),
        ({"micro_batch": 32}, 0.0),
        ({"micro_batch": 8}, 4 * SUMMED),
    ],
    ids=str,
)
def test_copies_of_a_step_by_zero_stage(named, expected):
    """One rank alone has bf16 parameters with masters beside: it copies nothing, and adds up in fp32. Eight ranks are a node,
    whose copy engines carry bf16."""
    assert copies(**named) == pytest.approx(expected, rel=1e-9)


def test_the_head_is_gathered_once_a_micro_batch():
    assert copies(place="last", dp=8, zero=3, micro_batch=4) == pytest.approx(OWN / 8 + WHOLE + ENGINES, rel=1e-9)


def test_engines_with_fitted_constants_have_them_in_these():
    assert copies(engine="torchtitan", dp=8, zero=3, micro_batch=2) == 0.0


def _parts(kind: str = "cuda", **named) -> dict[str, float]:
    hardware = HardwareProfile.model_validate(profile_data() | {"device": profile_data()["device"] | {"kind": kind}})
    t = task(llama_70b(), 2, hardware=hardware, seq_len=16384)
    s = operators.shapes_of(t, LayoutArray.of([layout(**named)], t.job))
    return {k: float(v[0]) for k, v in operators.layer_parts(t, s, 0).items()}


def test_a_ring_has_kernels_of_its_own():
    ring, heads = _parts(cp=2, context="ring"), _parts(cp=2)
    assert ring["attention"] > 1.5 * heads["attention"]
    assert ring["elementwise"] > heads["elementwise"]
    assert ring["gemm"] == heads["gemm"]


def test_a_ring_is_as_fast_where_the_device_has_no_better_kernels():
    """An A100's own attention reaches less than the ring's kernels do on a unit of any device."""
    slow = profile(compute_units=108, peak={"bf16": {"value": "312 TFLOP/s", "provenance": "assumed", "source": "test"}})
    t = task(llama_70b(), 2, seq_len=16384, hardware=slow)
    s = operators.shapes_of(t, LayoutArray.of([layout(cp=2, context=c) for c in ("ring", "default")], t.job))
    for direction in (0, 1):
        ring, heads = operators.layer_parts(t, s, direction)["attention"]
        assert ring == heads


def test_selective_recompute_keeps_what_a_ring_has_merged():
    t = task(llama_70b(), 2, seq_len=16384)
    s = operators.shapes_of(t, LayoutArray.of([layout(cp=2, context="ring")], t.job))
    parts = operators.layer_parts(t, s, 0)
    again = {mode: operators.repeated_parts(t, s, mode, parts)["elementwise"][0] for mode in ("selective", "full")}
    assert again["full"] == parts["elementwise"][0]
    assert again["selective"] == pytest.approx(_parts(cp=2)["elementwise"], rel=1e-9)


def test_products_run_beside_others_on_gpus_alone():
    t = task(llama_70b(), 2, seq_len=16384)
    back_to_back = dataclasses.replace(t, accounting=dataclasses.replace(t.accounting, product_times=1.0))
    s = operators.shapes_of(t, LayoutArray.of([layout(dp=2)], t.job))
    a, b = (operators.layer_parts(x, s, 0)["gemm"] for x in (t, back_to_back))
    assert np.allclose(a, t.accounting.product_times * b)
    assert _parts("cpu", dp=2)["gemm"] == pytest.approx(float(b[0]))
