"""What only CUDA runs, on two GPUs with NCCL: `python -m pytest tests/runtime/test_cuda.py`. Elsewhere it is skipped."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import gpus
import pytest
import torch
import worlds
from torch import Tensor

from planner.runtime import ring

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with loss and gradients of one GPU in fp32."""
    folder = tmp_path_factory.mktemp("cuda")
    gpus.run(None, folder)
    return folder


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", gpus.CASES)
def test_equals_one_gpu(name: str, reference: Path) -> None:
    assert gpus.wrong(name, gpus.run(name, reference)) == {}


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
    losses = worlds.run(1, gpus.fp8, cuda=True, timeout_s=200)
    assert losses[-1] < losses[0] - 0.3
