"""MFU and HFU by hand: FLOPs of a small model written out, and what each recompute mode of an engine repeats."""

from __future__ import annotations

import pytest
from machines import llama, mixture, task

from planner.planning.estimate import estimate_layout
from planner.planning.utilisation import forward_flops, repeated_flops, utilisation
from planner.specs.layout import Layout, Stage

H, KV, WIDTH, S, LAYERS, VOCAB = 1024, 512, 2816, 2048, 8, 32000
PRODUCTS = 2 * (H * H + 2 * H * KV + H * H + 3 * H * WIDTH)
"""Forward FLOPs a token of one layer's products."""
ATTENTION = 4 * H * S
"""Of its scores and weighted sums, every query against every key."""


def layout(*recompute: str) -> Layout:
    each = LAYERS // len(recompute)
    stages = [Stage(layers=each, recompute=mode) for mode in recompute]
    schedule = "none" if len(stages) == 1 else "1f1b"
    return Layout(tp=1, cp=1, pp=len(stages), dp=8 // len(stages), zero=1, micro_batch=1, schedule=schedule, stages=stages)


def test_a_layer_by_kind_of_operator():
    t = task()
    parts = forward_flops(t, t.model.layers[0])
    assert parts == {"gemm": PRODUCTS, "experts": 0.0, "attention": pytest.approx(ATTENTION)}


def test_conventions():
    u = utilisation(task(), layout("none"), 1e4)
    full = LAYERS * 3 * (PRODUCTS + ATTENTION) + 6 * VOCAB * H
    causal = LAYERS * 3 * (PRODUCTS + ATTENTION / 2) + 6 * VOCAB * H
    assert u.mfu == pytest.approx(full * 1e4 / 989e12)
    assert u.mfu_causal == pytest.approx(causal * 1e4 / 989e12, rel=1e-3)  # (s + 1) / 2 keys
    assert u.hfu == u.mfu


@pytest.mark.parametrize(("engine", "modes", "expected"), [
    ("megatron", ["selective"], LAYERS * ATTENTION),
    ("bundled", ["selective"], LAYERS * PRODUCTS),
    ("torchtitan", ["selective"], LAYERS * PRODUCTS / 2),
    ("megatron", ["full"], LAYERS * (PRODUCTS + ATTENTION)),
    ("megatron", ["full", "none"], LAYERS / 2 * (PRODUCTS + ATTENTION)),
    ("megatron", ["full:1", "selective:2"], PRODUCTS + 3 * ATTENTION),
])  # fmt: skip
def test_recompute_repeats_what_the_engine_repeats(engine, modes, expected):
    assert repeated_flops(task(engine=engine), layout(*modes)) == pytest.approx(expected)


def test_full_recompute_is_one_more_forward_of_experts_too():
    t = task(mixture(layers=LAYERS), engine="megatron")
    one = sum(forward_flops(t, t.model.layers[0]).values())
    assert forward_flops(t, t.model.layers[0])["experts"] == 2 * 2 * 3 * 1024 * 1024
    assert repeated_flops(t, layout("full")) == pytest.approx(LAYERS * one)


def test_an_estimate_names_its_convention():
    e = estimate_layout(task(llama(), engine="megatron"), layout("selective"))
    assert e.mfu_causal < e.mfu < e.hfu
    assert "full attention" in e.flops_convention
