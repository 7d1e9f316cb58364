"""Interleaved rows whose chunks are unequal: against brute force, bounds, and the verifier's own code."""

from __future__ import annotations

import random

import numpy as np
import pytest
from machines import llama, profile, task
from verify.plans import checked, made

from planner.engines.registry import engine_named
from planner.search.solve import search
from planner.search.space import Space, declared_space, enumerate_rows
from planner.search.windows import windows
from planner.specs.layout import chunk_layers, even_stages
from planner.specs.model import Model
from search.brute import all_rows
from search.grids import solved, violations

PLAIN = {"attention": {"heads": 8, "kv_heads": 4}, "mlp": {"kind": "gated", "width": 2048}}
LOCAL = PLAIN | {"attention": {"heads": 8, "kv_heads": 4, "sliding_window": 128}}
ROUTED = PLAIN | {"mlp": {"kind": "gated", "width": 512, "experts": 4, "top_k": 2}}


def sequence(*groups: tuple[dict, int]) -> Model:
    layers = [group | {"count": count} for group, count in groups]
    return Model.model_validate({"name": "test-sequence", "hidden": 512, "vocab": 32000, "layers": layers})


def instance(kind: str, seed: int):
    """An interleaved task: layers of one kind that no v divides, two blocks, or three kinds; memory loose or tight."""
    rng = random.Random(seed)
    n = rng.choice((7, 9, 11, 13))
    if kind == "one kind":
        model = llama(n, 512, heads=8, kv_heads=4, width=2048)
    elif kind == "two blocks":
        first = rng.randint(1, 4)
        model = sequence((PLAIN, first), (ROUTED, n - first))
    else:
        model = sequence(*((rng.choice((PLAIN, LOCAL, ROUTED)), 1) for _ in range(n)))
    gpus, memory = rng.choice((4, 8)), rng.choice((2.1, 2.3, 2.6, 4.0)) + rng.uniform(0, 0.3)
    t = task(model, gpus, 1024, 16, rng.choice(("megatron", "torchtitan")), profile(memory=f"{memory:.3f} GiB", node_size=4))
    pins: dict[str, list[object]] = {"schedule": ["interleaved"], "pp": [2, 3, 4], "tp": [1], "micro_batch": [1, 2]}
    pins |= {"offload": ["none"], "ep": [1], "order": ["tp-cp-dp-pp"]}
    return t, engine_named(t.accounting.name), pins


KINDS = ("one kind", "two blocks", "three kinds")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_interleaved_rows_equal_brute_force_and_verify(kind, seed):
    t, engine, pins = instance(kind, seed)
    space = declared_space(t, engine, pins, ["cp"])
    values = all_rows(t, engine, space)[1]
    outcome, finite = search(t, engine, space, k=2), [v for v in values if v is not None]
    assert outcome.counts.by_memory == values.count(None)
    assert [c.step_ns for c in outcome.candidates[:1]] == ([min(finite)] if finite else [])
    plan = made(t, engine.name, pins, ["cp"])
    assert (plan is None) == (not finite)
    if plan is not None:
        assert checked(plan).passed, checked(plan).reason


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_never_exceed_the_exact_values_of_interleaved_rows(kind):
    t, engine, pins = instance(kind, 1)
    g = solved(t, engine.name, declared_space(t, engine, pins, ["cp"]))
    assert np.any(t.model.n_layers % g.layouts.virtual_stages > 0)
    assert violations(g) == {"memory": 0, "simple": 0, "target": 0}


@pytest.mark.parametrize(("layers", "v", "pp"), [(7, 2, 3), (61, 4, 8), (61, 2, 16), (125, 16, 4), (9, 4, 2), (12, 4, 3)])
def test_windows_are_the_chunks_of_a_layout(layers, v, pp):
    """The windows that ranks hold join to the layers that the layout's chunks hold, in the order of stages."""
    kinds = tuple(random.Random(layers).choices(range(3), k=layers))
    w, stages = windows(kinds, v, layers), even_stages(layers, pp, virtual_stages=v)
    assert sum(s.layers for s in stages) == layers
    assert min(s.layers for s in stages) >= v
    chunks, start = [chunk_layers(s.layers, v) for s in stages], 0
    begins = np.cumsum([0, *(rank[c] for c in range(v) for rank in chunks)])
    for s, stage in enumerate(stages):
        size = -(-stage.layers // v)
        counts = w.counts[w.at[start, size]]
        for c in range(v):
            first = begins[c * pp + s]
            held = np.bincount(kinds[first : first + chunks[s][c]], minlength=max(kinds) + 1)
            assert counts[c].tolist() == held.tolist()
        start += size
    assert start == w.positions


def test_declared_numbers_of_chunks():
    """Divisors of the layers and powers of two; a pin may name any number."""
    t, engine = task(llama(61, 512, 8, 4, 2048), 16, 1024, 16, "megatron"), engine_named("megatron")

    def chunks(space: Space) -> list[int]:
        return sorted({int(v) for v in enumerate_rows(t, engine, space).layouts.virtual_stages})

    assert chunks(declared_space(t, engine, {"pp": [4]}, [])) == [1, 2, 4, 8]
    assert chunks(declared_space(t, engine, {"pp": [4], "vpp": [3, 4]}, [])) == [3, 4]
