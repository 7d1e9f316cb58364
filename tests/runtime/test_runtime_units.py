"""Parts of the runtime that need no second process."""

from __future__ import annotations

import gc
import os
from types import SimpleNamespace
from typing import Any

import cases
import numpy as np
import plans
import pytest
import torch

from planner.errors import InputError
from planner.runtime import optim, pipeline
from planner.runtime.data import SyntheticTokens
from planner.runtime.mesh import check_world_size, start_processes
from planner.runtime.meter import Meter
from planner.runtime.norms import Norm
from planner.runtime.precision import LossScale
from planner.runtime.train import Options, Trainer


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process group of this process only, one a test run."""
    if not torch.distributed.is_initialized():
        monkeypatch.setenv("MASTER_PORT", str(29000 + os.getpid() % 900))
    start_processes(plans.plan())


def test_stages_are_numbered_chunk_major() -> None:
    layout = plans.plan(plans.llama(7), pp=2, schedule="interleaved", virtual_stages=2, layers=[3, 4]).layout
    assert layout.chunk_ranges == [[range(2), range(4, 5)], [range(2, 4), range(5, 7)]]


@pytest.mark.parametrize("rank", [0, 1])
def test_stages_of_a_v_go_down_and_up_again(rank: int) -> None:
    """The first rank holds both ends of the model, and computes the loss."""
    made = plans.plan(plans.llama(8), pp=2, schedule="zbv", virtual_stages=2)
    world: Any = SimpleNamespace(pp_rank=rank)
    parts = pipeline.build_parts(made, world)
    held = {stage: list(part.layers) for stage, part in parts.items()}
    assert held == ({0: ["0", "1"], 3: ["6", "7"]}, {1: ["2", "3"], 2: ["4", "5"]})[rank]
    assert [part.tok is not None for part in parts.values()] == [rank == 0, False]
    assert [part.head is not None for part in parts.values()] == [False, rank == 0]
    assert made.layout.last_rank == 0


def test_wrong_number_of_processes_is_one_clear_message() -> None:
    with pytest.raises(InputError, match=r"3 processes were started, the plan needs 4[\s\S]*tp2 x dp2"):
        check_world_size(plans.plan(tp=2, dp=2), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = Norm(48, "rmsnorm", False, 1e-5)
    weight = (torch.rand(48) + 0.5).to(dtype)
    norm.weight = torch.nn.Parameter(weight.clone())
    x = torch.randn(3, 700, 48).to(dtype).requires_grad_()
    theirs, w = x.detach().clone().requires_grad_(), weight.clone().requires_grad_()
    grad = torch.randn(3, 700, 48).to(dtype)
    out, expected = norm(x), torch.nn.functional.rms_norm(theirs, (48,), w, 1e-5)
    out.backward(grad)
    expected.backward(grad)
    close = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(out, expected, **close)
    torch.testing.assert_close(x.grad, theirs.grad, **close)
    torch.testing.assert_close(norm.weight.grad, w.grad, **(close if dtype == torch.float32 else {"rtol": 3e-2, "atol": 1.0}))


def test_synthetic_tokens_depend_on_seed_and_sample_only() -> None:
    tokens = SyntheticTokens(1000, 7, 99)
    first = tokens.sequence(35)
    assert len(first) == 100
    assert (first == SyntheticTokens(1000, 7, 99).sequence(35)).all()
    assert (first != tokens.sequence(36)).any()
    assert (first != SyntheticTokens(1000, 8, 99).sequence(35)).any()
    assert first.min() >= 0
    assert first.max() < 64


def test_learning_rate_warms_up_then_falls() -> None:
    rates = [optim.learning_rate(step, Options(steps=100, lr=1.0)) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_learning_rate_schedules() -> None:
    def rates(kind: str, **changes: Any) -> list[float]:
        options = Options(steps=100, lr=2.0, lr_schedule=kind, warmup_steps=10, **changes)
        return [optim.learning_rate(step, options) for step in range(101)]

    assert rates("constant")[9:] == [2.0] * 92
    linear = np.diff(rates("linear", min_lr=0.0)[10:])
    assert linear == pytest.approx([-2.0 / 90] * 90)
    stable = rates("wsd", min_lr=0.5)
    assert stable[10:81] == [2.0] * 71
    assert stable[100] == pytest.approx(1.0)
    assert optim.learning_rate(0, Options(lr=1.0, warmup_steps=0)) == 1.0


def test_meter_counts_what_lives() -> None:
    kept = torch.zeros(1000)
    gc.collect()
    meter = Meter()
    with meter:
        base = meter.current
        a = torch.ones(1024)
        assert meter.current - base == 4096
        b = a.view(32, 32)
        assert meter.current - base == 4096
        del a
        assert meter.current - base == 4096, "the view keeps the storage"
        c = b + kept[0]
        assert meter.current - base == 8192
        c.untyped_storage().resize_(0)
        assert meter.current - base == 4096
        del b, c
        assert meter.current == base
        (torch.ones(1) + 1).item()
    assert meter.peak - base == 8192


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("model", list(cases.MODELS.values()))
def test_parameters_are_those_of_the_spec(model: plans.Model) -> None:
    trainer = Trainer(plans.plan(model), torch.device("cpu"))
    assert sum(p.numel() for p in trainer.parameters()) == model.total_params


@pytest.mark.usefixtures("alone")
def test_overflow_skips_the_step_and_halves_the_scale() -> None:
    trainer = Trainer(plans.plan(precision="fp16"), torch.device("cpu"), Options(lr=1e-2, steps=20))
    before = [p.detach().clone() for p in trainer.parameters()]
    trainer.scale.value = 2.0**40
    _, norm, _ = trainer.train_step(0)
    assert not np.isfinite(norm)
    assert (trainer.scale.value, trainer.scale.skipped) == (2.0**39, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters(), strict=True))
    trainer.scale.value = trainer.scale.START
    _, norm, _ = trainer.train_step(1)
    assert np.isfinite(norm)
    assert trainer.scale.skipped == 1
    assert not all(torch.equal(a, b) for a, b in zip(before, trainer.parameters(), strict=True))


def test_loss_scale_doubles_after_enough_good_steps() -> None:
    scale = LossScale("fp16")
    assert all(scale.accepts(1.0) for _ in range(scale.INTERVAL))
    assert scale.value == 2 * scale.START
    assert not scale.accepts(float("nan"))
    assert scale.value == scale.START
    assert LossScale("bf16").value == 1.0


@pytest.mark.usefixtures("alone")
def test_fp8_says_what_is_missing() -> None:
    plan = plans.plan()
    narrow = plan.model_copy(update={"job": plan.job.model_copy(update={"linears": "fp8"})})
    with pytest.raises(InputError, match=r"PLN519[\s\S]*need a CUDA device"):
        Trainer(narrow, torch.device("cpu"))


@pytest.mark.usefixtures("alone")
def test_loss_falls() -> None:
    trainer = Trainer(plans.plan(micro_batch=4), torch.device("cpu"), Options(lr=1e-2, steps=20))
    losses = [trainer.train_step(step)[0] for step in range(20)]
    assert losses[-1] < losses[0] - 1.5
