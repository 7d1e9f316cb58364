"""Every shipped example that is not a plain dense decoder is planned to a proof, and no hand-made layout beats it."""

from __future__ import annotations

import pytest

import planner

SP, FULL = {"sequence_parallel": True}, {"recompute": "full"}
CASES = {
    "mixtral-8x7b": ("h100-sxm", 64, 4096, 512, "megatron", {"tp": 2, "pp": 4, "ep": 8, "zero": 1, **SP}),
    "qwen3-30b-a3b": ("h100-sxm", 32, 4096, 256, "megatron", {"ep": 8, "zero": 1, **FULL}),
    "qwen3-235b-a22b": ("h200-sxm", 256, 4096, 1024, "megatron", {"tp": 2, "pp": 4, "ep": 16, "zero": 1, **SP}),
    "deepseek-v3": ("h800-sxm", 2048, 4096, 15360, "megatron", {"tp": 2, "pp": 16, "ep": 8, "zero": 1, **SP, **FULL}),
    "llama4-maverick": ("h200-sxm", 256, 8192, 512, "megatron", {"tp": 4, "pp": 4, "ep": 16, "zero": 1, **SP}),
    "gemma3-27b": ("h100-sxm", 64, 8192, 256, "megatron", {"tp": 8, "pp": 2, "zero": 1, **SP}),
    "gpt-oss-120b": ("b200-sxm", 64, 4096, 512, "megatron", {"ep": 32, "zero": 1}),
    "olmo2-32b": ("h100-sxm", 128, 4096, 1024, "torchtitan", {"zero": 3, **FULL}),
    "vit-llm-72b": ("h100-sxm", 256, 8192, 512, "megatron", {"tp": 8, "pp": 4, "zero": 1, **SP, **FULL}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_example_is_planned_to_a_proof(name):
    hardware, gpus, seq_len, batch, engine, layout = CASES[name]
    job = {"gpus": gpus, "seq_len": seq_len, "global_batch": batch, "engine": engine}
    plan = planner.plan(name, hardware, **job)
    assert plan.certificate.status == "optimal"
    assert plan.certificate.space.open == 0
    assert plan.estimate.memory.fits
    assert sum(s.layers for s in plan.layout.stages) == plan.model.n_layers
    by_hand = planner.estimate(name, hardware, layout=layout, **job)
    if by_hand.estimate.memory.fits:
        assert plan.certificate.objective <= by_hand.estimate.step_time_s
    assert 0.05 < plan.estimate.mfu < 0.75


def test_a_70b_is_adapted_on_one_node():
    plan = planner.plan(
        "llama3-70b", "h100-sxm", gpus=8, seq_len=4096, global_batch=64, engine="megatron", adapter={"rank": 16}
    )  # fmt: skip
    assert plan.certificate.status == "optimal"
    assert plan.estimate.memory.fits
    whole = planner.estimate(
        "llama3-70b", "h100-sxm", gpus=8, seq_len=4096, global_batch=64, engine="megatron",
        layout={"tp": 8, **SP, **FULL},
    )  # fmt: skip
    assert not whole.estimate.memory.fits
