"""The output head: logits, or at once the loss of a micro-batch, made piece by piece so that its logits never exist together.

A piece of the tokens is multiplied into logits, these become the loss and, in place, its gradient, which is multiplied into the
gradients of the head's input and weight; then the next piece takes its memory. The loss is the last operation of a step, so
that its gradient is known in forward but for a scalar, and nothing is computed twice (as Liger's fused linear cross-entropy
does it, Hsu 2024, arXiv 2410.10989, here over pieces large enough for full-rate products, and over a vocabulary split by tensor
parallelism).
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from planner.runtime.collectives import all_gather, reduce_scatter
from planner.specs.pieces import piece_tokens

if TYPE_CHECKING:
    from planner.runtime.precision import LossScale


class Head(nn.Linear):
    """The projection to the vocabulary. With targets in `expected` a forward gives the loss of the next of them, a scalar in
    fp32 times the loss scale; else logits [b, s, V]."""

    def __init__(self, hidden: int, vocab: int, bias: bool):
        super().__init__(hidden, vocab, bias=bias)
        self.expected: deque[Tensor] = deque()
        """Targets [b, s] of the next forwards. A pipeline runs the forwards of a stage in the order of micro-batches."""
        self.scale: LossScale | None = None
        self.group: dist.ProcessGroup | None = None
        """The ranks that the vocabulary is split over."""
        self.given: Tensor | None = None
        """A scalar: the gradient that losses will get in backward, where it is known. Gradients have it in them from the start;
        backward, when it gets this very tensor, has nothing to do. Any other is one more pass over the weight's gradient."""

    def expect(self, targets: Sequence[Tensor]) -> None:
        """Give the next forwards their targets, one a micro-batch."""
        self.expected = deque(targets)

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s, h], of which tensor parallelism gives a rank [b, s/tp, h]."""
        if not self.expected:
            return super().forward(x)
        targets, factor = self.expected.popleft(), self.scale.value if self.scale else 1.0
        if torch.is_grad_enabled():
            inputs = x, self.weight, self.bias, targets, factor, self.group, self.given
            loss: Tensor = _PiecewiseLoss.apply(*inputs)  # type: ignore[no-untyped-call]
            return loss
        return _Pieces(x, _local(self.weight), _local(self.bias), targets, factor, self.group).loss()


class _PiecewiseLoss(torch.autograd.Function):
    """Mean cross-entropy of a micro-batch, with its gradients made in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        factor: float,
        group: dist.ProcessGroup | None,
        given: Tensor | None,
    ) -> Tensor:
        pieces = _Pieces(x, _local(weight), _local(bias), targets, factor, group, given)
        loss, *gradients = pieces.loss_and_gradients()
        ctx.save_for_backward(*gradients)
        ctx.parameters, ctx.given = (None, weight, bias), given
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gradients = ctx.saved_tensors
        if grad is not ctx.given:
            more = grad if ctx.given is None else grad / ctx.given
            gradients = [None if t is None else t.mul_(more) for t in gradients]
        return *(_like(t, own) for t, own in zip(gradients, ctx.parameters, strict=True)), None, None, None, None


def _local(param: Any) -> Any:
    """A rank's rows of a parameter."""
    return param.to_local() if isinstance(param, DTensor) else param


def _like(gradient: Tensor | None, param: Any) -> Tensor | None:
    """The gradient of a rank's rows, as that of the parameter."""
    if gradient is None or not isinstance(param, DTensor):
        return gradient
    return DTensor.from_local(gradient, param.device_mesh, param.placements, shape=param.shape, stride=param.stride())


class _Pieces:
    """The tokens of one micro-batch, all of them on every rank of a split vocabulary, in equal pieces."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        factor: float,
        group: dist.ProcessGroup | None,
        given: Tensor | None = None,
    ):
        self.weight, self.bias, self.group, self.shape = weight, bias, group, x.shape
        self.rows, self.targets = x.reshape(-1, x.shape[-1]), targets.flatten()
        self.first = 0
        if group is not None:
            self.rows, self.targets = _gathered(self.rows, group), _by_rank(targets, group.size())
            self.first = group.rank() * weight.shape[0]
        n = self.rows.shape[0]
        self.size = int(piece_tokens(n, weight.shape[0] * weight.element_size()))
        self.factor = torch.full((), factor / n, device=x.device)
        self.slope = self.factor if given is None else self.factor * given

    def loss(self) -> Tensor:
        """The mean loss times the factor, fp32."""
        total = torch.zeros((), device=self.rows.device)
        for rows, targets in self._pieces():
            total += self._of_piece(nn.functional.linear(rows, self.weight, self.bias), targets)[0]
        return total * self.factor

    def loss_and_gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(loss, gradient of x, of the weight, of the bias)."""
        total = torch.zeros((), device=self.rows.device)
        to_rows, to_weight = torch.empty_like(self.rows), _Sum(self.weight, one=self.size >= len(self.rows))
        to_bias = None if self.bias is None else torch.zeros_like(self.bias, dtype=torch.float32)
        for (rows, targets), out in zip(self._pieces(), torch.split(to_rows, self.size), strict=True):
            logits = nn.functional.linear(rows, self.weight, self.bias)
            value, logsumexp = self._of_piece(logits, targets)
            total += value
            _kernel(gradient_in_place, logits.is_cuda)(logits, targets, logsumexp, self.first, self.slope)
            torch.mm(logits, self.weight, out=out)
            to_weight.add(logits, rows)
            if to_bias is not None:
                to_bias += logits.sum(0, dtype=torch.float32)
            del logits
        own = to_rows if self.group is None else _scattered(to_rows, self.group)
        bias = None if to_bias is None or self.bias is None else to_bias.to(self.bias.dtype)
        return total * self.factor, own.view(self.shape), to_weight.value(), bias

    def _pieces(self) -> zip[tuple[Tensor, Tensor]]:
        return zip(torch.split(self.rows, self.size), torch.split(self.targets, self.size), strict=True)

    def _of_piece(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of the losses, log-sum-exp of each row)."""
        top, total, picked = _kernel(statistics, logits.is_cuda)(logits, targets, self.first)
        if self.group is not None:
            whole = top.clone()
            dist.all_reduce(whole, dist.ReduceOp.MAX, group=self.group)
            both = torch.stack((total * (top - whole).exp(), picked))
            dist.all_reduce(both, group=self.group)
            top, (total, picked) = whole, both
        logsumexp = top + total.log()
        return (logsumexp - picked).sum(), logsumexp


class _Sum:
    """The weight's gradient over the pieces: in fp32, but for a single one."""

    def __init__(self, weight: Tensor, one: bool):
        self.kind = weight.dtype
        self.total = torch.empty_like(weight, dtype=weight.dtype if one else torch.float32)
        self.began = False

    def add(self, gradient: Tensor, rows: Tensor) -> None:
        """Add the product of a piece's logits' gradient [c, V] and its rows [c, h]."""
        if self.total.dtype == gradient.dtype:
            torch.addmm(self.total, gradient.t(), rows, beta=float(self.began), out=self.total)
        else:
            add_product(self.total, gradient.t(), rows, float(self.began))
        self.began = True

    def value(self) -> Tensor:
        return self.total.to(self.kind)


def add_product(total: Tensor, a: Tensor, b: Tensor, keep: float) -> None:
    """total [m, n] fp32 = keep * total + a [m, k] b [k, n], a and b narrower: on CUDA in one product."""
    if total.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=keep, out=total)
    elif keep:
        total.add_(a @ b)
    else:
        total.copy_(a @ b)


def statistics(logits: Tensor, targets: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of logits [c, V]: its largest, the sum of exp(logit - largest), and the target's logit, 0 where that is of
    another rank. `first` is the vocabulary entry of the first column."""
    x, at = logits.float(), targets - first
    here = (at >= 0) & (at < logits.shape[1])
    picked = logits.gather(1, at.clamp(0, logits.shape[1] - 1)[:, None])[:, 0].float()
    top = x.amax(1)
    return top, (x - top[:, None]).exp().sum(1), torch.where(here, picked, 0.0)


def gradient_in_place(logits: Tensor, targets: Tensor, logsumexp: Tensor, first: int, factor: Tensor) -> None:
    """Turn logits into the gradient of `factor` times the sum of their rows' losses."""
    columns = torch.arange(logits.shape[1], device=logits.device)
    wanted = (columns[None] == (targets - first)[:, None]).float()
    logits.copy_(((logits.float() - logsumexp[:, None]).exp() - wanted) * factor)


@functools.cache
def _kernel(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    """On CUDA one kernel, without a copy of the logits."""
    return torch.compile(function, dynamic=False) if compiled else function


def _by_rank(targets: Tensor, ranks: int) -> Tensor:
    """Targets [b, s] in the order of gathered rows: rank after rank, each with its piece of every sequence."""
    b, s = targets.shape
    return targets.view(b, ranks, s // ranks).transpose(0, 1).flatten()


def _gathered(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    whole = rows.new_empty(group.size() * rows.shape[0], rows.shape[1])
    all_gather(whole, rows.contiguous(), group=group)
    return whole


def _scattered(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    own = rows.new_empty(rows.shape[0] // group.size(), rows.shape[1])
    reduce_scatter(own, rows, group=group)
    return own
