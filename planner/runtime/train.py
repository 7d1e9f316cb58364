"""Train a plan: `torchrun --nproc-per-node N -m planner.runtime.train PLAN.json --steps 20 --out DIR`.

`Trainer` builds the plan's model, schedule and optimizer on this rank; `train_step` is the one step of every run.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.tensor import DTensor

from planner import planfile
from planner.errors import InputError, PlannerError
from planner.planfile import Plan
from planner.runtime import loss, metrics, optim, parallelize, pipeline
from planner.runtime.data import Batches
from planner.runtime.mesh import World, build_world, start_processes
from planner.runtime.meter import Meter
from planner.runtime.model import Decoder, initialise

METERED_STEP = 2
"""The step (counted from 0) that the memory meter watches on a CPU: all lasting state exists by then."""


@dataclass(frozen=True)
class Options:
    """What a run adds to its plan."""

    steps: int = 20
    seed: int = 0
    lr: float = 3e-4
    max_norm: float = 1.0
    """Gradients are clipped to this global norm."""
    data: Path | None = None
    """Token file; a synthetic stream when left out."""


class Trainer:
    """A plan's model, schedule, optimizer and data on this rank. Needs a process group; building it is collective."""

    def __init__(self, plan: Plan, device: torch.device, options: Options | None = None):
        self.plan, self.options = plan, options or Options()
        self.layout = plan.layout
        self.microbatches = plan.layout.microbatches(plan.job)
        self.zero = parallelize.effective_zero(plan.layout)
        self.world: World = build_world(plan, device)
        self.parts = self._build_parts()
        self.schedule = pipeline.build_schedule(plan, self.world, dict(self.parts)) if self.world.pp > 1 else None
        self.optimizer = optim.build_optimizer(self.parameters(), self.options.lr)
        self.batches = Batches(plan, self.world, self.options.seed, self.options.data)

    def _build_parts(self) -> dict[int, Decoder]:
        """Build on the meta device, parallelise, then allocate only what this rank keeps."""
        mesh, layout = self.world.mesh, self.layout
        parts = pipeline.build_parts(self.plan, self.world)
        parallelize.apply_recompute(list(parts.values()), layout.stages[self.world.pp_rank])
        for part in parts.values():
            part.tie()
            if layout.tp > 1:
                parallelize.apply_tp(part, mesh["tp"])
            parallelize.apply_zero(part, layout, self.plan.job, mesh["dp"])
            self.allocate(part)
        return parts

    def allocate(self, part: Decoder) -> None:
        """Give a part its memory and first values."""
        initialise(part, self.plan.job.seq_len, self.options.seed, self.world.device)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """This rank's parameters by name; names do not depend on the plan."""
        return [pair for part in self.parts.values() for pair in part.named_parameters()]

    def parameters(self) -> list[nn.Parameter]:
        """This rank's parameters."""
        return [param for _, param in self.named_parameters()]

    def forward_backward(self, step: int) -> float:
        """Gradients of one global batch; returns its mean loss, on every rank. Collective."""
        tokens, targets = self.batches.get(step)
        with loss.split_vocabulary(self.layout.tp):
            losses = self._accumulate(tokens, targets) if self.schedule is None else self._pipeline(tokens, targets)
        _settle_gradients(self.parameters())
        return self._mean_loss(losses)

    def _accumulate(self, tokens: Tensor, targets: Tensor) -> list[Tensor]:
        """One micro-batch after another, without a pipeline."""
        (part,) = self.parts.values()
        size, losses = self.layout.micro_batch, []
        for i in range(self.microbatches):
            rows = slice(i * size, (i + 1) * size)
            parallelize.prepare_accumulation(part, self.zero, last=i == self.microbatches - 1)
            value = loss.token_loss(part(tokens[rows]), targets[rows])
            (value / self.microbatches).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.plain(value))
        return losses

    def _pipeline(self, tokens: Tensor, targets: Tensor) -> list[Tensor]:
        """All micro-batches through the schedule; losses appear on the last stage only."""
        assert self.schedule is not None
        losses: list[Tensor] = []
        self.schedule.step(
            *((tokens,) if self.world.is_first_stage else ()),
            target=targets if self.world.is_last_stage else None,
            losses=losses,
            return_outputs=False,  # otherwise the last stage keeps every micro-batch's logits
        )
        return [loss.plain(value) for value in losses]

    def _mean_loss(self, losses: list[Tensor]) -> float:
        """Mean over micro-batches and data parallel ranks, sent from the last stage to all."""
        total = torch.zeros((), device=self.world.device)
        if losses:
            total = torch.stack(losses).float().mean() / self.world.dp
        mesh = self.world.mesh
        for dim, size in (("dp", self.world.dp), ("pp", self.world.pp)):
            if size > 1:
                dist.all_reduce(total, group=mesh[dim].get_group())
        return float(total)

    def named_gradients(self) -> dict[str, Tensor]:
        """Whole fp32 gradients of this rank's layers, by name. Collective; raises when a parameter has none."""
        return optim.full_gradients(self.named_parameters())

    def optimizer_step(self, step: int) -> tuple[float, float]:
        """Clip, update, clear gradients; returns (gradient norm, learning rate). Collective."""
        lr = optim.learning_rate(step, self.options.steps, self.options.lr)
        optim.set_learning_rate(self.optimizer, lr)
        norm = optim.clip_gradients(self.parameters(), self.options.max_norm, self.world)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, lr

    def train_step(self, step: int) -> tuple[float, float, float]:
        """One optimizer step: (loss, gradient norm, learning rate)."""
        value = self.forward_backward(step)
        return (value, *self.optimizer_step(step))


def _settle_gradients(params: list[nn.Parameter]) -> None:
    """Give each gradient its parameter's placement; FSDP2 does this itself, bare tensor parallel parameters need it."""
    for param in params:
        grad = param.grad
        if isinstance(grad, DTensor) and isinstance(param, DTensor) and grad.placements != param.placements:
            param.grad = grad.redistribute(placements=param.placements)


def run(plan: Plan, device: torch.device, options: Options, out: Path, log_every: int = 1) -> None:
    """Train for `options.steps` steps and write metrics and summary into `out`. Collective."""
    trainer = Trainer(plan, device, options)
    world, meter = trainer.world, Meter()
    if device.type == "cuda":  # what building took is not the plan's peak
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    recorder = metrics.Recorder(plan, world, out, log_every, options.steps)
    peaks: tuple[int | None, int | None] = (None, None)
    for step in range(options.steps):
        metered = device.type == "cpu" and step == min(METERED_STEP, options.steps - 1)
        start = time.perf_counter()
        with meter if metered else nullcontext():
            value, norm, lr = trainer.train_step(step)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elapsed = time.perf_counter() - start
        peaks = metrics.peak_memory(device, meter.peak or None)
        allocated, reserved = metrics.largest(peaks, world)
        recorder.add(
            metrics.StepRecord(
                step=step,
                loss=value,
                grad_norm=norm,
                lr=lr,
                step_time_s=elapsed,
                **metrics.rates(plan, elapsed),
                peak_allocated_bytes=allocated,
                peak_reserved_bytes=reserved,
                metered=metered,
            )
        )
    recorder.close(peaks)


def check_plan(plan: Plan) -> None:
    """Raise InputError for a plan that the runtime does not run: the rules are the bundled engine's, not ours."""
    problems = planfile.refusals(plan)
    if problems:
        raise InputError(problems)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="planner.runtime.train", description="Train a plan.", allow_abbrev=False)
    parser.add_argument("plan", type=Path, help="plan file")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True, help="directory for metrics.jsonl and summary.json")
    parser.add_argument("--data", type=Path, default=None, help="flat binary file of token ids")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=3e-4, help="peak learning rate")
    parser.add_argument("--log-every", type=int, default=1, help="steps between progress lines")
    return parser.parse_args()


@record
def main() -> None:
    """Entry point of each process."""
    arguments = _arguments()
    rank = int(os.environ.get("RANK", "0"))
    # The embedding's output is a view under sequence parallelism; nothing here writes into it.
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    try:
        plan = planfile.read(arguments.plan)
        check_plan(plan)
        device = start_processes(plan)
        options = Options(arguments.steps, arguments.seed, arguments.lr, data=arguments.data)
        run(plan, device, options, arguments.out, arguments.log_every)
        dist.barrier()  # nobody leaves while another still talks to it
    except PlannerError as error:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # every rank stops for the same reason: say it once a node
            print(error, file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        print(f"[rank {rank}] {type(error).__name__}: {first}", file=sys.stderr, flush=True)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # Everything is written. Threads of gloo and of the autograd engine may outlive their owners while the interpreter is
    # torn down, and abort a run that succeeded ("terminate called without an active exception"): leave without teardown.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
