"""The training loop: steps, and what happens between them (metrics, evaluation, checkpoints, requests to stop)."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from planner.planfile import Plan
from planner.runtime import faults, logs, metrics, sinks, weights
from planner.runtime.checkpoint import Checkpoints
from planner.runtime.evaluate import Evaluation
from planner.runtime.logs import RankLog
from planner.runtime.meter import Meter
from planner.runtime.profiling import Profile
from planner.runtime.storage import Progress
from planner.runtime.train import Trainer
from planner.specs.training import Options

METERED_STEP = 2
"""The step (counted from this process's first) that the memory meter watches on a CPU: all lasting state exists by then."""


class Run:
    """One process's part of a training run. All methods are collective."""

    def __init__(self, plan: Plan, device: torch.device, options: Options, log: RankLog):
        self.plan, self.options, self.log, self.device = plan, options, log, device
        self.out = Path(options.out)
        self.trainer = Trainer(plan, device, options)
        folder = options.checkpoint_folder
        self.checkpoints = Checkpoints(self.trainer, options, folder, log.say) if folder else None
        self.evaluation = Evaluation(self.trainer) if options.eval_data else None
        self.meter = Meter()
        self.peaks: tuple[int | None, int | None] = (None, None)
        self.profile = Profile(self.out / "profile", self.trainer.world.rank, options.profile)
        self._introduce()
        self.progress = self._begin()
        built = sinks.build(plan, options) if self.trainer.world.rank == 0 else []
        self.recorder = metrics.Recorder(self.trainer, log.say, self.progress.step, built)

    def _introduce(self) -> None:
        """Say what runs here."""
        own = sum(p.numel() for p in self.trainer.parameters())
        about = logs.describe(self.plan, self.trainer.world, self.options, own, faults.restarts())
        self.log.write(str(about))
        if self.trainer.world.rank == 0:
            self.log.say(logs.headline(about))
            logs.write_environment(about, self.out)

    def _begin(self) -> Progress:
        """Resume, or start with given or fresh weights."""
        if self.checkpoints is not None and (progress := self.checkpoints.resume()) is not None:
            return progress
        if self.options.init_from:
            weights.load(self.trainer, Path(self.options.init_from))
            self.log.say(f"first weights from {self.options.init_from}")
        return Progress()

    def train(self) -> None:
        """All steps, then the last checkpoint, exports and the summary. Raises Stopped when the run was asked to stop."""
        rank, size = self.trainer.world.rank, self.trainer.world.size
        if self.device.type == "cuda":  # what building took is not the plan's peak
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        first = self.progress.step
        with (
            faults.StopRequest(self.out, rank) as request,
            faults.Watchdog(self.log.folder, rank, size, self.options.step_timeout) as watchdog,
            self.profile as profile,
        ):
            self.trainer.mark = watchdog.enter
            for step in range(first, self.options.steps):
                with watchdog.step(step):
                    stop = self._step(step, metered=self._is_metered(step, first), request=request)
                    watchdog.enter(step, 3)
                    self._save(stop)
                profile.step()
                if stop:
                    raise faults.Stopped(f"asked to stop: {self.progress.step:,} of {self.options.steps:,} steps done", stop)
            with watchdog.step(self.options.steps):
                watchdog.enter(self.options.steps, 3)
                self._finish()

    def _is_metered(self, step: int, first: int) -> bool:
        return self.device.type == "cpu" and step == min(first + METERED_STEP, self.options.steps - 1)

    def _step(self, step: int, metered: bool, request: faults.StopRequest) -> int:
        """One step and its record; returns how any rank was asked to stop."""
        if metered and self.checkpoints is not None:
            self.checkpoints.wait()  # copies that wait to be written are not the plan's memory
        start = time.perf_counter()
        around: AbstractContextManager[object] = self.meter if metered else nullcontext()
        with around:
            value, norm, lr = self.trainer.train_step(step)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elapsed = time.perf_counter() - start
        job, done = self.plan.job, self.progress
        self.progress = Progress(
            step=step + 1, samples=done.samples + job.global_batch, position=done.position + job.global_batch
        )
        self.peaks = metrics.peak_memory(self.device, self.meter.peak or None)
        allocated, reserved, stop = metrics.agree(self.peaks, request.how(), self.trainer.world)
        record = metrics.StepRecord(
            step=step,
            loss=value,
            grad_norm=norm,
            lr=lr,
            step_time_s=elapsed,
            **metrics.rates(self.plan, elapsed),
            peak_allocated_bytes=allocated,
            peak_reserved_bytes=reserved,
            metered=metered,
            profiled=self.profile.slows,
            samples=self.progress.samples,
            tokens=self.progress.samples * job.seq_len,
            eval_loss=self._evaluate(step),
            loss_scale=self.trainer.scale.value if self.trainer.scale.active else None,
            skipped_steps=self.trainer.scale.skipped,
        )
        self.recorder.add(record)
        self.log.write(f"step {step} loss {value!r} norm {norm!r} sequences {self.progress.samples}")
        return stop

    def _evaluate(self, step: int) -> float | None:
        """The evaluation loss where one is due."""
        every, last = self.options.eval_every, step == self.options.steps - 1
        if self.evaluation is None or not (last or (every and (step + 1) % every == 0)):
            return None
        self.trainer.mark(step, 4)
        return self.evaluation.loss()

    def _save(self, stop: int) -> None:
        """Save where it is due; when the run stops, wait until that is on disk. Raises RunFailed."""
        if self.checkpoints is None:
            return
        self.checkpoints.poll()
        every = self.options.save_every
        if stop or (every and self.progress.step % every == 0 and self.progress.step < self.options.steps):
            self.checkpoints.save(self.progress, wait=bool(stop))

    def _finish(self) -> None:
        """The last checkpoint, the exported weights, the summary."""
        if self.checkpoints is not None:
            self.checkpoints.wait()
            if self.recorder.records:
                self.checkpoints.save(self.progress, wait=True)
        if self.options.export_hf:
            weights.export(self.trainer, Path(self.options.export_hf))
            self.log.say(f"weights written to {self.options.export_hf}")
        self.recorder.close(self.peaks)
