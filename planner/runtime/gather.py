"""All-gathers of layers' parameters by copy engines (`symmetric`): each rank writes its part into the others' buffers.

FSDP2 takes such a gather as a custom one. The buffers are memory of a pool of its own, which keeps those of two layers for as
long as the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from planner.runtime import symmetric

CHANNEL = 0
"""Of the signals in its buffers."""
_TRIAL = 256
"""Elements of a rank in the first gather, which tells whether there can be more."""


class EngineGather:
    """FSDP2's interface of a custom all-gather: output in symmetric memory, of which the input is this rank's part."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer of the pool."""
        return symmetric.empty(size, dtype, device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """Gather over the group. Collective."""
        memory, rank, size, n = symmetric.meet(output_tensor, group), group.rank(), group.size(), input_tensor.numel()
        memory.barrier(CHANNEL)  # nobody reads the buffer's last contents any more
        for peer in ((rank + step) % size for step in range(1, size)):
            memory.get_buffer(peer, (n,), input_tensor.dtype, rank * n).copy_(input_tensor)
        memory.barrier(CHANNEL)  # all parts are there
        return None


def use(blocks: Iterable[nn.Module], gather: EngineGather) -> None:
    """Let FSDP2 gather `blocks` so. Embedding and head stay NCCL's: their gathers are large and rare, and the pool would keep
    their memory."""
    for block in blocks:
        if isinstance(block, FSDPModule):
            block.set_custom_all_gather(gather)  # type: ignore[arg-type]  # it asks for these two methods only


def trial(gather: EngineGather, group: dist.ProcessGroup, device: torch.device) -> list[Callable[[], object]]:
    """Steps of a first gather, which tell whether there can be more."""
    size, rank = group.size(), group.rank()
    made: list[Tensor] = []

    def make() -> None:
        made.append(gather.allocate((size * _TRIAL,), dtype=torch.float32, device=device))

    def meet() -> None:
        symmetric.meet(made[0], group)

    def arrives() -> bool:
        gather(made[0], made[0][rank * _TRIAL :][:_TRIAL].fill_(1.0 + rank), group)
        wanted = torch.arange(1.0, 1.0 + size, device=device).repeat_interleave(_TRIAL)
        return bool((made[0] == wanted).all())

    return [make, meet, arrives]
