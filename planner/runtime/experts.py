"""Expert parallelism: the ranks of a pipeline stage as (efsdp, ep, etp), and what moves between them.

A stage's tp cp dp ranks, in rank order, are seen a second time as a grid of efsdp x ep x etp, etp innermost. Every rank
has tokens of its own (sequence parallelism splits them over tp), so any factors will do: ep ranks hold different experts,
etp ranks slices of the same, and efsdp ranks the same parameters, over which ZeRO shards or replicates them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from planner.runtime.collectives import all_gather
from planner.runtime.moe import Moe, sizes_of
from planner.specs.layout import Layout


def shard_size(layout: Layout) -> int:
    """efsdp: ranks that hold the same experts."""
    return layout.tp * layout.cp * layout.dp // (layout.ep * layout.etp)


def build_mesh(layout: Layout, device_type: str) -> DeviceMesh:
    """(pp, efsdp, ep, etp) over all processes. Collective."""
    shape = (layout.pp, shard_size(layout), layout.ep, layout.etp)
    return init_device_mesh(device_type, shape, mesh_dim_names=("pp", "efsdp", "ep", "etp"))


def gradient_scale(layout: Layout) -> float:
    """What the experts' gradients lack after their mean over efsdp: efsdp / (dp cp).

    A gradient is the sum over the tokens of one data-parallel rank's loss, and the mean over dp cp of them. An expert sees
    the tokens of ep etp ranks at once: the mean over its efsdp ranks divides by too little or, with tp > ep etp, too much.
    """
    return shard_size(layout) / (layout.dp * layout.cp)


# ---- exchange ----------------------------------------------------------------------------------------------------


def _swap(rows: Tensor, out_sizes: list[int], in_sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(out_sizes), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), out_sizes, in_sizes, group=group)
    return out


class _AllToAll(torch.autograd.Function):
    """Uneven exchange of rows [n, h]; backward sends gradients the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, out_sizes: list[int], in_sizes: list[int], group: Any) -> Tensor:
        ctx.way = (in_sizes, out_sizes, group)
        return _swap(rows, out_sizes, in_sizes, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _swap(grad, *ctx.way), None, None, None


def _gather(rows: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """The rows of every rank of a group, `sizes` of each. Uneven all-gathers are no collective of gloo, and one broadcast
    a rank on NCCL; an exchange of copies is one on both."""
    ranks = len(sizes)
    return _swap(rows.repeat(ranks, 1), sizes, [rows.shape[0]] * ranks, group)


def _reduce(rows: Tensor, sizes: list[int], own: int, group: dist.ProcessGroup) -> Tensor:
    """The adjoint of `_gather`: sums of every rank's share, this rank's `own` rows of them."""
    ranks = len(sizes)
    return _swap(rows, [own] * ranks, sizes, group).view(ranks, own, rows.shape[1]).sum(0)


class _Gather(torch.autograd.Function):
    """Rows of all etp ranks; gradients are summed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], group: Any) -> Tensor:
        ctx.way = (sizes, rows.shape[0], group)
        return _gather(rows, sizes, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _reduce(grad, *ctx.way), None, None


class _Reduce(torch.autograd.Function):
    """Sums over etp ranks, each rank's own rows; gradients are gathered."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], own: int, group: Any) -> Tensor:
        ctx.way = (sizes, group)
        return _reduce(rows, sizes, own, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _gather(grad, *ctx.way), None, None, None


class _Permute(torch.autograd.Function):
    """rows[order]; backward is a permutation too, not a sum by index."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, *ctx.saved_tensors), None, None


class Exchange:
    """Rows to the ranks of their experts and back: all-to-all over ep, then a gather over etp (Megatron-Core's order).

    The host waits once a layer for the counts: an uneven exchange needs its sizes.
    """

    def __init__(self, mesh: DeviceMesh):
        self.ep, self.etp = mesh["ep"].size(), mesh["etp"].size()
        self.ep_group, self.etp_group = mesh["ep"].get_group(), mesh["etp"].get_group()
        self.etp_rank = mesh["etp"].get_local_rank()

    def __call__(self, rows: Tensor, counts: Tensor, experts: nn.Module) -> Tensor:
        """rows [N, h] sorted by expert, counts [E] of each: the experts' results in the same order, [N, h]."""
        sent, received = self._counts(counts)
        local = received.shape[-1]
        total = rows.shape[0] * self.etp  # where sizes are not real, all ranks are alike
        flat = sizes_of(received, total)
        blocks = [flat[i : i + local] for i in range(0, len(flat), local)]
        each = [sum(sum(b) for b in blocks[i * self.ep : (i + 1) * self.ep]) for i in range(self.etp)]
        arrive = [sum(b) for b in blocks[self.etp_rank * self.ep :][: self.ep]]
        leave = sizes_of(sent, rows.shape[0])
        order, inverse = _by_expert(received, sum(each))
        rows = _AllToAll.apply(rows, arrive, leave, self.ep_group) if self.ep > 1 else rows  # type: ignore[no-untyped-call]
        if self.etp > 1:
            rows = _Gather.apply(rows, each, self.etp_group)  # type: ignore[no-untyped-call]
        rows = _Permute.apply(rows, order, inverse)  # type: ignore[no-untyped-call]
        rows = experts(rows, received.view(-1, local).sum(0))
        rows = _Permute.apply(rows, inverse, order)  # type: ignore[no-untyped-call]
        if self.etp > 1:
            own = each[self.etp_rank]
            rows = _Reduce.apply(rows, each, own, self.etp_group)  # type: ignore[no-untyped-call]
        return _AllToAll.apply(rows, leave, arrive, self.ep_group) if self.ep > 1 else rows  # type: ignore[no-untyped-call]

    def _counts(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """(rows sent to each ep rank [ep], rows received [etp, ep, E / ep] for each local expert)."""
        by_rank = counts.view(self.ep, -1)
        received = by_rank
        if self.ep > 1:
            received = torch.empty_like(by_rank)
            dist.all_to_all_single(received, by_rank.contiguous(), group=self.ep_group)
        if self.etp > 1:
            everyone = received.new_empty(self.etp * received.numel())
            all_gather(everyone, received.flatten(), group=self.etp_group)
            received = everyone
        return by_rank.sum(1), received.view(self.etp, self.ep, -1)


def _by_expert(received: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """(order, its inverse) that sorts `total` rows, in blocks of `received` [etp, ep, local experts], by expert."""
    local = received.shape[-1]
    expert = torch.arange(local, device=received.device).repeat(received.numel() // local)
    of_row = expert.repeat_interleave(received.flatten(), output_size=total)
    order = of_row.argsort(stable=True)
    inverse = torch.empty_like(order, dtype=torch.int32)
    inverse[order] = torch.arange(total, dtype=torch.int32, device=order.device)
    return order.int(), inverse


# ---- placement ---------------------------------------------------------------------------------------------------


def mixtures(module: nn.Module) -> list[Moe]:
    """The mixtures of experts inside a module."""
    return [m for m in module.modules() if isinstance(m, Moe)]


def place(part: nn.Module, mesh: DeviceMesh | None, layout: Layout) -> None:
    """Split expert parameters over ep and etp, as DTensors of the whole [E, ., .]: checkpoints reshard them by that."""
    if mesh is None:
        return
    for moe in mixtures(part):
        moe.gradient_scale = gradient_scale(layout)
        if layout.ep * layout.etp == 1:
            continue
        moe.exchange = Exchange(mesh)
        for name, param in list(moe.experts.named_parameters()):
            inner = Shard(2) if name == "w2" else Shard(1)
            dims = [(dim, p) for dim, p, n in (("ep", Shard(0), layout.ep), ("etp", inner, layout.etp)) if n > 1]
            names, placements = zip(*dims, strict=True)
            split = distribute_tensor(param.detach(), mesh[names], list(placements), src_data_rank=None)
            setattr(moe.experts, name, nn.Parameter(split))


def apart(layout: Layout) -> bool:
    """Whether experts are sharded over other ranks than the rest of their layer, and so are a unit of their own."""
    return layout.ep * layout.etp > 1 or layout.tp > 1


def wrap(
    part: nn.Module, mesh: DeviceMesh | None, layout: Layout, zero: int, policy: MixedPrecisionPolicy
) -> set[nn.Parameter]:
    """Give experts to FSDP2 over efsdp; returns the parameters that it must not touch elsewhere.

    In fp32 with one rank there is nothing to do for it, and it would keep a second copy: those parameters stay bare.
    """
    found = mixtures(part)
    if mesh is None or not found or not apart(layout):
        return set()
    if shard_size(layout) == 1 and policy.param_dtype == torch.float32:
        return {p for moe in found for p in moe.experts.parameters()}
    for moe in found:
        if zero == 0:
            replicate(moe.experts, mesh=mesh["efsdp"], mp_policy=policy)
        else:
            fully_shard(
                moe.experts,
                mesh=mesh["efsdp"],
                mp_policy=policy,
                reshard_after_forward=zero == 3,
                shard_placement_fn=lambda param: _dimension(param, shard_size(layout)),
            )
    return set()


def _dimension(param: nn.Parameter, ranks: int) -> Shard | None:
    """The first dimension that `ranks` divide: experts, else a width. None leaves it to FSDP2, which pads experts."""
    local = param.to_local() if hasattr(param, "to_local") else param
    return next((Shard(i) for i, n in enumerate(local.shape) if n % ranks == 0), None)


def gather_early(blocks: Sequence[nn.Module]) -> None:
    """Let each layer's gather start its experts' too: routing makes the host wait, and would keep them from hiding."""
    for block in blocks:
        own: list[FSDPModule] = [moe.experts for moe in mixtures(block) if isinstance(moe.experts, FSDPModule)]
        if own and isinstance(block, FSDPModule):
            block.set_modules_to_forward_prefetch(own)


def units(part: nn.Module) -> list[FSDPModule]:
    """The outermost modules that FSDP2 manages: the part, or its experts where nothing else needs it."""
    if isinstance(part, FSDPModule):
        return [part]
    return [m for m in part.modules() if isinstance(m, FSDPModule)]
