"""Routing against plain sums over experts; what ep moves; expert checkpoints between expert-parallel degrees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from launching import HERE, launch

from planner.runtime import moe
from planner.runtime.experts import gradient_scale
from planner.specs.layers import Mlp
from planner.specs.layout import Layout, Stage

SPEC = Mlp(kind="gated", width=12, experts=5, top_k=2)


def module(spec: Mlp) -> moe.Moe:
    torch.manual_seed(1)
    built = moe.Moe(8, spec, None)
    for param in built.parameters():
        torch.nn.init.normal_(param)
    return built


def by_hand(m: moe.Moe, x: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
    """Every expert on every token, weighted by its score or zero."""
    flat = x.reshape(-1, x.shape[-1])
    top, chosen = F.linear(flat, m.router.weight).topk(m.spec.top_k)
    scores = top.softmax(-1) if kept is None else top.softmax(-1) * kept
    weights = torch.zeros(len(flat), m.spec.experts).scatter(1, chosen, scores)
    e = m.experts
    every = []
    for i in range(m.spec.experts):
        inner = (
            F.silu(flat @ e.w1[i].T) * (flat @ e.w3[i].T) if e.w3 is not None else F.gelu(flat @ e.w1[i].T, approximate="tanh")
        )
        every.append(inner @ e.w2[i].T)
    return (weights[:, :, None] * torch.stack(every, 1)).sum(1).view_as(x)


@pytest.mark.parametrize("kind", ["gated", "gelu"])
def test_dropless_is_the_weighted_sum_of_experts(kind: str) -> None:
    built = module(SPEC.model_copy(update={"kind": kind}))
    x = torch.randn(2, 7, 8, requires_grad=True)
    grad = torch.randn(2, 7, 8)
    wanted = torch.autograd.grad(by_hand(built, x), [x, *built.parameters()], grad)
    out = built(x)
    torch.testing.assert_close(out, by_hand(built, x))
    for mine, theirs in zip(torch.autograd.grad(out, [x, *built.parameters()], grad), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_an_expert_without_tokens_has_a_zero_gradient() -> None:
    built = module(SPEC)
    with torch.no_grad():
        built.router.weight[3] = 0
        built.router.weight[:3] = built.router.weight[:3].abs()
    x = torch.rand(1, 4, 8) + 0.1  # positive: expert 3 scores 0, the first three more
    built(x).sum().backward()
    assert built.experts.w1.grad is not None
    assert float(built.experts.w1.grad[3].abs().max()) == 0
    assert float(built.experts.w1.grad.abs().max()) > 0


def test_capacity_keeps_the_highest_scores() -> None:
    spec = SPEC.model_copy(update={"capacity": 0.5})
    built = module(spec)
    x = torch.randn(2, 10, 8, requires_grad=True)
    capacity = moe.capacity_rows(20, spec)
    assert capacity == 4  # 0.5 * 20 * 2 / 5
    scores, chosen = built.router(x.reshape(-1, 8))
    kept = torch.zeros_like(scores)
    for expert in range(spec.experts):
        places = sorted((-float(scores.detach()[t, j]), t, j) for t, j in (chosen == expert).nonzero().tolist())
        for _, t, j in places[:capacity]:
            kept[t, j] = 1
    assert 0 < float(kept.sum()) < kept.numel()
    out, wanted = built(x), by_hand(built, x, kept)
    torch.testing.assert_close(out, wanted)
    grad = torch.randn_like(out)
    tensors = [x, *built.parameters()]
    for mine, theirs in zip(torch.autograd.grad(out, tensors, grad), torch.autograd.grad(wanted, tensors, grad), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_gradient_scale_makes_up_for_other_groups() -> None:
    layout = Layout(tp=2, dp=6, ep=3, zero=1, sequence_parallel=True, stages=[Stage(layers=1)])
    assert gradient_scale(layout) == pytest.approx(4 / 6)
    built, scaled = module(SPEC), module(SPEC)
    scaled.gradient_scale = 4 / 6
    x = torch.randn(1, 9, 8, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    built(x).square().sum().backward()
    scaled(y).square().sum().backward()
    near = {"rtol": 1e-4, "atol": 1e-3}
    torch.testing.assert_close(x.grad, y.grad, **near)
    torch.testing.assert_close(built.router.weight.grad, scaled.router.weight.grad, **near)
    for mine, theirs in zip(scaled.experts.parameters(), built.experts.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad * 4 / 6, **near)


@pytest.mark.timeout(200)
def test_exchanges_and_checkpoints(tmp_path: Path) -> None:
    done = launch([str(HERE / "moe_worker.py"), str(tmp_path)], 800)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    # Two exchanges of rows a routed layer and micro-batch each way, two more in full recompute, and one of counts with each
    # forward: 2 layers, 2 micro-batches.
    assert found["none"]["exchanges"] == 2 * 2 * (2 + 2)
    assert found["full"]["exchanges"] == 2 * 2 * (2 + 2 + 2)
    assert found["none"]["counts"] == 2 * 2
    assert found["full"]["counts"] == 2 * 2 * 2
    # Each way every rank sends, or gets back, a row of h for each of its T k choices: 2 sequences of 16 tokens, k = 2,
    # h = 32, fp32. However uneven, both ranks together send that.
    rows = 2 * 16 * 2 * 32 * 4
    assert found["none"]["sent"] == 2 * found["none"]["exchanges"] * rows
    # A checkpoint of ep 2 and ZeRO 3 read into ep 1, and back: whole tensors are equal.
    assert found["shapes"]["layers.1.mlp.experts.w1"] == [8, 24, 32]
    assert found["w2"] == ["ep", 0]
    assert found["differences"] == 0
