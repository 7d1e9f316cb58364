"""A mixture of experts: router, dispatch of tokens to experts, grouped products, combination.

Symbols: T tokens of this rank, h hidden, E routed experts, k experts that a token visits, f inner width of one expert,
N rows that this rank sends to experts: T k when dropless, E C with a capacity of C rows an expert. Rows are sorted by
expert. Scores are a softmax over the logits of the chosen k, in fp32 (Mixtral, arXiv 2401.04088, section 2.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.distributed.tensor import DTensor

from planner.runtime.activations import activate, activation_of
from planner.runtime.replicated import Replicated, whole
from planner.specs.layers import Mlp as Spec

ALIGNED = 8
"""Elements: CUDA's grouped product loads bf16 rows in pieces of 16 bytes."""


class _Logits(torch.autograd.Function):
    """x w^T in fp32, [T, E], that saves x in its own type: an upcast `x.float()` would be saved in 4 bytes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.float() @ weight.float().T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return (grad @ weight.float()).to(x.dtype), (grad.T @ x.float()).to(weight.dtype)


class Router(Replicated):
    """Scores of the k experts that each token visits."""

    def __init__(self, hidden: int, spec: Spec):
        super().__init__()
        self.top_k = spec.top_k
        self.weight = nn.Parameter(torch.empty(spec.experts, hidden))
        self.bias = nn.Parameter(torch.empty(spec.experts)) if spec.router_bias else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, h] to (scores [T, k] fp32 that sum to one, experts [T, k] int64)."""
        logits: Tensor = _Logits.apply(x, whole(self.weight))  # type: ignore[no-untyped-call]
        if self.bias is not None:
            logits = logits + whole(self.bias).float()
        top, chosen = logits.topk(self.top_k, dim=-1)
        return top.softmax(-1), chosen


@dataclass(frozen=True)
class Routing:
    """Which row belongs to which choice of which token. A choice is an index into the flattened [T, k]; -1 is none."""

    choice: Tensor
    """[N] int32: the choice that each row serves; -1 for padding."""
    row: Tensor
    """[T k] int32: the row of each choice; -1 where the expert was full."""
    counts: Tensor
    """[E] int64: rows of each expert."""
    top_k: int
    padded: bool
    """Whether -1 occurs."""


def dropless(chosen: Tensor, experts: int) -> Routing:
    """Rows sorted by expert, in the order of tokens inside one; chosen [T, k]."""
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    row = torch.empty_like(order, dtype=torch.int32)
    row[order] = torch.arange(len(order), dtype=torch.int32, device=order.device)
    counts = torch.zeros(experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
    return Routing(order.int(), row, counts, chosen.shape[1], padded=False)


def capacity_rows(tokens: int, spec: Spec) -> int:
    """C: rows of one expert for `tokens` tokens of one rank, its even share times the capacity, rounded up."""
    assert spec.capacity is not None
    return min(tokens, max(1, math.ceil(spec.capacity * tokens * spec.top_k / spec.experts)))


def capped(chosen: Tensor, scores: Tensor, experts: int, capacity: int) -> Routing:
    """`capacity` rows for every expert: the choices of the highest score get them, others are dropped.

    Every size is known beforehand: nothing waits for the device.
    """
    flat, size = chosen.flatten(), experts * capacity
    by_score = scores.detach().flatten().argsort(descending=True, stable=True)
    order = by_score[flat[by_score].argsort(stable=True)]
    expert = flat[order]
    held = torch.zeros(experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
    place = torch.arange(len(flat), device=flat.device) - (held.cumsum(0) - held)[expert]
    kept = place < capacity
    at = torch.where(kept, expert * capacity + place, size)  # the dropped ones share one row that nobody reads
    choice = torch.full((size + 1,), -1, dtype=torch.int32, device=flat.device)
    choice[at] = order.int()
    row = torch.empty_like(flat, dtype=torch.int32)
    row[order] = torch.where(kept, at, -1).int()
    return Routing(choice[:size], row, torch.full_like(held, capacity), chosen.shape[1], padded=True)


def _picked(rows: Tensor, row: Tensor, top_k: int, padded: bool) -> Tensor:
    """[T, k, h]: the row of each choice, zero where it was dropped."""
    picked = rows.index_select(0, row.clamp_min(0) if padded else row)
    if padded:
        picked.masked_fill_((row < 0)[:, None], 0)
    return picked.view(-1, top_k, rows.shape[-1])


def _copied(x: Tensor, choice: Tensor, top_k: int, padded: bool) -> Tensor:
    """[N, h]: the token of each row, zero in padding."""
    rows = x.index_select(0, (choice.clamp_min(0) if padded else choice) // top_k)
    return rows.masked_fill_((choice < 0)[:, None], 0) if padded else rows


class _Spread(torch.autograd.Function):
    """[T, h] to [N, h]: each row a copy of its token. Backward sums a token's copies in one order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, routing: Routing, scale: float) -> Tensor:
        ctx.save_for_backward(routing.row)
        ctx.how, ctx.scale = (routing.top_k, routing.padded), scale
        return _copied(x, routing.choice, *ctx.how)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        total = _picked(grad, *ctx.saved_tensors, *ctx.how).sum(1)
        return (total if ctx.scale == 1.0 else total.mul_(1.0 / ctx.scale)), None, None


class _Combine(torch.autograd.Function):
    """[N, h] to [T, h]: the weighted sum of each token's rows. Gradients of rows are multiplied by `scale`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, scores: Tensor, routing: Routing, scale: float) -> Tensor:
        ctx.save_for_backward(rows, scores, routing.choice, routing.row)
        ctx.how, ctx.scale = (routing.top_k, routing.padded), scale
        return torch.bmm(scores[:, None, :].to(rows.dtype), _picked(rows, routing.row, *ctx.how)).squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, scores, choice, row = ctx.saved_tensors
        d_scores = torch.bmm(_picked(rows, row, *ctx.how), grad[:, :, None]).squeeze(2).to(scores.dtype)
        weight = scores.flatten().index_select(0, choice.clamp_min(0)) * ctx.scale
        d_rows = _copied(grad, choice, *ctx.how).mul_(weight.to(grad.dtype)[:, None])
        return d_rows, d_scores, None, None


def sizes_of(counts: Tensor, total: int) -> list[int]:
    """Counts as whole numbers of the host, which waits for the device; even shares of `total` where they are not real."""
    if is_fake(counts):
        n = counts.numel()
        return [total // n + (1 if i < total % n else 0) for i in range(n)]
    return [int(n) for n in counts.flatten().tolist()]


class _GroupedLinear(torch.autograd.Function):
    """x [N, n_in] sorted into groups, weight [E, n_out, n_in]: [N, n_out], with the memory of CUDA's grouped product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        out = x.new_empty(x.shape[0], weight.shape[1])
        for w, a, b in zip(weight, x.split(sizes), out.split(sizes), strict=True):  # type: ignore[no-untyped-call]
            torch.mm(a, w.T, out=b)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        dx, dw = torch.empty_like(x), torch.empty_like(weight)
        each = zip(weight, x.split(ctx.sizes), grad.split(ctx.sizes), dx.split(ctx.sizes), dw, strict=True)  # type: ignore[no-untyped-call]
        for w, a, g, da, d in each:
            torch.mm(g, w, out=da)
            torch.mm(g.T, a, out=d)  # zero for an expert without rows
        return dx, dw, None


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x [N, n_in] whose rows belong to groups of `counts` [E], weight [E, n_out, n_in]: [N, n_out]."""
    if x.is_cuda and x.shape[1] % ALIGNED == 0 and weight.shape[1] % ALIGNED == 0:
        ends = counts.cumsum(0).int()
        return F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)
    out: Tensor = _GroupedLinear.apply(x, weight, sizes_of(counts, x.shape[0]))  # type: ignore[no-untyped-call]
    return out


class Experts(nn.Module):
    """E experts: `gelu` w2(act(w1 x)) or `gated` w2(act(w1 x) * w3 x). w1, w3 [E, f, h], w2 [E, h, f].

    Under expert parallelism the parameters are DTensors over (ep, etp), and rows belong to the local experts.
    """

    def __init__(self, hidden: int, spec: Spec):
        super().__init__()
        inward, outward = (spec.experts, spec.width, hidden), (spec.experts, hidden, spec.width)
        self.w1 = nn.Parameter(torch.empty(inward))
        self.w2 = nn.Parameter(torch.empty(outward))
        self.w3 = nn.Parameter(torch.empty(inward)) if spec.kind == "gated" else None
        self.activation = activation_of(spec)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows [N, h] sorted by expert, counts [E] of each: [N, h]."""
        up = None if self.w3 is None else grouped_linear(rows, _own(self.w3), counts)
        inner = activate(self.activation, grouped_linear(rows, _own(self.w1), counts), up)
        return grouped_linear(inner, _own(self.w2), counts)


def _own(param: Tensor) -> Tensor:
    return param.to_local() if isinstance(param, DTensor) else param


class Exchange(Protocol):
    """Takes rows to the ranks of their experts, and their results back (see `experts.Exchange`)."""

    def __call__(self, rows: Tensor, counts: Tensor, experts: nn.Module) -> Tensor:
        """rows [N, h], counts [E] of all experts: [N, h], the results in the same order."""


class Moe(nn.Module):
    """Routed experts, and the shared ones that every token visits. x and result: [b, s/tp, h]."""

    def __init__(self, hidden: int, spec: Spec, shared: nn.Module | None):
        super().__init__()
        self.spec = spec
        self.router, self.experts, self.shared = Router(hidden, spec), Experts(hidden, spec), shared
        self.shared_gate = Gate(hidden) if spec.shared_gate else None
        self.exchange: Exchange | None = None
        """Set under expert parallelism."""
        self.gradient_scale = 1.0
        """Factor on the experts' weight gradients: see `experts.gradient_scale`."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        scores, chosen = self.router(flat)
        if self.spec.capacity is None:
            routing = dropless(chosen, self.spec.experts)
        else:
            routing = capped(chosen, scores, self.spec.experts, capacity_rows(len(flat), self.spec))
        scale = self.gradient_scale
        rows: Tensor = _Spread.apply(flat, routing, scale)  # type: ignore[no-untyped-call]
        if self.exchange is None:
            rows = self.experts(rows, routing.counts)
        else:
            rows = self.exchange(rows, routing.counts, self.experts)
        out: Tensor = _Combine.apply(rows, scores, routing, scale)  # type: ignore[no-untyped-call]
        out = out.view_as(x)
        return out if self.shared is None else out + self._shared(x)

    def _shared(self, x: Tensor) -> Tensor:
        assert self.shared is not None
        out: Tensor = self.shared(x)
        return out if self.shared_gate is None else out * self.shared_gate(x)


class Gate(Replicated):
    """sigmoid(x w), one value a token, over the shared experts' output (qwen2_moe)."""

    def __init__(self, hidden: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, hidden))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(F.linear(x, whole(self.weight)))
