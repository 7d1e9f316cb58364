"""Memory of one node's devices that every rank of a group can write to, by copy engines: torch's symmetric memory on CUDA.

Copies by the engines take no multiprocessor from the products that run beside them, as NCCL's kernels do. Pipelines send so
(`sends`), layers' parameters are gathered so (`gather`) and gradients reduced (`scatter`). Ranks meet through signals: words
that a kernel of one thread writes in another rank's memory, and that another such kernel waits for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from planner.runtime.collectives import everywhere
from planner.runtime.devices import one_node

SWITCH, OFF = "PLANNER_COPIES", "nccl"
"""The environment variable, and its value that leaves all of it to NCCL."""


def suits(ranks: int) -> bool:
    """Whether all `ranks` processes of a job are of one node, and nobody has switched it off."""
    own = os.environ.get("TORCH_SYMMMEM", "CUDA") == "CUDA"  # torch's other backends signal otherwise
    return ranks > 1 and one_node(ranks) and own and os.environ.get(SWITCH) != OFF


def empty(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of the pool of such memory: what is freed there is used again, and need not be made known to others again."""
    from torch.distributed import _symmetric_memory as symmetric

    # Nothing here is sent to several ranks at once, and setting that up blocks for ever where one rank cannot.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    with torch.cuda.use_mem_pool(symmetric.get_mem_pool(device)):
        return torch.empty(*size, dtype=dtype, device=device)


def meet(tensor: Tensor, group: dist.ProcessGroup) -> Any:
    """The handle of a tensor of `empty` and of those of the other ranks. Collective the first time that its memory is used."""
    from torch.distributed import _symmetric_memory as symmetric

    return symmetric.rendezvous(tensor, group)


def room_for_signals(words: int) -> None:
    """Let tensors made from now on have so many words of signals."""
    from torch.distributed import _symmetric_memory as symmetric

    symmetric.set_signal_pad_size(max(4 * words, symmetric.get_signal_pad_size()))


def works(steps: Sequence[Callable[[], object]], device: torch.device, group: dist.ProcessGroup | None = None) -> bool:
    """Whether every rank of the group can take `steps`, each once all could take the one before: a rank that is alone in one
    would wait in it for ever. A step fails by False, or as torch does (without peer access between devices). Collective."""
    for step in steps:
        found: object = False
        # AttributeError: a torch whose private module is another
        with suppress(RuntimeError, AttributeError):
            found = step()
        if not everywhere(found is not False, device, group):
            return False
    return True
