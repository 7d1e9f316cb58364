"""What a run reports: one JSON line a step, and a summary at the end (written by rank 0)."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
import torch.distributed as dist

from planner.planfile import Plan
from planner.runtime.mesh import World
from planner.runtime.sinks import Sink
from planner.units import GIB, gib, seconds

if TYPE_CHECKING:
    from planner.runtime.train import Trainer

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
    profiled: bool = False
    """Whether the profiler slowed this step down."""
    samples: int = 0
    """Sequences trained so far, this step's included."""
    tokens: int = 0
    """Tokens trained so far."""
    eval_loss: float | None = None
    """Mean over the evaluation set after this step, where there was an evaluation."""


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


def agree(values: tuple[int | None, int | None], stop: int, world: World) -> tuple[int | None, int | None, int]:
    """(allocated, reserved, stop): the largest of each over all ranks, and how any of them was asked to stop.

    Collective.
    """
    data = torch.tensor([*(-1 if v is None else v for v in values), stop], dtype=torch.int64, device=world.device)
    dist.all_reduce(data, op=dist.ReduceOp.MAX)
    first, second, asked = data.tolist()
    return (first if first >= 0 else None), (second if second >= 0 else None), int(asked)


class Recorder:
    """Rank 0's files and progress lines; on other ranks it only takes part in the collectives.

    A resumed run goes on in metrics.jsonl after the step it resumes from: lines of steps done again are dropped.
    """

    def __init__(self, trainer: Trainer, say: Callable[[str], None], first: int, sinks: list[Sink]):
        self.plan, self.world, self.options = trainer.plan, trainer.world, trainer.options
        self.say, self.sinks, self.first = say, sinks, first
        self.directory = Path(self.options.out)
        self.records: list[StepRecord] = []
        """Of this process: earlier ones of a resumed run are in the file."""
        self.file: TextIO | None = None
        if self.world.rank == 0:
            self.file = self._opened(self.directory / "metrics.jsonl")

    def _opened(self, path: Path) -> TextIO:
        """The file with the lines of the steps before the first one of this process."""
        kept = [line for line in _lines(path) if self.first and line["step"] < self.first]
        temporary = path.with_suffix(".part")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        temporary.replace(path)
        return path.open("a", encoding="utf-8")

    def add(self, record: StepRecord) -> None:
        """Append one step."""
        self.records.append(record)
        if self.file is None:
            return
        values = asdict(record)
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()
        for sink in self.sinks:
            sink.add(
                record.step, {k: v for k, v in values.items() if v is not None and k not in ("step", "metered", "profiled")}
            )
        last = record.step == self.options.steps - 1
        if record.step % self.options.log_every == 0 or last or record.eval_loss is not None:
            self.say(progress_line(record))

    def close(self, peaks: tuple[int | None, int | None]) -> None:
        """Gather every rank's peak and write the summary. Collective."""
        everyone: list[Any] = [None] * self.world.size
        dist.all_gather_object(everyone, (*peaks, self.world.pp_rank))
        if self.file is None:
            return
        self.file.close()
        for sink in self.sinks:
            sink.close()
        allocated, reserved, stages = zip(*everyone, strict=True)
        path = self.directory / "summary.json"
        text = json.dumps(self._summary(list(allocated), list(reserved), list(stages)), indent=2)
        path.write_text(text + "\n", encoding="utf-8")

    def _summary(self, allocated: list[int | None], reserved: list[int | None], stages: list[int]) -> dict[str, Any]:
        lines = _lines(self.directory / "metrics.jsonl")
        timing: dict[str, Any] = {}
        if self.records:
            step_time = typical_step_time(self.records)
            timing = {"step_time_s": step_time, "step_times_s": [r.step_time_s for r in self.records]}
            timing |= rates(self.plan, step_time)
        evaluated = [line["eval_loss"] for line in lines if line.get("eval_loss") is not None]
        return {
            "steps": len(lines),
            "resumed_at": self.first or None,
            "first_loss": lines[0]["loss"] if lines else None,
            "last_loss": lines[-1]["loss"] if lines else None,
            "skipped_steps": self.records[-1].skipped_steps if self.records else 0,
            "eval_loss": evaluated[-1] if evaluated else None,
            **timing,
            "peak_allocated_gib": [None if v is None else v / GIB for v in allocated],
            "peak_reserved_gib": [None if v is None else v / GIB for v in reserved],
            "stage_of_rank": stages,
            "device": device_name(self.world.device),
            "torch_version": torch.__version__,
            "world_size": self.world.size,
        }


def _lines(path: Path) -> list[dict[str, Any]]:
    """The steps of a metrics file; a last line that a kill cut off is left out."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(dict(json.loads(text)))
        except ValueError:
            continue
    return found


def progress_line(record: StepRecord) -> str:
    """One step for the terminal."""
    line = f"step {record.step:>5}  loss {record.loss:.4f}  norm {record.grad_norm:.3f}  lr {record.lr:.2e}"
    line += f"  {seconds(record.step_time_s)}  {record.tokens_per_s:,.0f} tokens/s  MFU {record.mfu:.1%}"
    if record.peak_allocated_bytes is not None:
        line += f"  peak {gib(record.peak_allocated_bytes, 2)}"
    if record.eval_loss is not None:
        line += f"  eval loss {record.eval_loss:.4f}"
    return line + ("  (metered)" if record.metered else "") + ("  (profiled)" if record.profiled else "")


def typical_step_time(records: list[StepRecord]) -> float:
    """Median seconds of a step without warm-up, metered and profiled steps; of what there is when nothing remains.

    The first steps of a process warm up, wherever its run was resumed.
    """
    clean = [r for r in records if not (r.metered or r.profiled)]
    settled = [r for r in clean if r.step >= records[0].step + WARMUP_STEPS]
    return statistics.median(r.step_time_s for r in settled or clean or records)


def device_name(device: torch.device) -> str:
    """The accelerator's name, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
