"""What only CUDA runs, on two GPUs with NCCL: `python -m pytest tests/runtime/test_cuda.py`. Elsewhere it is skipped."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import plans
import pytest
import torch
import worlds
from torch import Tensor

from planner.runtime import ring
from planner.runtime.train import Options, Trainer
from planner.specs.model import Model

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

TOKENS = 96
"""Of which a rank holds two pieces of 24: fewer than the rows of 32 that the memory-efficient kernel writes."""
NARROW = {"first": 2e-2, "norm": 2e-2, "second": 2e-2, "gradient": 4e-2}
EXACT = dict.fromkeys(NARROW, 1e-4)
CASES: dict[str, tuple[int, dict[str, Any], dict[str, float]]] = {
    "ring-fp32": (2, {"cp": 2, "context": "ring"}, EXACT),
    "ring-fp32-zero3-selective": (2, {"cp": 2, "context": "ring", "zero": 3, "recompute": "selective"}, EXACT),
    "ring-bf16": (2, {"cp": 2, "context": "ring", "precision": "bf16"}, NARROW),
    "ring-bf16-zero3-selective": (
        2, {"cp": 2, "context": "ring", "precision": "bf16", "zero": 3, "recompute": "selective"}, NARROW,
    ),
    "ring-bf16-zero2-full": (2, {"cp": 2, "context": "ring", "precision": "bf16", "zero": 2, "recompute": "full"}, NARROW),
    "ulysses-fp32": (2, {"cp": 2}, EXACT),
    "ulysses-bf16-zero2": (2, {"cp": 2, "precision": "bf16", "zero": 2}, NARROW),
    "offload-zero1": (2, {"dp": 2, "zero": 1, "offload": "optimizer"}, EXACT),
    "offload-zero3-bf16": (2, {"dp": 2, "zero": 3, "offload": "optimizer", "precision": "bf16"}, NARROW),
    "offload-pp2": (2, {"pp": 2, "precision": "bf16"}, NARROW),
}  # fmt: skip


def _model() -> Model:
    """Two query heads of 64 to each key/value head."""
    return plans.llama(hidden=256, width=384)


def _steps(name: str | None, directory: Path) -> dict[str, float]:
    """Two steps of a case, compared with the reference; the reference itself without a name."""
    options: dict[str, Any] = {"micro_batch": 8} if name is None else CASES[name][1]
    plan = plans.plan(_model(), seq_len=TOKENS, **options)
    trainer = Trainer(plan, torch.device("cuda", torch.cuda.current_device()), Options(lr=1e-3, steps=10))
    found = {"first": trainer.forward_backward(0)}
    gradients = {n: g.cpu() for n, g in trainer.named_gradients().items()}
    found["norm"], _ = trainer.optimizer_step(0)
    found["second"] = trainer.forward_backward(1)
    if name is None:
        torch.save((found, gradients), directory / "reference.pt")
        return found
    expected, wanted = torch.load(directory / "reference.pt")
    floor = 1e-3 * expected["norm"]
    worst = max(float((g - wanted[n]).norm() / wanted[n].norm().clamp_min(floor)) for n, g in gradients.items())
    return {"gradient": worst, **{k: abs(found[k] / expected[k] - 1.0) for k in expected}}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with loss and gradients of one GPU in fp32."""
    folder = tmp_path_factory.mktemp("cuda")
    worlds.run(1, _steps, None, folder, cuda=True)
    return folder


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", CASES)
def test_equals_one_gpu(name: str, reference: Path) -> None:
    processes, _, tolerance = CASES[name]
    errors = worlds.run(processes, _steps, name, reference, timeout_s=200, cuda=True)
    assert {k: v for k, v in errors.items() if not v < tolerance[k]} == {}


@pytest.mark.parametrize("kernel", [ring.Flash, ring.Efficient])
@pytest.mark.parametrize("causal", [True, False])
def test_kernels(kernel: Any, causal: bool) -> None:
    """The kernels as the ring calls them, against attention written out, in fp64."""
    dtype = torch.bfloat16 if kernel is ring.Flash else torch.float32
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(heads: int) -> Tensor:
        return torch.randn(2, heads, 40, 64, generator=generator, device="cuda", dtype=dtype)

    q, k, v, grad = draw(4), draw(2), draw(2), draw(4)
    out, lse = kernel.forward(q, k, v, causal)
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    scores = wide[0] @ wide[1].repeat_interleave(2, 1).transpose(-1, -2) / 8.0
    if causal:
        scores = scores.masked_fill(torch.ones(40, 40, device="cuda").triu(1).bool(), float("-inf"))
    exact = scores.softmax(-1) @ wide[2].repeat_interleave(2, 1)
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if kernel is ring.Flash else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(out.double(), exact, **tolerance)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), **tolerance)
    found = kernel.backward(grad_out=grad, query=q, key=k, value=v, out=out, logsumexp=lse, is_causal=causal)
    for got, wanted in zip(found, torch.autograd.grad(exact, wide, grad.double()), strict=True):
        torch.testing.assert_close(got.double(), wanted, **tolerance)


@pytest.mark.timeout(300)
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao (extra fp8)")
def test_fp8_linears_learn() -> None:
    losses = worlds.run(1, _fp8, cuda=True, timeout_s=200)
    assert losses[-1] < losses[0] - 0.3


def _fp8() -> list[float]:
    """Losses of 20 steps with fp8 products."""
    plan = plans.plan(_model(), seq_len=TOKENS, precision="bf16")
    plan = plan.model_copy(update={"job": plan.job.model_copy(update={"linears": "fp8"})})
    trainer = Trainer(plan, torch.device("cuda", 0), Options(lr=3e-3, steps=20))
    return [trainer.train_step(step)[0] for step in range(20)]
