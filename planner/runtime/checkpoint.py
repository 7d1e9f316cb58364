"""Save and resume: staged copies, written in the background, published at once; resumed under any layout.

A save copies weights and states to host memory (training waits for that only), then a thread of each rank writes them
with torch.distributed.checkpoint over a group of its own, hashes what it wrote, and rank 0 publishes the checkpoint
(see `storage`). One save is in flight at a time; what goes wrong in it is raised on the training thread.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from planner.errors import PlannerError, Problem, input_error
from planner.runtime import state, storage
from planner.runtime.faults import RunFailed, restarts
from planner.runtime.storage import Manifest, Progress

if TYPE_CHECKING:
    from planner.runtime.train import Trainer
    from planner.specs.training import Options

Say = Callable[[str], None]
"""Writes a line to the log; on rank 0 to the terminal too."""


class Checkpoints:
    """The checkpoints of a run. Building it, `save` and `resume` are collective."""

    def __init__(self, trainer: Trainer, options: Options, folder: Path, say: Say):
        self.trainer, self.options, self.folder, self.say = trainer, options, folder, say
        self.group = dist.new_group(backend="gloo")  # of its own: the thread talks while training does
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    # ---- save ----------------------------------------------------------------------------------------------------

    def save(self, progress: Progress, wait: bool = False) -> None:
        """Begin to save; waits for the one before, and with `wait` for this one. Raises RunFailed when one failed."""
        self.wait()
        world = self.trainer.world
        extra = {**state.generators(world.rank, world.device), **self.trainer.scale.state()}
        staged = state.to_host({**state.tensors(self.trainer), **extra})
        manifest = self._manifest(progress)
        self._thread = threading.Thread(target=self._background, args=(staged, manifest), name="checkpoint", daemon=True)
        self._thread.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait for the save in flight. Raises RunFailed, on the rank whose part failed with the reason."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.poll()

    def poll(self) -> None:
        """Raise what went wrong in the background since, without waiting."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise self._explained(failure)

    def _background(self, staged: dict[str, torch.Tensor], manifest: Manifest) -> None:
        try:
            self._write(staged, manifest)
        except BaseException as error:  # also CheckpointException, which is no Exception; raised in `poll`
            self._failure = error

    def _write(self, staged: dict[str, torch.Tensor], manifest: Manifest) -> None:
        rank, step = self.trainer.world.rank, manifest.progress.step
        target = storage.partial(self.folder, step)
        files = target / storage.STATE
        if rank == 0:
            shutil.rmtree(target, ignore_errors=True)
            files.mkdir(parents=True)
        dist.barrier(self.group)
        save(staged, storage_writer=FileSystemWriter(files), process_group=self.group)
        # The writer's files are named after their rank: each rank hashes its own, which its node still has in memory.
        own = [p for p in files.iterdir() if p.name.startswith(f"__{rank}_") or (rank == 0 and not p.name.startswith("__"))]
        records: list[Any] = [None] * self.trainer.world.size
        dist.all_gather_object(records, {p.name: storage.digest_of(p) for p in own}, group=self.group)
        if rank == 0:
            everything = {name: record for part in records for name, record in part.items()}
            storage.publish(self.folder, manifest.model_copy(update={"files": everything}))
            storage.prune(self.folder, self.options.keep)

    def _explained(self, failure: BaseException) -> RunFailed:
        """The failure as one message, quiet on ranks where nothing failed."""
        rank = self.trainer.world.rank
        failures = failure.failures if isinstance(failure, CheckpointException) else {rank: (failure, None)}
        first = min(failures)
        reason = _root_cause(failures[first][0])
        last = next((p.name for p in storage.candidates(self.folder)), "")
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        problem = Problem(
            "PLN610", f"rank {first} could not save a checkpoint in {self.folder}", f"{reason}; {kept}",
            "make room or give another --checkpoint-dir, then run the same command again",
        )  # fmt: skip
        return RunFailed(problem, loud=rank == first)

    def _manifest(self, progress: Progress) -> Manifest:
        plan, options = self.trainer.plan, self.options
        return Manifest(
            progress=progress,
            seed=options.seed,
            seq_len=plan.job.seq_len,
            global_batch=plan.job.global_batch,
            sources=self.trainer.batches.identity(),
            plan=plan.digest,
            layout=plan.layout.model_dump(mode="json"),
            world_size=self.trainer.world.size,
            schedule=schedule_of(options),
            environment={"torch": torch.__version__},
        )

    # ---- resume --------------------------------------------------------------------------------------------------

    def resume(self) -> Progress | None:
        """Load the checkpoint that `options.resume` names; None when the run starts from the beginning. Collective.

        Raises InputError when what should be resumed is damaged, or another run's.
        """
        if self.trainer.world.rank == 0:
            storage.sweep(self.folder)
        tried = self._tried()
        for path in tried:
            manifest = self._checked(path, only=len(tried) == 1 and self.options.resume not in ("auto", "none"))
            if manifest is None:
                continue
            progress = self._continued(path, manifest)
            state.load(self.trainer, path / storage.STATE, self.group)
            self.trainer.batches.seek(progress.step, progress.position)
            self.say(f"resumed from {path}: {progress.step:,} steps, {progress.samples:,} sequences done")
            return progress
        if tried:
            why = f"all {len(tried)} checkpoints in it are damaged, see above"
            raise input_error("PLN611", f"nothing in {self.folder} can be resumed", why, "give another --checkpoint-dir")
        return None

    def _tried(self) -> list[Path]:
        """Checkpoints to try, as rank 0 sees them."""
        found: list[Any] = [None]
        if self.trainer.world.rank == 0:
            found = [self._wanted()]
        dist.broadcast_object_list(found, src=0, group=self.group)
        if isinstance(found[0], PlannerError):
            raise found[0]
        return list(found[0])

    def _wanted(self) -> list[Path] | PlannerError:
        here, wish = storage.candidates(self.folder), self.options.resume
        if wish == "auto" or (wish == "none" and restarts() > 0):
            return here
        if wish == "none":
            if not here:
                return []
            why = f"it holds {', '.join(p.name for p in here[:3])}"
            fix = "resume it (--resume auto), or give another folder"
            return input_error("PLN613", f"--resume none, but {self.folder} has checkpoints", why, fix)
        if restarts() > 0 and here:  # the named one was where the first attempt began
            return here
        path = Path(wish)
        if not path.is_dir():
            return input_error("PLN611", f"--resume {wish} is no checkpoint", "there is no such folder", "name its folder")
        return [path] if (path / storage.MANIFEST).exists() or not storage.candidates(path) else storage.candidates(path)

    def _checked(self, path: Path, only: bool) -> Manifest | None:
        """The manifest of a whole checkpoint, None (and a line that says why) for a damaged one. Collective."""
        world = self.trainer.world
        reason, manifest = "", None
        try:
            manifest = storage.read_manifest(path)
            reason = storage.damage(path, manifest, world.rank, world.size)
        except ValueError as error:
            reason = str(error)
        reasons: list[Any] = [None] * world.size
        dist.all_gather_object(reasons, reason, group=self.group)
        found = next((r for r in reasons if r), "")
        if not found:
            return manifest
        if only:
            raise input_error("PLN611", f"checkpoint {path} is damaged", found, "resume another one, or --resume auto")
        self.say(f"PLN611 checkpoint {path.name} is damaged: {found}; trying the one before")
        return None

    def _continued(self, path: Path, manifest: Manifest) -> Progress:
        """Where the data goes on. Raises InputError when it would not be the data of the first part."""
        plan, options = self.trainer.plan, self.options
        progress = manifest.progress
        if plan.job.global_batch != manifest.global_batch:
            self.say(
                f"the global batch was {manifest.global_batch}, now it is {plan.job.global_batch}: sequences go on in order"
            )
        for key, now in schedule_of(options).items():
            if (before := manifest.schedule.get(key)) != now:
                self.say(f"{key.replace('_', ' ')} was {before}, now it is {now}")
        if options.reset_data and restarts() == 0:
            return progress.model_copy(update={"position": 0})
        found: list[Any] = [None] * self.trainer.world.size  # nodes may see different files
        own = _changes(manifest, self.trainer.batches.identity(), options.seed, plan.job.seq_len)
        dist.all_gather_object(found, own, group=self.group)
        if changed := next((text for text in found if text), ""):
            fix = "restore it; or begin the new data at its start with --reset-data"
            raise input_error("PLN614", f"the data is not that of {path}", changed, fix)
        return progress


def schedule_of(options: Options) -> dict[str, Any]:
    """What decides the learning rate of a step."""
    return {name: getattr(options, name) for name in ("steps", "lr", "lr_schedule", "warmup_steps", "min_lr")}


def _changes(manifest: Manifest, sources: list[storage.SourceIdentity], seed: int, seq_len: int) -> str:
    """What makes another stream of sequences, "" when nothing. Moved files are the same files."""
    if (manifest.seed, manifest.seq_len) != (seed, seq_len):
        return f"seed {manifest.seed} and sequences of {manifest.seq_len} then, {seed} and {seq_len} now"
    if len(sources) != len(manifest.sources):
        return f"{len(manifest.sources)} token files then, {len(sources)} now"
    for then, now in zip(manifest.sources, sources, strict=True):
        if (then.size, then.digest) != (now.size, now.digest):
            return f"{now.path} changed: {then.size:,} bytes then, {now.size:,} now, {then.digest[:12]} and {now.digest[:12]}"
        if then.weight != now.weight:
            return f"{now.path} had weight {then.weight:g} then, {now.weight:g} now"
    return ""


def _root_cause(error: BaseException) -> str:
    """The innermost reason, in one line. torch hides the system's (a full disk) behind errors of its own file format."""
    while (inner := error.__cause__ or error.__context__) is not None and not isinstance(error, OSError):
        error = inner
    text = " ".join(str(error).split()) or type(error).__name__
    return error.strerror or text if isinstance(error, OSError) else text
