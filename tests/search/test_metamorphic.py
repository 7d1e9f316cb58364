"""What must not make a plan slower does not: more memory, more bandwidth, more to choose from."""

from __future__ import annotations

from dataclasses import replace

import pytest
from machines import llama, mixture, profile_data, task

from planner.engines.registry import engine_named
from planner.search.solve import search
from planner.search.space import declared_space
from planner.specs.hardware import HardwareProfile
from search.grids import grid
from search.instances import adapter_instance, instance, mixed_instance, mixture_instance

MAKERS = (instance, mixture_instance, mixed_instance, adapter_instance)


def best(task, engine, space) -> float:
    """The least step time, ns; infinite when nothing fits."""
    outcome = search(task, engine, space, k=1)
    return outcome.candidates[0].step_ns if outcome.candidates else float("inf")


def faster_device(task, **changes):
    """The task on a machine with other figures of its device."""
    data = task.hardware.model_dump(mode="json", exclude_none=True)
    for name, factor in changes.items():
        base = getattr(task.hardware.device, name).base
        unit = {"memory": "B", "memory_bandwidth": "B/s"}[name]
        data["device"][name]["value"] = f"{base * factor} {unit}"
    return replace(task, hardware=HardwareProfile.model_validate(data))


@pytest.mark.parametrize("made", MAKERS)
@pytest.mark.parametrize("seed", range(2))
def test_more_memory_is_never_slower(made, seed):
    task, engine, space = made(seed)
    times = [best(faster_device(task, memory=factor), engine, space) for factor in (0.7, 0.9, 1.0, 1.05, 1.5, 4.0)]
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("made", MAKERS)
@pytest.mark.parametrize("seed", range(1))
def test_a_higher_fraction_is_never_slower(made, seed):
    task, engine, space = made(seed + 10)
    times = [best(replace(task, max_memory_fraction=share), engine, space) for share in (0.5, 0.8, 0.92, 1.0)]
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("made", MAKERS)
@pytest.mark.parametrize("seed", range(2))
def test_faster_memory_is_never_slower(made, seed):
    task, engine, space = made(seed + 30)
    times = [best(faster_device(task, memory_bandwidth=factor), engine, space) for factor in (0.5, 0.9, 1.0, 1.5, 4.0)]
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("model", [llama(), mixture(4, 1024, 8, 2, 1024)], ids=["dense", "experts"])
@pytest.mark.parametrize("nic", ["5 GB/s", "50 GB/s"])
@pytest.mark.parametrize("tier", [0, 1])
def test_more_bandwidth_is_never_slower(nic, tier, model):
    engine = engine_named("megatron")
    times = []
    for factor in (1, 2, 5, 20):
        data = profile_data(memory="12 GiB", node_size=4, nic=nic)
        value, unit = data["network"][tier]["bandwidth"]["value"].split()
        data["network"][tier]["bandwidth"]["value"] = f"{float(value) * factor} {unit}"
        t = task(model, 16, 2048, 32, "megatron", HardwareProfile.model_validate(data))
        times.append(best(t, engine, declared_space(t, engine, {}, [])))
    assert times == sorted(times, reverse=True)
    assert times[-1] < float("inf")


@pytest.mark.parametrize("made", MAKERS)
@pytest.mark.parametrize("seed", range(2))
def test_fewer_options_are_never_faster(made, seed):
    task, engine, _ = made(seed + 20)
    whole = best(task, engine, declared_space(task, engine, {"micro_batch": [1, 2]}, []))
    for forbid in ("cp", "tp", "pp", "interleaved", "recompute", "full", "zero", "sp", "ep", "mbs"):
        pins = {} if forbid == "mbs" else {"micro_batch": [1, 2]}
        if forbid == "mbs":
            assert best(task, engine, declared_space(task, engine, pins, [])) <= whole  # more sizes
        else:
            assert best(task, engine, declared_space(task, engine, pins, [forbid])) >= whole


@pytest.mark.parametrize("name", ["dense", "experts", "mixed"])
def test_a_part_of_a_grid_is_never_faster(name):
    g = grid(name)
    whole = best(g.task, g.engine, g.space)
    assert whole == int(g.exact[g.exact >= 0].min())
    for axis in ("tp", "pp", "zero"):
        values = getattr(g.space, axis)
        parts = [best(g.task, g.engine, replace(g.space, **{axis: (v,)})) for v in values]
        assert min(parts) == whole
