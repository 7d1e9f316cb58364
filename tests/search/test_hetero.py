"""Two device types: the search equals brute force, bounds never exceed it, and two equal types are one."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from machines import gpt, llama, mixed, mixture, profile, task

from planner.cost import devicetypes, primitives, step
from planner.cost.blending import blend
from planner.cost.primitives import Primitives
from planner.cost.task import DeviceType, LayoutArray, StageArray, Task
from planner.engines.registry import engine_named
from planner.search import bounds, hetero, solve
from planner.search.solve import search
from planner.search.space import declared_space, enumerate_rows
from planner.specs.hardware import HardwareProfile
from planner.specs.layout import Stage
from search.brute import mixes, splits
from search.instances import some_pins


def machine(rng: random.Random, name: str, memory: float, node_size: int) -> HardwareProfile:
    peak, bandwidth = rng.choice(("312 TFLOP/s", "989 TFLOP/s", "2000 TFLOP/s")), rng.choice(("1.5 TB/s", "3.35 TB/s"))
    made = profile(
        memory=f"{memory:.3f} GiB", node_size=node_size, nic=rng.choice(("5 GB/s", "50 GB/s")),
        memory_bandwidth={"value": bandwidth, "provenance": "assumed", "source": "test"},
        peak={k: {"value": v, "provenance": "assumed", "source": "test"} for k, v in (("bf16", peak), ("fp32", "60 TFLOP/s"))},
    )  # fmt: skip
    return made.model_copy(update={"name": name})


def on_two(t: Task, first: HardwareProfile, second: HardwareProfile, devices: tuple[int, int]) -> Task:
    return replace(t, hardware=first, gpus=sum(devices), types=(DeviceType(first, devices[0]), DeviceType(second, devices[1])))


def instance(seed: int):
    """A task on two types whose space brute force can exhaust in about a second."""
    rng = random.Random(seed)
    layers, hidden = rng.randint(2, 6), rng.choice((512, 1024, 2048))
    kind = rng.random()
    if kind < 0.5:
        model, engine = (
            llama(layers, hidden, 8, rng.choice((2, 8)), 3 * hidden, vocab=32000),
            rng.choice(("bundled", "megatron")),
        )
    elif kind < 0.65:
        model, engine = gpt(layers, hidden, 8, vocab=32000, tied=rng.random() < 0.5), "megatron"
    elif kind < 0.85:
        model, engine = mixed(rng.choice(("dense first", "alternating", "encoder", "random")), layers, 512, rng), "megatron"
    else:
        model, engine = mixture(rng.randint(2, 4), 512, 4, 2, 512, 0), "megatron"
    node = rng.choice((2, 4))
    devices = rng.choice(((2, 2), (4, 4), (2, 6), (8, 4), (4, 8)) if node == 2 else ((4, 4), (8, 4), (4, 8)))
    scarce = [2.2 + 18 * model.total_params / 2**30 / sum(devices) * rng.uniform(0.4, 3.0) + rng.choice((0.05, 0.5, 4.0))
              for _ in range(2)]  # fmt: skip
    machines = [machine(rng, name, memory, node) for name, memory in zip("ab", scarce, strict=True)]
    t = task(model, sum(devices), rng.choice((512, 1024)), rng.choice((4, 8, 12)), engine, machines[0])
    t = on_two(t, *machines, devices)
    found = engine_named(engine)
    return t, found, declared_space(t, found, some_pins(rng), ["cp"])


def row_value(t: Task, x: LayoutArray, row: int, modes: tuple[int, ...]) -> int | None:
    """The least step time of an outer row over every split and recompute; a stage's type and link reckoned here."""
    one = x.take(np.array([row]))
    pp, group = int(one.pp[0]), int(one.tp[0] * one.cp[0] * one.dp[0])
    order = (1, 0) if int(one.type_order[0]) else (0, 1)
    types = [i for i in order for _ in range(t.types[i].gpus // group)]
    assert len(types) == pp
    model, m = t.model, int(one.microbatches[0])
    numbers = range(1) if model.homogeneous else range(len(model.kinds))
    tasks = [[t.on(i) if model.homogeneous else t.on(i).only(k) for k in numbers] for i in range(2)]
    kinds = [[primitives.price(u, one) for u in each] for each in tasks]
    constant = max(int(p.constant[0]) for each in kinds for p in each)
    best, seen = None, {}
    for split in splits(model.n_layers, pp, 1):
        counts = step.layers_by_kind(t, one.layout(0, [Stage(layers=n) for n in split]))
        times, onces = [], []
        for s, n in enumerate(split):
            place = (s, tuple(counts[s].tolist()))
            if place not in seen:
                seen[place] = _best_stage(t, one, kinds, types, s, counts[s], mixes(n, modes, False))
            if seen[place] is None:
                break
            times.append(seen[place][0])
            onces.append(seen[place][1])
        else:
            value = (m - 1) * max(times) + sum(times) + max(onces) + constant
            best = value if best is None else min(best, value)
    return best


def _best_stage(t: Task, one: LayoutArray, kinds, types, s: int, counts, options) -> tuple[int, int] | None:
    """(R, D) of the recompute that fits and takes least (a step never gains by a stage that takes longer), None without."""
    beside = (s > 0 and types[s - 1] != types[s]) or (s < len(types) - 1 and types[s + 1] != types[s])
    priced = [_blended(t, each, counts) for each in kinds]
    p = priced[types[s]]
    if beside:
        p = replace(p, p2p=np.maximum(priced[0].p2p, priced[1].p2p))
    same = np.zeros(len(options), dtype=np.int64)
    n1, n2 = np.array(options, dtype=np.int64).reshape(-1, 2).T
    held = StageArray(same, same + s, same + 1, same + int(counts.sum()), n1, n2)
    cost = step.stage_cost(p, one, held, p.take(same))
    fitting = np.nonzero(cost.allocated <= p.capacity[0])[0]
    return min(((int(cost.time[i]), int(cost.once[i])) for i in fitting), default=None)


def _blended(t: Task, kinds: list[Primitives], counts) -> Primitives:
    return kinds[0] if t.model.homogeneous else blend(kinds, counts[None], t.model.text_kind)


def values_of(t: Task, engine, space) -> tuple[LayoutArray, list[int | None]]:
    x = enumerate_rows(t, engine, space).layouts
    return x, [row_value(t, x, row, space.modes) for row in range(len(x))]


def check(seed: int) -> bool:
    t, engine, space = instance(seed)
    x, values = values_of(t, engine, space)
    outcome = search(t, engine, space, k=3)
    c = outcome.counts
    assert c.by_rule + c.by_memory + c.by_bound + c.exact == c.enumerated, seed
    assert c.by_memory == sum(v is None for v in values), seed
    finite = [v for v in values if v is not None]
    assert outcome.status == ("optimal" if finite else "infeasible"), seed
    if finite:
        assert outcome.candidates[0].step_ns == min(finite) == outcome.bound_ns, seed
        for c in outcome.candidates:
            assert values[c.row] == c.step_ns, seed
            assert int(devicetypes.layout_cost(t, c.layout).total.step[0]) == c.step_ns, seed
    _check_bounds(t, space, x, values)
    return bool(finite)


def _check_bounds(t: Task, space, x: LayoutArray, values: list[int | None]) -> None:
    if not len(x):
        return
    p, stack = solve.price(t, x)
    for rows in bounds.same_pipeline(x, np.arange(len(x)), t.model):
        g = solve.group_of(t, space.modes, x, p, stack, rows)
        exact = np.array([-1 if values[r] is None else values[r] for r in rows])
        fits = solve.memory_feasible(t, g)
        assert np.all(fits[exact >= 0])  # rounded means of mixed layers may let through what fits by a few bytes only
        simple = hetero.simple_bound(t, g)
        assert np.all(simple[exact >= 0] <= exact[exact >= 0])
        for factor in (1.0001, 1.05, 2.0):
            if np.any(exact >= 0):
                target = int(exact[exact >= 0].min() * factor)
                bound = hetero.target_bound(t, g, target)
                assert np.all(bound[exact >= 0] <= np.minimum(exact, target)[exact >= 0])


@pytest.mark.parametrize("seed", [*range(10), *(pytest.param(s, marks=pytest.mark.slow) for s in range(10, 60))])
def test_search_equals_brute_force(seed):
    check(seed)


def test_two_equal_types_are_one_type():
    """Where one type has the same layout, two equal ones take the same time; and their search finds no other optimum there."""
    model, device = llama(6, 2048, 16, 8, 5632), profile(memory="9 GiB", node_size=4)
    engine = engine_named("bundled")
    one = task(model, 16, 2048, 32, "bundled", device)
    pins = {"pp": [4, 8, 2], "schedule": ["1f1b", "gpipe"], "micro_batch": [1, 2]}
    two = on_two(one, device.model_copy(update={"name": "a"}), device.model_copy(update={"name": "b"}), (8, 8))
    alone, both = (search(t, engine, declared_space(t, engine, pins, []), k=6) for t in (one, two))
    assert alone.status == both.status == "optimal"
    times = {c.layout.pp: c.step_ns for c in alone.candidates if c.layout.tp == both.candidates[0].layout.tp}
    assert both.candidates[0].step_ns == alone.candidates[0].step_ns
    assert times
    for c in both.candidates:
        again = devicetypes.layout_cost(one, c.layout.model_copy(update={"type_order": "as-named"})).total
        assert int(again.step[0]) == c.step_ns


@pytest.mark.parametrize("seed", range(3))
def test_better_devices_of_one_type_are_never_slower(seed):
    t, engine, space = instance(600 + seed)
    first, second = t.types
    device = second.hardware.device
    memory = device.memory.model_copy(update={"value": f"{int(device.memory.base) * 2} B"})
    memory.__dict__.pop("base", None)
    rate = device.memory_bandwidth.model_copy(update={"value": "6 TB/s"})
    rate.__dict__.pop("base", None)
    before = search(t, engine, space, k=1)
    for change in ({"memory": memory}, {"memory_bandwidth": rate}):
        better = second.hardware.model_copy(update={"device": device.model_copy(update=change)})
        after = search(on_two(t, first.hardware, better, (first.gpus, second.gpus)), engine, space, k=1)
        if before.candidates:
            assert after.candidates
            assert after.candidates[0].step_ns <= before.candidates[0].step_ns


def test_every_stage_is_wholly_on_one_type():
    t, engine, _ = instance(3)
    space = declared_space(t, engine, {}, [])
    rows = enumerate_rows(t, engine, space)
    x = rows.layouts
    assert set(x.type_order.tolist()) == {0, 1}
    assert all(n % q == 0 for n in t.type_sizes for q in (x.tp * x.cp * x.dp).tolist())
    assert np.all(x.virtual_stages == 1)
    assert np.all(x.order == 0)
    assert rows.rejected["device types: whole stages"] > 0
