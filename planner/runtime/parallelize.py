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
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from planner.runtime import copies, experts
from planner.runtime.attention import Attention
from planner.runtime.context import Ulysses
from planner.runtime.mla import LatentAttention
from planner.runtime.model import Block, Decoder, Mlp
from planner.runtime.moe import Moe
from planner.runtime.precision import DTYPES
from planner.runtime.recompute import KEEP_ATTENTION, keep_attention_beside_experts, keep_products
from planner.runtime.replicated import Replicated
from planner.runtime.ring import Ring, keep_outputs, template
from planner.specs.job import Job
from planner.specs.layout import Layout, Stage


def apply_tp(part: Decoder, mesh: DeviceMesh, in_pieces: bool = False) -> None:
    """Split matrices over heads or widths, the vocabulary over both ends, activations between blocks over tokens.

    With the loss `in_pieces` the head gathers its input and scatters the gradient by itself.

    Sequence parallelism (Korthikanti 2022, arXiv 2205.05198) is always on: [b, s/tp, h] between blocks.
    """
    embedding = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    for table in (part.tok, part.pos):
        if table is not None:
            parallelize_module(table, mesh, embedding)
    for block in part.blocks():
        parallelize_module(block, mesh, {**_attention_plan(block), **_mlp_plan(block)})
    if part.head is not None:
        head = ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False)
        parallelize_module(part.head, mesh, _Rows() if in_pieces else head)
        part.head.group = mesh.get_group() if in_pieces else None
    for module in part.modules():
        if isinstance(module, Replicated):  # `replicated.whole` sums its gradient over the group
            distribute_module(module, mesh)
    for block in part.blocks():
        if isinstance(block.attn, LatentAttention):
            block.attn.tp = mesh
    part.tie()  # the styles above replaced both parameters; tying before would silently untie them


class _Rows(ColwiseParallel):
    """The rows of a matrix over the group; input and output as they are."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, self._partition_linear_fn)


_GATHER = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))


def _attention_plan(block: Block) -> dict[str, ParallelStyle]:
    if isinstance(block.attn, LatentAttention):  # it gathers latents, not its input
        up = ColwiseParallel(input_layouts=Shard(1))
        return {"attn.wq": up, "attn.wkv": up, "attn.wo": RowwiseParallel(output_layouts=Shard(1))}
    plan: dict[str, ParallelStyle] = {f"attn.{name}": ColwiseParallel() for name in ("wq", "wk", "wv")}
    return {**plan, "attn": _GATHER, "attn.wo": RowwiseParallel(output_layouts=Shard(1))}


def _mlp_plan(block: Block) -> dict[str, ParallelStyle]:
    """Split the dense MLP, or the shared experts; routed experts take the tokens of their own rank."""
    name, mlp = ("mlp.shared", block.mlp.shared) if isinstance(block.mlp, Moe) else ("mlp", block.mlp)
    if not isinstance(mlp, Mlp):
        return {}
    plan: dict[str, ParallelStyle] = {name: _GATHER, f"{name}.w1": ColwiseParallel()}
    if mlp.w3 is not None:
        plan[f"{name}.w3"] = ColwiseParallel()
    return {**plan, f"{name}.w2": RowwiseParallel(output_layouts=Shard(1))}


def apply_cp(part: Decoder, mesh: DeviceMesh, ring: bool) -> None:
    """Give every attention its cp group. Raises InputError for a ring where torch has no template of one."""
    if ring:
        template()
    context = (Ring if ring else Ulysses)(mesh.get_group(), mesh.size())
    for block in part.blocks():
        if ring:
            block.kept = keep_outputs
        if isinstance(block.attn, Attention):  # latent attention is refused by rule
            block.attn.context = context


COMPILER = "inductor"
"""Backend of torch.compile."""


def apply_compile(part: Decoder, tp: int) -> None:
    """Compile each block on its own: equal blocks share one graph. Before ZeRO, so that its hooks stay outside.

    The embedding's output under tp is still being communicated when the first block begins, and a compiled block would cut
    its gradient off without a word: one copy before it waits for the values (`Decoder.settle`).
    """
    part.settle = tp > 1
    for block in part.blocks():
        block.compile(backend=COMPILER)


def apply_recompute(parts: list[Decoder], stage: Stage, keeps_products: bool = False) -> None:
    """Set each block's recompute mode: the rank's first `full` layers, then `selective`, then none."""
    selective, full = stage.counts
    for i, block in enumerate(block for part in parts for block in part.blocks()):
        block.recompute = "full" if i < full else "selective" if i < full + selective else "none"
        mixture = keep_attention_beside_experts if experts.mixtures(block) else KEEP_ATTENTION
        block.kept = keep_products if keeps_products else mixture


def needs_wrapper(layout: Layout, job: Job, lowered: bool) -> bool:
    """Whether FSDP2 manages the parameters. On one data parallel rank it would only keep a copy in the compute type, which
    parameters of that type (`masters`), and fp32 jobs, do not need."""
    return layout.dp * layout.cp > 1 or not (job.precision == "fp32" or lowered)


def effective_zero(layout: Layout) -> int:
    """ZeRO stage as it runs: nothing can be sharded over one rank."""
    return layout.zero if layout.dp * layout.cp > 1 else 0


def apply_zero(
    part: Decoder, layout: Layout, job: Job, mesh: DeviceMesh, expert_mesh: DeviceMesh | None = None, lowered: bool = False
) -> None:
    """Wrap the embedding, each block, the norm with the head, and the rest, each as one unit of communication.

    Experts that other ranks share than the rest of their layer are units of their own (`experts.wrap`).

    Kept (bytes, c = 2 in bf16, 4 in fp32): master weights and AdamW states 12P/D (12P for stage 0); a compute copy
    c*P from forward to the end of the step for stages 0 to 2, of one unit at a time for stage 3; fp32 gradients 4P/D
    (4P for stage 0, and for stage 1 with several micro-batches). With offload what is divided by D lives in host memory:
    FSDP2 copies a unit's masters to the device to gather them, and its reduced gradients back.
    """
    zero = effective_zero(layout)
    policy = MixedPrecisionPolicy(param_dtype=DTYPES[job.precision], reduce_dtype=torch.float32, cast_forward_inputs=False)
    bare = experts.wrap(part, expert_mesh, layout, zero, policy)
    if not needs_wrapper(layout, job, lowered):
        return

    def wrap(module: nn.Module | list[nn.Module], free_after_forward: bool) -> None:
        options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "ignored_params": bare or None}
        if zero == 0:
            replicate(module, **options)
        else:
            if layout.offload == "optimizer":
                options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
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
    if zero and heads:
        heads[-1].register_forward_pre_hook(lambda *_: _free_gather_buffer(part))
    if zero:
        units = [unit for block in part.blocks() for unit in (*(moe.experts for moe in experts.mixtures(block)), block)]
        _gather_ahead([embeddings[0] if embeddings and not tied else None, *units, heads[-1] if heads else part])
    experts.gather_early(part.blocks())
    copies.use(part, layout, job, mesh)


def _free_gather_buffer(root: Any) -> None:
    """Free the buffer that the head was gathered into. FSDP2 does that with the next unit's gather, or when the model's forward
    is over, and a head that makes the loss peaks before either."""
    context = root._get_fsdp_state()._comm_ctx
    state = context.all_gather_state
    if state is not None:
        for stream in (context.all_gather_copy_in_stream, context.all_gather_stream):
            if state.event is not None:
                stream.wait_event(state.event)  # its memory is of these streams
        context.all_gather_state = None


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
    Stages 0 to 2 keep gathered parameters until the last backward; 3 frees them after each. Copies of the states (hybrid
    sharding) are made equal with the last micro-batch.
    """
    for unit in experts.units(module):
        unit.set_is_last_backward(last)
        unit.set_requires_gradient_sync(last or zero >= 2)
        unit.set_requires_all_reduce(last)
        unit.set_reshard_after_backward(last or zero == 3)
