"""What a run reports: one JSON line a step, and a summary at the end (written by rank 0)."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

from planner.planfile import Plan
from planner.runtime.mesh import World
from planner.units import GIB, gib, seconds

WARMUP_STEPS = 2
"""First steps left out of rates: they build kernels, communicators and optimizer states."""


@dataclass(frozen=True)
class StepRecord:
    """One line of metrics.jsonl. Rates are over the whole cluster unless named otherwise."""

    step: int
    loss: float
    """Mean over the global batch."""
    grad_norm: float
    """Before clipping."""
    lr: float
    step_time_s: float
    tokens_per_s: float
    tokens_per_s_per_gpu: float
    mfu: float
    peak_allocated_bytes: int | None
    """Most over ranks so far; None on a CPU before the metered step."""
    peak_reserved_bytes: int | None
    metered: bool
    """Whether the meter slowed this step down."""
    loss_scale: float | None = None
    """Factor on the loss after this step, in fp16."""
    skipped_steps: int = 0
    """Steps so far that made no update because fp16 gradients overflowed."""


def rates(plan: Plan, step_time_s: float) -> dict[str, float]:
    """Tokens per second and MFU (model FLOPs without recompute over the dense peak) at a step time."""
    tokens_per_s = plan.job.tokens_per_step / step_time_s
    per_gpu = tokens_per_s / plan.layout.world_size
    mfu = plan.model.flops_per_token(plan.job.seq_len) * per_gpu / plan.cluster.peak_flops
    return {"tokens_per_s": tokens_per_s, "tokens_per_s_per_gpu": per_gpu, "mfu": mfu}


def peak_memory(device: torch.device, metered_bytes: int | None) -> tuple[int | None, int | None]:
    """(allocated, reserved) peak bytes of this rank: CUDA's own counters, or the meter's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return metered_bytes, None


def largest(values: tuple[int | None, int | None], world: World) -> tuple[int | None, int | None]:
    """The largest of each over all ranks. Collective."""
    data = torch.tensor([-1 if v is None else v for v in values], dtype=torch.int64, device=world.device)
    dist.all_reduce(data, op=dist.ReduceOp.MAX)
    first, second = (int(v) if v >= 0 else None for v in data.tolist())
    return first, second


class Recorder:
    """Rank 0's files and progress lines; on other ranks it only takes part in the collectives."""

    def __init__(self, plan: Plan, world: World, directory: Path, log_every: int, steps: int):
        self.plan, self.world, self.directory = plan, world, directory
        self.log_every, self.steps = max(1, log_every), steps
        self.records: list[StepRecord] = []
        self.file: TextIO | None = None
        if world.rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            self.file = (directory / "metrics.jsonl").open("w", encoding="utf-8")

    def add(self, record: StepRecord) -> None:
        """Append one step."""
        self.records.append(record)
        if self.file is None:
            return
        self.file.write(json.dumps(asdict(record)) + "\n")
        self.file.flush()
        if record.step % self.log_every == 0 or record.step == self.steps - 1:
            peak = "" if record.peak_allocated_bytes is None else f"  peak {gib(record.peak_allocated_bytes, 2)}"
            note = "  (metered)" if record.metered else ""
            line = f"step {record.step:>5}  loss {record.loss:.4f}  norm {record.grad_norm:.3f}"
            line += f"  {seconds(record.step_time_s)}  {record.tokens_per_s:,.0f} tokens/s  MFU {record.mfu:.1%}"
            print(line + peak + note, file=sys.stderr, flush=True)

    def close(self, peaks: tuple[int | None, int | None]) -> None:
        """Gather every rank's peak and write the summary. Collective."""
        everyone: list[Any] = [None] * self.world.size
        dist.all_gather_object(everyone, (*peaks, self.world.pp_rank))
        if self.file is None:
            return
        self.file.close()
        allocated, reserved, stages = zip(*everyone, strict=True)
        path = self.directory / "summary.json"
        text = json.dumps(self._summary(list(allocated), list(reserved), list(stages)), indent=2)
        path.write_text(text + "\n", encoding="utf-8")

    def _summary(self, allocated: list[int | None], reserved: list[int | None], stages: list[int]) -> dict[str, Any]:
        step_time = typical_step_time(self.records)
        return {
            "steps": len(self.records),
            "first_loss": self.records[0].loss,
            "last_loss": self.records[-1].loss,
            "skipped_steps": self.records[-1].skipped_steps,
            "step_time_s": step_time,
            "step_times_s": [r.step_time_s for r in self.records],
            **rates(self.plan, step_time),
            "peak_allocated_gib": [None if v is None else v / GIB for v in allocated],
            "peak_reserved_gib": [None if v is None else v / GIB for v in reserved],
            "stage_of_rank": stages,
            "device": device_name(self.world.device),
            "torch_version": torch.__version__,
            "world_size": self.world.size,
        }


def typical_step_time(records: list[StepRecord]) -> float:
    """Median seconds of a step without warm-up and metered steps; of what there is when nothing remains."""
    clean = [r for r in records if not r.metered]
    settled = [r for r in clean if r.step >= WARMUP_STEPS]
    return statistics.median(r.step_time_s for r in settled or clean or records)


def device_name(device: torch.device) -> str:
    """The accelerator's name, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
