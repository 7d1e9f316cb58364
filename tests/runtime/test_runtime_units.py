"""Parts of the runtime that need no second process."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import plans
import pytest
import torch

from planner.errors import InputError
from planner.runtime import optim, pipeline
from planner.runtime.data import FileTokens, SyntheticTokens
from planner.runtime.mesh import check_world_size, start_processes
from planner.runtime.meter import Meter
from planner.runtime.model import Norm
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


def test_synthetic_tokens_depend_on_seed_step_and_index_only() -> None:
    tokens = SyntheticTokens(1000, 7)
    first = tokens.sequence(3, 5, 100)
    assert (first == SyntheticTokens(1000, 7).sequence(3, 5, 100)).all()
    assert (first != tokens.sequence(3, 6, 100)).any()
    assert (first != tokens.sequence(4, 5, 100)).any()
    assert first.min() >= 0
    assert first.max() < 64


def test_token_file(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    np.arange(500, dtype=np.uint16).tofile(path)
    window = FileTokens(path, 500, 0).sequence(0, 0, 17)
    assert (np.diff(window) == 1).all()
    with pytest.raises(InputError, match="too short"):
        FileTokens(path, 500, 0).sequence(0, 0, 501)
    with pytest.raises(InputError, match="outside the vocabulary"):
        FileTokens(path, 10, 0).sequence(0, 0, 400)
    with pytest.raises(InputError, match="cannot read"):
        FileTokens(tmp_path / "none.bin", 10, 0)


def test_learning_rate_warms_up_then_falls() -> None:
    rates = [optim.learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


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
@pytest.mark.parametrize("model", [plans.llama(), plans.gpt(), plans.gpt(tied_embeddings=True)])
def test_parameters_are_those_of_the_spec(model: plans.Model) -> None:
    trainer = Trainer(plans.plan(model), torch.device("cpu"))
    assert sum(p.numel() for p in trainer.parameters()) == model.total_params


@pytest.mark.usefixtures("alone")
def test_loss_falls() -> None:
    trainer = Trainer(plans.plan(micro_batch=4), torch.device("cpu"), Options(lr=1e-2, steps=20))
    losses = [trainer.train_step(step)[0] for step in range(20)]
    assert losses[-1] < losses[0] - 1.5
