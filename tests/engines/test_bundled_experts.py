"""What the bundled engine takes of experts and latent attention, and a mixture of experts planned for it."""

from __future__ import annotations

from typing import Any

import pytest
from machines import task

import planner
from planner.engines.base import layout_problems
from planner.engines.registry import engine_named
from planner.specs.layout import Layout
from planner.specs.model import Model

GROUPED: dict[str, Any] = {"heads": 16, "kv_heads": 8}
LATENT: dict[str, Any] = {"kind": "latent", "heads": 16, "head_dim": 96, "rope_dim": 32, "kv_lora_rank": 128}
DENSE: dict[str, Any] = {"kind": "gated", "width": 2048}
ROUTED: dict[str, Any] = {"kind": "gated", "width": 512, "experts": 8, "top_k": 2}


def model(attention: dict[str, Any], *mlps: dict[str, Any]) -> Model:
    layers = [{"count": 2, "attention": attention, "mlp": mlp} for mlp in mlps]
    return Model.model_validate({"name": "m", "hidden": 1024, "vocab": 32000, "layers": layers})


@pytest.mark.parametrize(
    ("built", "gpus", "named", "expected"),
    [
        (model(GROUPED, DENSE, ROUTED), 8, {"dp": 8, "ep": 8, "zero": 3}, set()),
        (model(GROUPED, ROUTED), 8, {"tp": 2, "dp": 4, "ep": 4, "zero": 1}, set()),
        (model(GROUPED, ROUTED), 8, {"tp": 2, "dp": 4, "ep": 2, "etp": 2, "zero": 2}, set()),
        (model(GROUPED, ROUTED), 8, {"tp": 4, "dp": 2, "etp": 2}, set()),
        (model(GROUPED, ROUTED), 8, {"dp": 8, "ep": 16}, {"PLN216", "PLN217"}),
        (model(GROUPED, ROUTED | {"bias": True}), 2, {"dp": 2}, {"PLN591"}),
        (model(LATENT, DENSE, ROUTED), 8, {"tp": 4, "dp": 2, "ep": 4}, set()),
        (model(LATENT | {"qk_norm": "head"}, DENSE), 2, {"dp": 2}, {"PLN592"}),
        (model(LATENT, DENSE), 2, {"cp": 2}, {"PLN594"}),
        (model(GROUPED, ROUTED), 4, {"dp": 4, "zero": 3, "shard": 2}, {"PLN509"}),
        (model(GROUPED, ROUTED), 4, {"dp": 4, "zero": 1, "offload": "optimizer"}, {"PLN595"}),
        (model(GROUPED | {"sinks": True}, ROUTED), 2, {"dp": 2}, {"PLN517"}),
        (model(GROUPED | {"sliding_window": 64}, DENSE, ROUTED), 2, {"dp": 2}, set()),
    ],
)
def test_accepts_and_refuses(built: Model, gpus: int, named: dict[str, Any], expected: set[str]) -> None:
    layout = Layout(sequence_parallel=named.get("tp", 1) > 1, stages=[{"layers": built.n_layers}], **named)
    found = layout_problems(task(built, gpus, 2048, 32, "bundled"), engine_named("bundled"), layout)
    assert {p.code for p in found} == expected


def test_a_refusal_names_what_is_not_built() -> None:
    built = model(GROUPED | {"sinks": True}, ROUTED)
    layout = Layout(stages=[{"layers": 2}])
    (problem,) = layout_problems(task(built, 1, 2048, 32, "bundled"), engine_named("bundled"), layout)
    assert "attention sinks" in problem.what
    assert "routed experts" in problem.why


def test_a_mixture_of_experts_is_planned_to_a_proof() -> None:
    job = {"gpus": 16, "seq_len": 4096, "global_batch": 256, "engine": "bundled"}
    plan = planner.plan("qwen3-30b-a3b", "h100-sxm", **job)
    assert plan.certificate.status == "optimal"
    assert plan.layout.ep > 1
    assert plan.estimate.memory.fits
    by_hand = planner.estimate("qwen3-30b-a3b", "h100-sxm", layout={"ep": 16, "zero": 3, "recompute": "full"}, **job)
    assert plan.certificate.objective <= by_hand.estimate.step_time_s
