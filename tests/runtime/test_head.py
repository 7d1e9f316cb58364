"""The loss in pieces: the loss and the gradients of plain cross-entropy, in memory that does not grow with the tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from planner.runtime import loss
from planner.runtime.head import Head
from planner.runtime.meter import Meter
from planner.specs import pieces

B, S, H, V = 2, 37, 24, 101


def _both(dtype: torch.dtype, bias: bool, factor: float, upstream: float) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """[loss, gradients of x, weight, bias]: by the head in pieces, and by torch in fp32."""
    torch.manual_seed(1)
    head = Head(H, V, bias).to(dtype)
    head.scale: Any = SimpleNamespace(value=factor)  # type: ignore[assignment, misc]
    x, targets = torch.randn(B, S, H).to(dtype).requires_grad_(), torch.randint(0, V, (B, S))
    head.expect([targets])
    loss = head(x)
    (loss * upstream).backward()
    leaves = [t.detach().float().requires_grad_() for t in (x, *head.parameters())]
    logits = F.linear(*leaves)
    theirs = F.cross_entropy(logits.flatten(0, 1), targets.flatten()) * factor
    (theirs * upstream).backward()
    return [loss, x.grad, *(p.grad for p in head.parameters())], [theirs, *(t.grad for t in leaves)]  # type: ignore[list-item]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1000, 37, 10, 1])
def test_pieces_give_the_loss_and_the_gradients_of_cross_entropy(
    rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", rows * V * 4.0)
    ours, theirs = _both(torch.float32, bias, 3.0, 0.25)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("told", [True, False])
def test_a_gradient_known_before_is_in_the_gradients_once(told: bool) -> None:
    """Told: backward gets the very tensor that the head was given, and changes nothing. Else it gets another."""
    torch.manual_seed(1)
    head, given = Head(H, V, False), torch.tensor(0.25)
    head.given = given
    x, targets = torch.randn(B, S, H, requires_grad=True), torch.randint(0, V, (B, S))
    head.expect([targets])
    with _Multiplied() as multiplied:
        torch.autograd.backward(head(x), given if told else torch.tensor(0.5))
    leaves = [t.detach().requires_grad_() for t in (x, head.weight)]
    theirs = F.cross_entropy(F.linear(*leaves).flatten(0, 1), targets.flatten())
    (theirs * (0.25 if told else 0.5)).backward()
    for a, b in zip((x.grad, head.weight.grad), (t.grad for t in leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert multiplied.in_place == (0 if told else 2)


def test_the_root_of_a_pipeline_gives_what_is_known() -> None:
    given, value = torch.ones(()), torch.tensor(3.0, requires_grad=True)
    seen = []
    value.register_hook(seen.append)
    loss.root(value, given).backward()  # type: ignore[no-untyped-call]
    assert seen[0] is given


class _Multiplied(TorchDispatchMode):
    """Counts products in place."""

    in_place = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.in_place += func in (torch.ops.aten.mul_.Tensor, torch.ops.aten.mul_.Scalar)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dtype", "factor"), [(torch.bfloat16, 1.0), (torch.float16, 2.0**12)])
def test_narrow_types_add_up_in_fp32(dtype: torch.dtype, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 3 * V * 2.0)
    ours, theirs = _both(dtype, True, factor, 1.0)
    assert [t.dtype for t in ours[1:]] == [dtype] * 3
    for a, b in zip(ours, theirs, strict=True):
        assert float((a.detach().float() - b).norm() / b.norm()) < 1e-2


def test_without_gradients_the_loss_alone_is_made() -> None:
    head, targets = Head(H, V, False), torch.randint(0, V, (B, S))
    x = torch.randn(B, S, H)
    head.expect([targets])
    with torch.no_grad():
        loss = head(x)
    torch.testing.assert_close(loss, F.cross_entropy(head(x).flatten(0, 1), targets.flatten()))
    assert not head.expected


def test_memory_is_a_piece_not_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, hidden, vocab = 512, 16, 4096
    monkeypatch.setattr(pieces, "PIECE_BYTES", 64.0 * vocab * 4)
    head = Head(hidden, vocab, False)
    head.expect([torch.zeros(1, tokens, dtype=torch.int64)])
    x = torch.randn(1, tokens, hidden, requires_grad=True)
    with Meter() as meter:
        before = meter.current
        head(x).backward()
    assert meter.peak - before < 0.75 * tokens * vocab * 4  # eager kernels keep five fp32 copies of one eighth


def test_equal_pieces() -> None:
    assert pieces.piece_count(8192, 128256 * 2) == 1
    assert pieces.piece_count(16384, 128256 * 2) == 2
    assert pieces.piece_tokens(16384, 128256 * 2) == 8192
    assert pieces.piece_tokens(3 * 8192, 128256 * 2) * 3 == 3 * 8192
