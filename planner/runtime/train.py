"""Train a plan: `torchrun --nproc-per-node N -m planner.runtime.train PLAN.json --steps 20 --out DIR`.

`Trainer` builds the plan's model, schedule and optimizer on this rank; `train_step` is the one step of every run. What
happens between steps is in `loop`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from planner.planfile import Plan
from planner.runtime import experts, faults, loss, masters, optim, parallelize, pipeline, precision, replicated
from planner.runtime.data import Batches
from planner.runtime.mesh import World, build_world
from planner.runtime.model import Decoder, initialise
from planner.runtime.precision import LossScale
from planner.specs.training import Options


class Trainer:
    """A plan's model, schedule, optimizer and data on this rank. Needs a process group; building it is collective."""

    def __init__(self, plan: Plan, device: torch.device, options: Options | None = None):
        self.plan, self.options = plan, options or Options()
        self.layout = plan.layout
        traits = plan.engine.split("+")[1:]
        self.compiled = "compile" in traits
        self.keeps_products = "selective-products" in traits
        self.lowered = masters.lowered(plan.layout, plan.job, plan.model)
        """Whether parameters are in the compute type, with masters beside unless the engine keeps none."""
        self.with_masters = self.lowered and "bf16-states" not in traits
        self.in_pieces = self.compiled
        """Whether the head makes the loss, and its gradients, piece by piece."""
        self.microbatches = plan.layout.microbatches(plan.job)
        self.zero = parallelize.effective_zero(plan.layout)
        self.world: World = build_world(plan, device)
        self.scale = LossScale(plan.job.precision)
        self.share = 1.0 / self.microbatches
        """A micro-batch's part in the step's loss, and so the gradient of its own."""
        self.given = torch.full((), self.share, device=device)
        """The same on the device."""
        self.parts = self._build_parts()
        self.schedule = None
        if self.world.pp > 1:
            self.schedule = pipeline.build_schedule(plan, self.world, dict(self.parts), self.root, self.in_pieces)
        self.optimizer = optim.build_optimizer(self.parameters(), self.options.lr)
        self.batches = Batches(plan, self.world, self.options.seed, self.options.data)
        self.own_losses: list[Tensor] = []
        """This rank's loss of each micro-batch of the last step, on the last stage."""
        self.mark: Callable[[int, int], None] = lambda step, phase: None
        """Told where the step is, by an index of `faults.PHASES`."""

    def _build_parts(self) -> dict[int, Decoder]:
        """Build on the meta device, parallelise, then allocate only what this rank keeps."""
        mesh, layout = self.world.mesh, self.layout
        precision.check_fp8(self.plan, self.world.device)
        parts = pipeline.build_parts(self.plan, self.world)
        parallelize.apply_recompute(list(parts.values()), layout.stages[self.world.pp_rank], self.keeps_products)
        for part in parts.values():
            if self.lowered:
                part.to(precision.DTYPES[self.plan.job.precision])
            part.tie()
            if part.head is not None:
                part.head.scale = self.scale
                part.head.given = self.given if self.in_pieces else None
            if self.plan.job.linears == "fp8":
                precision.apply_fp8(part)
            if layout.tp > 1:
                parallelize.apply_tp(part, mesh["tp"], self.in_pieces)
            if layout.cp > 1:
                parallelize.apply_cp(part, mesh["cp"], self.world.ring)
            experts.place(part, self.world.experts, layout)
            if self.compiled:
                parallelize.apply_compile(part, layout.tp)
            parallelize.apply_zero(part, layout, self.plan.job, self.world.states, self.world.experts, self.lowered)
            self.allocate(part)
        return parts

    def allocate(self, part: Decoder) -> None:
        """Give a part its memory and first values."""
        job, device = self.plan.job, self.world.device
        home = torch.device("cpu") if self.layout.offload == "optimizer" else device
        part.to_empty(device=home)
        part.tie()
        if self.with_masters:
            masters.add(part.parameters())
        if self.with_masters and self.microbatches > 1:
            masters.add_up_in_fp32(part.parameters())
        initialise(part, self.world.positions(job.seq_len), self.options.seed, device, precision.DTYPES[job.precision])

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """This rank's parameters by name; names do not depend on the plan."""
        return [pair for part in self.parts.values() for pair in part.named_parameters()]

    def parameters(self) -> list[nn.Parameter]:
        """This rank's parameters."""
        return [param for _, param in self.named_parameters()]

    def forward_backward(self, step: int) -> float:
        """Gradients of one global batch; returns its mean loss, on every rank. Collective."""
        return float(self.gradients(step))

    def gradients(self, step: int) -> Tensor:
        """The same, the loss still on the device: nothing here waits for it."""
        tokens, targets = self.batches.get(step)
        self.mark(step, 1)
        self.expect(targets)
        with loss.split_vocabulary(self.layout.tp):
            losses = self._accumulate(tokens, targets) if self.schedule is None else self._pipeline(tokens, targets)
        _settle_gradients(self.parameters())
        self.scale.unscale(self.parameters())
        self.own_losses = losses
        return self.mean_loss(losses) / self.scale.value

    def scaled_loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Loss of a micro-batch, times the loss scale, of what the last stage puts out."""
        if not self.in_pieces:
            return loss.token_loss(output, targets) * self.scale.value
        return output

    def root(self, output: Tensor, targets: Tensor) -> Tensor:
        """The same where torch's pipeline starts backward, with a gradient of 1, so that gradients come as a mean.

        torch would divide them at the step's end, in one more pass, and where it finds them: not those that `masters` add up.
        """
        value = self.scaled_loss(output, targets)
        return loss.root(value, self.given) if self.in_pieces else value * self.share

    def expect(self, targets: Tensor) -> None:
        """Tell a head that makes the loss what to compare the next batch with."""
        for part in self.parts.values():
            if part.head is not None and self.in_pieces:
                part.head.expect(torch.split(targets, self.layout.micro_batch))

    def _accumulate(self, tokens: Tensor, targets: Tensor) -> list[Tensor]:
        """One micro-batch after another, without a pipeline."""
        (part,) = self.parts.values()
        losses = []
        for i, (own, wanted) in enumerate(self.micro_batches(tokens, targets)):
            parallelize.prepare_accumulation(part, self.zero, last=i == self.microbatches - 1)
            value = self.scaled_loss(part(own), wanted)
            if self.in_pieces:
                torch.autograd.backward(value, self.given)
            else:
                (value * self.share).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.plain(value))
        return losses

    def micro_batches(self, tokens: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's batch in micro-batches."""
        size = self.layout.micro_batch
        return zip(torch.split(tokens, size), torch.split(targets, size), strict=True)

    def _pipeline(self, tokens: Tensor, targets: Tensor) -> list[Tensor]:
        """Forward and backward of all micro-batches through the schedule."""
        assert self.schedule is not None
        return self.through(self.schedule.step, tokens, targets)

    def through(self, run: Callable[..., Any], tokens: Tensor, targets: Tensor) -> list[Tensor]:
        """Losses of all micro-batches by one of the schedule's methods, times the loss scale; on the last stage only."""
        losses: list[Tensor] = []
        run(
            *((tokens,) if self.world.is_first_stage else ()),
            target=targets if self.world.is_last_stage else None,
            losses=losses,
            return_outputs=False,  # otherwise the last stage keeps every micro-batch's logits
        )
        return [loss.plain(value) if self.in_pieces else loss.plain(value) / self.share for value in losses]

    def mean_loss(self, losses: list[Tensor]) -> Tensor:
        """Mean over micro-batches, data and context parallel ranks, sent from the last stage to all."""
        total = torch.zeros((), device=self.world.device)
        if losses:
            total = torch.stack(losses).float().mean() / self.world.data.size()
        for mesh in (self.world.data, self.world.mesh["pp"]):
            if mesh.size() > 1:
                dist.all_reduce(total, group=mesh.get_group())
        return total

    def named_gradients(self) -> dict[str, Tensor]:
        """Whole fp32 gradients of this rank's layers, by name. Collective; raises when a parameter has none."""
        return optim.full_gradients(self.named_parameters())

    def optimizer_step(self, step: int) -> tuple[float, float]:
        """Clip, update, clear gradients; returns (gradient norm, learning rate). Collective.

        Gradients that overflowed make no step. Raises RunFailed when they did in a type without a loss scale.
        """
        norm, lr = self.update(step)
        value = float(norm)
        self._clear(step, value)
        return value, lr

    def _clear(self, step: int, norm: float) -> None:
        """Clear gradients; RunFailed where they overflowed in a type without a loss scale."""
        if not self.scale.active:
            faults.check_norm(self, step, norm)
        self.optimizer.zero_grad(set_to_none=True)

    def update(self, step: int) -> tuple[Tensor, float]:
        """Clip and update: (gradient norm, learning rate). Weights stay as they are where the norm is not finite, which the
        device finds by itself: only fp16's loss scale waits for the norm here."""
        lr = optim.learning_rate(step, self.options)
        optim.set_learning_rate(self.optimizer, lr)
        norm = optim.global_norm(self.parameters(), self.world)
        if not self.scale.active or self.scale.accepts(norm):
            optim.clip_gradients(self.optimizer, self.options.max_norm, norm)
            self.optimizer.step()
        return norm, lr

    def train_step(self, step: int) -> tuple[float, float, float]:
        """One optimizer step: (loss, gradient norm, learning rate). The host waits for the device once, at its end, with the
        next batch at hand. Raises RunFailed when loss or norm are not finite; no weight has changed then."""
        value = self.gradients(step)
        self.mark(step, 2)
        norm, lr = self.update(step)
        self.batches.prepare(step + 1)
        loss_, norm_ = torch.stack((value, norm.to(value.device))).tolist()
        faults.check_loss(self, step, loss_)
        self._clear(step, norm_)
        return loss_, norm_, lr


def _settle_gradients(params: list[nn.Parameter]) -> None:
    """Give each gradient its parameter's placement; FSDP2 does this itself, bare tensor parallel parameters need it."""
    parts: dict[torch.dtype, list[nn.Parameter]] = {}
    for param in params:
        grad = masters.gradient(param)
        if not isinstance(grad, DTensor) or not isinstance(param, DTensor) or grad.placements == param.placements:
            continue
        if replicated.is_part(grad, param):
            parts.setdefault(grad.dtype, []).append(param)
        else:
            masters.set_gradient(param, grad.redistribute(placements=param.placements))
    for several in parts.values():
        sums = replicated.add_up([masters.gradient(param) for param in several])  # type: ignore[misc]
        for param, value in zip(several, sums, strict=True):
            masters.set_gradient(param, value)


if __name__ == "__main__":  # the module that launch files name; the program is in `command`
    from planner.runtime.command import main

    main()
