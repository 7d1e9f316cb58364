"""What the bundled runtime does not build is refused before anything trains."""

from __future__ import annotations

from typing import Any

import pytest

from planner.cost.task import Subject
from planner.engines.base import layout_problems
from planner.engines.registry import engine_named
from planner.specs.features import features
from planner.specs.job import Job
from planner.specs.layout import Layout, Stage
from planner.specs.model import Model

BASE: dict[str, Any] = {
    "name": "m",
    "hidden": 64,
    "vocab": 128,
    "layers": [{"count": 2, "attention": {"heads": 4}, "mlp": {"kind": "gated", "width": 96}}],
}


def model(attention: dict[str, Any], mlp: dict[str, Any], group: dict[str, Any], whole: dict[str, Any]) -> Model:
    layer = {"count": 2, "attention": {"heads": 4} | attention, "mlp": {"kind": "gated", "width": 96} | mlp} | group
    return Model.model_validate(BASE | {"layers": [layer]} | whole)


@pytest.mark.parametrize(
    ("attention", "mlp", "group", "whole"),
    [
        ({"qkv_bias": True, "qk_norm": "head"}, {"activation": "silu"}, {}, {"tied_embeddings": True}),
        ({}, {"kind": "gelu", "activation": "gelu_tanh"}, {}, {"positions": "learned", "max_positions": 8}),
        ({"rope_share": 0.0}, {}, {}, {"positions": "none"}),
    ],
)
def test_built(attention: Any, mlp: Any, group: Any, whole: Any):
    assert not features(model(attention, mlp, group, whole))


@pytest.mark.parametrize(
    ("attention", "mlp", "group", "whole"),
    [
        ({}, {}, {"norms": "both"}, {}),
        ({}, {}, {"norms": "post"}, {}),
        ({}, {}, {"parallel": True}, {}),
        ({"rope_share": 0.5}, {}, {}, {}),
        ({"qk_norm": "width"}, {}, {}, {}),
        ({"sinks": True}, {}, {}, {}),
        ({"softcap": 50.0}, {}, {}, {}),
        ({"chunk": 16}, {}, {}, {}),
        ({"kind": "linear"}, {}, {}, {}),
        ({}, {"activation": "gelu_tanh"}, {}, {}),
        ({}, {"kind": "gelu", "activation": "relu"}, {}, {}),
        ({}, {}, {}, {"head_bias": True}),
        ({}, {}, {}, {"norm": "layernorm", "norm_weight": False}),
        ({}, {}, {}, {"positions": "alibi"}),
        ({}, {}, {}, {"mtp": 1}),
    ],
)
def test_not_built(attention: Any, mlp: Any, group: Any, whole: Any):
    assert features(model(attention, mlp, group, whole))


@pytest.mark.parametrize(
    ("attention", "group", "whole", "tp", "expected"),
    [
        ({"sliding_window": 16}, {"norms": "both"}, {"head_bias": True}, 2, set()),
        ({"rope_share": 0.5, "chunk": 16}, {"parallel": True, "norms": "shared"}, {}, 2, set()),
        ({"qk_norm": "width"}, {"norms": "post"}, {}, 1, set()),
        ({"qk_norm": "width"}, {}, {}, 2, {"PLN518"}),
        ({"sinks": True}, {}, {}, 1, {"PLN517"}),
        ({}, {}, {"positions": "alibi"}, 1, {"PLN517"}),
    ],
)
def test_refused_by_rule(attention: Any, group: Any, whole: Any, tp: int, expected: set[str]):
    one = model(attention, {}, group, whole)
    layout = Layout(tp=tp, sequence_parallel=tp > 1, stages=[Stage(layers=2)])
    subject = Subject(one, Job(seq_len=64, global_batch=4), tp)
    assert {p.code for p in layout_problems(subject, engine_named("bundled"), layout)} == expected
