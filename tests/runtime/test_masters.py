"""Masters beside bf16 parameters against the same job under FSDP2, and the AdamW that serves both against torch's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plans
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from planner.runtime import adamw, masters, optim
from planner.runtime.logs import RankLog
from planner.runtime.loop import Run
from planner.runtime.train import Trainer
from planner.specs.training import Options

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def _trained(**options: Any) -> tuple[list[tuple[float, float, float]], list[Tensor], Trainer]:
    trainer = Trainer(plans.plan(precision="bf16", **options), CPU, Options(lr=1e-2, steps=20))
    steps = [trainer.train_step(i) for i in range(4)]
    weights = [masters.values(p).detach() for p in trainer.parameters()]
    return steps, [w.full_tensor() if hasattr(w, "full_tensor") else w for w in weights], trainer


@pytest.mark.parametrize("micro_batch", [8, 2])
@pytest.mark.parametrize(("engine", "recompute"), [("bundled", "none"), ("bundled+selective-products", "selective")])
def test_masters_train_as_fsdp2_does(micro_batch: int, engine: str, recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"micro_batch": micro_batch, "engine": engine, "recompute": recompute}
    steps, weights, trainer = _trained(**options)
    assert {p.dtype for p in trainer.parameters()} == {torch.bfloat16}
    assert all(w.dtype == torch.float32 for w in weights)
    monkeypatch.setattr(masters, "lowered", lambda *_: False)
    expected, whole, other = _trained(**options)
    assert {p.dtype for p in other.parameters()} == {torch.float32}
    assert [s[0] for s in steps] == [s[0] for s in expected]
    assert all(torch.equal(a, b) for a, b in zip(weights, whole, strict=True))


def _run(out: Path, steps: int, **options: Any) -> list[float]:
    log = RankLog(out / "logs", 0)
    plan = plans.plan(precision="bf16", micro_batch=4)
    Run(plan, CPU, Options(steps=steps, out=str(out), lr=1e-2, lr_schedule="constant", log_every=100, **options), log).train()
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("lowered_first", [True, False])
def test_checkpoints_pass_between_masters_and_fsdp2(
    lowered_first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _run(tmp_path / "whole", 4)
    folder = str(tmp_path / "checkpoints")
    for steps, lowered in ((2, lowered_first), (4, not lowered_first)):
        with monkeypatch.context() as patched:
            if not lowered:
                patched.setattr(masters, "lowered", lambda *_: False)
            losses = _run(tmp_path / "parts", steps, checkpoint_dir=folder, save_every=1)
    assert losses == whole


def test_gradients_of_several_microbatches_add_up_in_fp32() -> None:
    trainer = Trainer(plans.plan(precision="bf16", micro_batch=2), CPU, Options(lr=1e-2, steps=20))
    trainer.forward_backward(0)
    sums = [masters.gradient(p) for p in trainer.parameters()]
    assert all(s is not None and s.dtype == torch.float32 for s in sums)
    assert all(p.grad is None for p in trainer.parameters())
    trainer.optimizer_step(0)
    assert all(masters.gradient(p) is None for p in trainer.parameters())


def test_states_in_bf16_keep_no_masters() -> None:
    steps, _, trainer = _trained(engine="bundled+bf16-states", micro_batch=2)
    kinds = {v.dtype for state in trainer.optimizer.state.values() for k, v in state.items() if k != "step"}
    assert kinds == {torch.bfloat16}
    assert steps[-1][0] < steps[0][0]


@pytest.mark.parametrize("clip", [None, 0.3])
def test_adamw_is_torchs(clip: float | None) -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.arange(90_000, dtype=torch.float32).view(300, 300).sin()) for _ in range(2))
    mine = optim.build_optimizer([ours], 1e-2)
    reference = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for _ in range(3):
        gradient = torch.randn(300, 300)
        ours.grad, theirs.grad = gradient.clone(), gradient * (1.0 if clip is None else clip)
        mine.clip = None if clip is None else torch.tensor(clip)
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_compiled_arithmetic_is_the_same(kind: torch.dtype) -> None:
    """What CUDA runs, called without compiling."""
    torch.manual_seed(0)
    values = adamw.Values(1e-2, 0.9, 0.95, 1e-8, 0.1)
    weight, gradient = torch.randn(1000), torch.randn(1000).to(kind)
    states = [torch.zeros(1000), torch.zeros(1000)]
    others = [weight.clone(), *(s.clone() for s in states)]
    low, same = weight.bfloat16(), weight.bfloat16()
    for step in (1, 2, 3):
        at, clip = adamw.coefficients(values, step, CPU), torch.tensor(0.5)
        adamw.update(weight, gradient, *states, at, values, clip, low)
        adamw.arithmetic(others[0], gradient, *others[1:], at, *values[1:4], clip, same)
    torch.testing.assert_close(others[0], weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(same, others[0].bfloat16())
    assert torch.equal(low, weight.bfloat16())
