"""Reduce-scatters of gradients by copy engines (`symmetric`): ranks write pieces of their gradients into each other's memory,
as backward made them, and each adds up its own part in fp32.

FSDP2 takes such a reduction as a custom one. NCCL's sums fp32: gradients in 16-bit types are cast before they are sent, twice
the bytes in memory and on the wire, and its kernels take multiprocessors from the products beside them. The sum is the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from planner.runtime import symmetric

CHANNEL = 1
"""Of the signals: small buffers share their words with those of gathers, which run at the same time."""
_ALIGNED = 64
"""Elements that pieces are multiples of."""
_TRIAL = 96
"""Elements of a rank in the first reduction, which tells whether there can be more."""


class Reduction:
    """FSDP2's interface of a custom reduce-scatter whose input is in the type that gradients have, and its output in fp32."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.asked = 0

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """FSDP2 asks for the whole gradient's buffer, then for that of this rank's part, which has `dtype`."""
        self.asked += 1
        return torch.empty(*size, dtype=self.dtype if self.asked % 2 else dtype, device=device)


class EngineReduction(Reduction):
    """The sum of what other ranks have written into this one's memory, a piece at a time."""

    def __init__(self, dtype: torch.dtype, piece: int, group: dist.ProcessGroup, device: torch.device):
        """With room for `piece` elements from every other rank of a group, which is to `meet`."""
        super().__init__(dtype)
        self.piece = -(-piece // _ALIGNED) * _ALIGNED
        self.received = symmetric.empty((group.size() - 1, self.piece), dtype, device)
        self.memory: Any = None

    def meet(self, group: dist.ProcessGroup) -> None:
        """Learn where the others' memory is. Collective."""
        self.memory = symmetric.meet(self.received, group)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        """Mean, or sum, of all ranks' inputs [ranks * n] at this rank's n. Collective."""
        rank, size, n = group.rank(), group.size(), output_tensor.numel()
        if op not in (dist.ReduceOp.AVG, dist.ReduceOp.SUM):
            raise ValueError(f"gradients are averaged or added up by copy engines, not reduced by {op}")
        factor = 1.0 / size if op == dist.ReduceOp.AVG else 1.0
        parts = input_tensor.view(size, n)
        for begin in range(0, n, self.piece):
            count = min(self.piece, n - begin)
            self.memory.barrier(CHANNEL)  # everyone has added up the last piece
            for peer in ((rank + step) % size for step in range(1, size)):
                row = (rank - peer - 1) % size
                self.memory.get_buffer(peer, (count,), self.dtype, row * self.piece).copy_(parts[peer, begin:][:count])
            self.memory.barrier(CHANNEL)  # all parts are there
            add = added if not output_tensor.is_cuda else _kernel()
            add(output_tensor[begin:][:count], parts[rank, begin:][:count], self.received[:, :count].unbind(), factor)
        return None


def added(out: Tensor, own: Tensor, received: Sequence[Tensor], factor: float) -> None:
    """`out` = `factor` times the sum of all, in fp32."""
    total = own.float()
    for part in received:
        total = total + part.float()
    out.copy_(total * factor)


@functools.cache
def _kernel() -> Callable[..., Any]:
    return torch.compile(added, dynamic=True)


def use(module: nn.Module, reduction: Reduction) -> None:
    """Let FSDP2 reduce the gradients of every unit of a module so."""
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.set_custom_reduce_scatter(reduction)  # type: ignore[arg-type]  # it asks for these two methods only


def largest_part(blocks: Iterable[nn.Module], ranks: int) -> int:
    """Elements of one rank's part of a block's gradients, padded as FSDP2 pads them: of the largest block."""

    def padded(param: Tensor) -> int:
        return -(-param.shape[0] // ranks) * (param.numel() // max(param.shape[0], 1))

    return max((sum(map(padded, block.parameters())) for block in blocks), default=0)


@torch.no_grad()
def trial(reduction: EngineReduction, group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether a first reduction works; it compiles the sum, too, which backward runs without gradients. Collective."""
    size, rank = group.size(), group.rank()
    whole = reduction.allocate((size * _TRIAL,), dtype=torch.float32, device=device).fill_(1.0 + rank)
    own = reduction.allocate((_TRIAL,), dtype=torch.float32, device=device)
    reduction(own, whole, group, dist.ReduceOp.SUM)
    return bool((own == size * (size + 1) / 2).all())
