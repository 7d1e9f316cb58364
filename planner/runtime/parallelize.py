"""Tensor parallelism, recompute and ZeRO on one part of the model, in this order, while it is on the meta device.

ZeRO here is FSDP2: stage 0 `replicate` (its all-reduce engine), 1 to 3 `fully_shard`. What is kept when, in bytes with
P parameters of the rank and D = dp: see `apply_zero`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from planner.runtime.model import Block, Decoder, Norm
from planner.specs.job import Job, Precision
from planner.specs.layout import Layout, Stage

DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


def apply_tp(part: Decoder, mesh: DeviceMesh) -> None:
    """Split matrices over heads or widths, the vocabulary over both ends, activations between blocks over tokens.

    Sequence parallelism (Korthikanti 2022, arXiv 2205.05198) is always on: [b, s/tp, h] between blocks.
    """
    embedding = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    for table in (part.tok, part.pos):
        if table is not None:
            parallelize_module(table, mesh, embedding)
    for block in part.blocks():
        parallelize_module(block, mesh, _block_plan(block))
    if part.head is not None:
        head = ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False)
        parallelize_module(part.head, mesh, head)
    for module in part.modules():
        if isinstance(module, Norm):  # whole on every rank; `model._local` sums its gradient over the group
            distribute_module(module, mesh)
    part.tie()  # the styles above replaced both parameters; tying before would silently untie them


def _block_plan(block: Block) -> dict[str, ParallelStyle]:
    gather = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    plan: dict[str, ParallelStyle] = {"attn": gather, "mlp": gather}
    for name in ("attn.wq", "attn.wk", "attn.wv", "mlp.w1"):
        plan[name] = ColwiseParallel()
    if block.mlp.w3 is not None:
        plan["mlp.w3"] = ColwiseParallel()
    for name in ("attn.wo", "mlp.w2"):
        plan[name] = RowwiseParallel(output_layouts=Shard(1))
    return plan


def apply_recompute(parts: list[Decoder], stage: Stage) -> None:
    """Set each block's recompute mode: the rank's first `full` layers, then `selective`, then none."""
    selective, full = stage.counts
    for i, block in enumerate(block for part in parts for block in part.blocks()):
        block.recompute = "full" if i < full else "selective" if i < full + selective else "none"


def needs_wrapper(layout: Layout, job: Job) -> bool:
    """Whether FSDP2 manages the parameters. In fp32 on one data parallel rank there is nothing for it to do, and it
    would keep a second copy of the parameters."""
    return layout.dp * layout.cp > 1 or job.precision != "fp32"


def effective_zero(layout: Layout) -> int:
    """ZeRO stage as it runs: nothing can be sharded over one rank."""
    return layout.zero if layout.dp * layout.cp > 1 else 0


def apply_zero(part: Decoder, layout: Layout, job: Job, mesh: DeviceMesh) -> None:
    """Wrap the embedding, each block, the norm with the head, and the rest, each as one unit of communication.

    Kept (bytes, c = 2 in bf16, 4 in fp32): master weights and AdamW states 12P/D (12P for stage 0); a compute copy
    c*P from forward to the end of the step for stages 0 to 2, of one unit at a time for stage 3; fp32 gradients 4P/D
    (4P for stage 0, and for stage 1 with several micro-batches).
    """
    if not needs_wrapper(layout, job):
        return
    zero = effective_zero(layout)
    policy = MixedPrecisionPolicy(param_dtype=DTYPES[job.precision], reduce_dtype=torch.float32, cast_forward_inputs=False)

    def wrap(module: nn.Module | list[nn.Module], free_after_forward: bool) -> None:
        if zero == 0:
            replicate(module, mesh=mesh, mp_policy=policy)
        else:
            options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
            fully_shard(module, reshard_after_forward=free_after_forward, **options)

    embeddings = [m for m in (part.tok, part.pos) if m is not None]
    tied = part.model.tied_embeddings and part.tok is not None and part.head is not None
    if embeddings and not tied:
        wrap(list(embeddings), zero == 3)
        for module in embeddings:
            if zero and isinstance(module, FSDPModule) and hasattr(module, "set_unshard_in_backward"):
                module.set_unshard_in_backward(False)  # a lookup's backward does not read the table
    for block in part.blocks():
        wrap(block, zero == 3)
    heads = [part.norm, part.head] if part.norm is not None and part.head is not None and not tied else []
    if heads:
        wrap([m for m in heads if m is not None], False)  # backward starts here: freeing would gather again at once
    # Tied: one parameter cannot be in two units, so embedding, norm and head stay in the root unit.
    wrap(part, False)
    if zero:
        _gather_ahead([embeddings[0] if embeddings and not tied else None, *part.blocks(), heads[-1] if heads else part])


def _gather_ahead(units: Sequence[nn.Module | None]) -> None:
    """Let each unit's backward gather the unit before it, and the first ones nothing.

    By itself FSDP2 follows the order of all forwards since the last optimizer step. With several micro-batches the unit
    before the first is then the last of another micro-batch: a gather that nobody asked for, and its buffer.
    """
    before: FSDPModule | None = None
    for unit in units:
        if isinstance(unit, FSDPModule):
            unit.set_modules_to_backward_prefetch([before or unit])  # itself: it is gathered already, nothing happens
            before = unit


def prepare_accumulation(module: nn.Module, zero: int, last: bool) -> None:
    """Tell FSDP2 what this micro-batch's backward does, without a pipeline.

    Stages 0 and 1 add gradients up unreduced and reduce with the last micro-batch; 2 and 3 reduce-scatter each time.
    Stages 0 to 2 keep gathered parameters until the last backward; 3 frees them after each.
    """
    if not isinstance(module, FSDPModule):
        return
    module.set_is_last_backward(last)
    module.set_requires_gradient_sync(last or zero >= 2)
    module.set_reshard_after_backward(last or zero == 3)
