"""Ring attention (Liu 2023, arXiv 2310.01889) by torch's own template, with the fused kernel of the device.

Each rank of a cp group keeps the queries of its tokens, and keys and values go round: attention of one block runs while the
next one is sent, and the blocks' outputs are merged by their log-sum-exps, in fp32. Causal work is equal on all ranks
because each holds the r-th piece of the sequence from either end (`context.pieces`). Backward sends keys and values round
again, and their gradients in fp32.

Symbols: b sequences, s tokens of this rank, heads of width d; tensors here are [b, heads, s, d].
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from planner.errors import input_error

aten = torch.ops.aten
SEQUENCE = 2
"""The dimension that is split."""


def template() -> ModuleType:
    """torch's module of context parallelism, set to send blocks round one after the other.

    Raises InputError where this torch has none.
    """
    try:  # both private: where they are changed between torch's releases
        from torch.distributed.tensor.experimental._context_parallel import _attention as found
    except ImportError:
        try:
            from torch.distributed.tensor.experimental import _attention as found  # type: ignore[no-redef]
        except ImportError:
            found = None  # type: ignore[assignment]
    needed = ("_templated_ring_attention", "_templated_ring_attention_backward", "_cp_options", "_RotateMethod")
    missing = [name for name in needed if not hasattr(found, name)]
    if missing:
        raise input_error(
            "PLN571",
            f"torch {torch.__version__} has no {missing[0]} in torch.distributed.tensor.experimental",
            "ring attention is torch's own, and that module is experimental",
            "use torch 2.11 to 2.13, or a plan without context: ring",
        )
    # Gathering all keys and values at once, the default, would keep those of the whole sequence.
    found._cp_options.rotate_method = found._RotateMethod.ALL_TO_ALL
    found._cp_options.enable_load_balance = True
    found._cp_options.convert_to_f32 = True
    return found


# ---- kernels -------------------------------------------------------------------------------------------------------


class Kernel(Protocol):
    """A fused attention kernel as torch's template calls it. Keys and values may have fewer heads than queries."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
        """(output like q, log-sum-exp [b, heads, s] fp32)."""
        ...

    @staticmethod
    def backward(
        *, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, is_causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, keys and values; `out` and `logsumexp` may be those of more keys than these."""
        ...


class CpuFlash:
    """The fused kernel of a CPU."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal)
        return out, lse

    @staticmethod
    def backward(
        *, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, is_causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads: tuple[Tensor, Tensor, Tensor] = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, query, key, value, out, logsumexp, 0.0, is_causal
        )
        return grads


class Flash:
    """FlashAttention on CUDA: 16-bit types, heads of a multiple of 8 elements up to 256."""

    @staticmethod
    def fits(q: Tensor) -> bool:
        """Whether the kernel takes such queries."""
        return q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[:2]
        return out, lse

    @staticmethod
    def backward(
        *, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, is_causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of dropout, of which there is none
        lengths = (query.shape[SEQUENCE], key.shape[SEQUENCE])
        grads: tuple[Tensor, Tensor, Tensor] = aten._scaled_dot_product_flash_attention_backward(
            grad_out, query, key, value, out, logsumexp, None, None, *lengths, 0.0, is_causal, state, state
        )
        return grads


class Efficient:
    """The memory-efficient kernel on CUDA: any type, but as many key and value heads as query heads, and log-sum-exps in
    rows of a multiple of 32."""

    ROW = 32

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
        k, v = (_repeated(t, q.shape[1]) for t in (k, v))
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, is_causal)[:2]
        return out, lse[..., : q.shape[SEQUENCE]]

    @staticmethod
    def backward(
        *, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, is_causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = key.shape[1]
        k, v = (_repeated(t, query.shape[1]) for t in (key, value))
        lse = F.pad(logsumexp, (0, -logsumexp.shape[-1] % Efficient.ROW), value=float("inf"))
        state = torch.zeros((), dtype=torch.int64, device=query.device)  # of dropout, of which there is none
        wanted = [True, True, True, False]
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad_out, query, k, v, None, out, lse, state, state, 0.0, wanted, is_causal
        )
        return dq, _summed(dk, heads), _summed(dv, heads)


def _repeated(x: Tensor, heads: int) -> Tensor:
    """Each of x's heads for every query head that reads it."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _summed(grad: Tensor, heads: int) -> Tensor:
    """The gradient of `_repeated`."""
    return grad.reshape(grad.shape[0], heads, -1, *grad.shape[2:]).sum(dim=2)


def kernel_for(q: Tensor) -> type[Kernel]:
    """The kernel for queries of this device, type and width."""
    if not q.is_cuda:
        return CpuFlash
    return Flash if Flash.fits(q) else Efficient


# ---- selective recompute -------------------------------------------------------------------------------------------


class _Kept(threading.local):
    """What the recomputed region in hand keeps of its ring attention: (output, log-sum-exp) of each call, first call first."""

    outputs: deque[tuple[Tensor, Tensor]] | None = None
    replaying = False


_kept = _Kept()


def keep_outputs() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of selective recompute that keep merged outputs: its second run neither attends nor communicates again.

    torch's selective checkpoint would keep the output of every block, and send all of them round again.
    """
    outputs: deque[tuple[Tensor, Tensor]] = deque()
    return _keeping(outputs, replaying=False), _keeping(outputs, replaying=True)


@contextmanager
def _keeping(outputs: deque[tuple[Tensor, Tensor]], replaying: bool) -> Iterator[None]:
    before = _kept.outputs, _kept.replaying
    _kept.outputs, _kept.replaying = outputs, replaying
    try:
        yield
    finally:
        _kept.outputs, _kept.replaying = before


# ---- attention -----------------------------------------------------------------------------------------------------


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Tensor:
        if _kept.outputs is not None and _kept.replaying:
            out, lse = _kept.outputs.popleft()
        else:
            out, lse = _forward(q, k, v, group)
            if _kept.outputs is not None:
                _kept.outputs.append((out, lse))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.group = group
        return out.view_as(out)  # a saved output that is returned itself would keep the graph that it is part of

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = template()._templated_ring_attention_backward(
            ctx.group, SEQUENCE, kernel_for(q).backward, grad, "grad_out", q, k, v, out, lse, True
        )
        return dq, dk, dv, None


def _forward(q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp); the output lies in memory as [b, s, heads, d], as the next projection reads it."""
    out, lse = template()._templated_ring_attention(group, SEQUENCE, kernel_for(q).forward, q, k, v, True)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


@dataclass(frozen=True)
class Ring:
    """The cp group of this rank, with more than one rank, around which keys and values go."""

    group: dist.ProcessGroup
    size: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, whole: Any = None) -> Tensor:
        """Causal attention of own tokens [b, s, heads, d] to all before them, same shape out. Collective."""
        out: Tensor = _RingAttention.apply(*(t.transpose(1, 2) for t in (q, k, v)), self.group)  # type: ignore[no-untyped-call]
        return out.transpose(1, 2)
