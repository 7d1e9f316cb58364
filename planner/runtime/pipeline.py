"""Pipeline parallelism: which layers a rank holds, its stages, and the schedule.

`Layout.chunk_ranges` and `specs.layout.stage_of` say which layers and which stage a rank's chunk is: chunk after chunk over the
ranks, or down and up again in the V of ZBV and DualPipeV, whose first rank holds both the embedding and the head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining._backward import stage_backward
from torch.distributed.pipelining.schedules import _PipelineSchedule

from planner.planfile import Plan
from planner.runtime.mesh import World
from planner.runtime.model import Decoder
from planner.runtime.parallelize import effective_zero
from planner.runtime.precision import DTYPES
from planner.runtime.sends import MailedStage, open_mailbox
from planner.specs.layout import SPLIT_BACKWARD, stage_of

CHUNKED = {
    "interleaved": ScheduleInterleaved1F1B,
    "interleaved-zb": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}
"""torch's schedules of several stages a rank."""


def build_parts(plan: Plan, world: World) -> dict[int, Decoder]:
    """This rank's parts on the meta device, by stage number, in the order of its chunks."""
    layout = plan.layout
    last = layout.pp * layout.virtual_stages - 1
    parts = {}
    with torch.device("meta"):
        for chunk, layers in enumerate(layout.chunk_ranges[world.pp_rank]):
            stage = stage_of(layout.schedule, layout.pp, world.pp_rank, chunk)
            parts[stage] = Decoder(plan.model, layers, first=stage == 0, last=stage == last)
    return parts


class Stage(MailedStage):
    """A stage that can be evaluated in a V: torch's passes gradients between a rank's two stages even where there are none."""

    def get_local_bwd_output(self, mb_index: int) -> Any:
        """As in torch; nothing without a backward."""
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()  # type: ignore[no-untyped-call]

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        """As in torch; nothing without a backward."""
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)


class ZeroStage(Stage):
    """A stage that reduce-scatters gradients after each micro-batch, so that ZeRO 2 and 3 keep their memory.

    torch's stage never reduces before the end of the step: full unsharded fp32 gradients of the stage live through it,
    whatever the ZeRO stage.
    """

    zero: int = 2

    def backward_maybe_with_nosync(self, backward_type: Any, bwd_kwargs: dict[str, Any], last_backward: bool = False) -> Any:
        """As in torch, for full backwards of an FSDP2 module; the final `perform_reduce_grad` then finds nothing."""
        if backward_type != "full" or not isinstance(self.submod, FSDPModule):
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        self.submod.set_is_last_backward(last_backward)
        self.submod.set_reshard_after_backward(self.zero == 3)
        self.submod.set_requires_gradient_sync(True)
        self.submod.set_requires_all_reduce(last_backward)
        grads = stage_backward(bwd_kwargs["stage_output"], bwd_kwargs["output_grads"], bwd_kwargs["input_values"])
        return grads, None


def _passed(plan: Plan) -> torch.Tensor:
    """What goes from stage to stage, on the meta device."""
    layout = plan.layout
    shape = (layout.micro_batch, plan.job.seq_len // layout.cp // layout.tp, plan.model.hidden)
    return torch.empty(shape, dtype=DTYPES[plan.job.precision], device="meta", requires_grad=True)


def _boundary(plan: Plan, stage: int, stages: int, in_pieces: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes that enter and leave a stage, as meta tensors: static metadata spares a trial step on pickled shapes."""
    b, s, hidden = plan.layout.micro_batch, plan.job.seq_len // plan.layout.cp, _passed(plan)
    tokens = torch.empty(b, s, dtype=torch.int64, device="meta")
    if in_pieces:
        result = torch.empty((), device="meta", requires_grad=True)
    else:
        result = torch.empty(b, s, plan.model.vocab, dtype=hidden.dtype, device="meta", requires_grad=True)
    return (tokens if stage == 0 else hidden), (result if stage == stages - 1 else hidden)


Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def build_schedule(
    plan: Plan, world: World, parts: dict[int, nn.Module], loss: Loss, in_pieces: bool = False
) -> _PipelineSchedule:
    """The plan's schedule over this rank's parts. `loss` of (the last stage's output, targets) is where backward starts, so
    that gradients add up to their mean; that output is logits, or with the loss `in_pieces` the loss."""
    layout = plan.layout
    stages = world.pp * layout.virtual_stages
    zero = effective_zero(layout)
    # Where the backward is split, only torch's own stage knows when the last gradient is there: it reduces after all of them.
    kind = ZeroStage if zero >= 2 and layout.schedule not in SPLIT_BACKWARD else Stage
    m, group = layout.microbatches(plan.job), world.mesh["pp"].get_group()
    mailbox = open_mailbox(layout, m, _passed(plan), group, world.device)
    built: list[Any] = []
    for index, part in parts.items():
        enters, leaves = _boundary(plan, index, stages, in_pieces)
        stage = kind(part, index, stages, world.device, input_args=enters, output_args=leaves, group=group)
        stage.mailbox = mailbox
        if isinstance(stage, ZeroStage):
            stage.zero = zero
        built.append(stage)
    if layout.schedule in CHUNKED:
        return CHUNKED[layout.schedule](built, m, loss_fn=loss, scale_grads=False)
    if layout.schedule == "gpipe":
        return ScheduleGPipe(built[0], m, loss_fn=loss, scale_grads=False)
    return Schedule1F1B(built[0], m, loss_fn=loss, scale_grads=False)
