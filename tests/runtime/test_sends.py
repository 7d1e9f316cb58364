"""Sends between stages through a mailbox. That copy engines do them is a test on two GPUs (`test_cuda`); here its buffers and
signals are files that the processes share, and everything else is what runs there."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import plans
import pytest
import torch
import torch.distributed as dist
import worlds
from torch import Tensor

from planner.runtime import pipeline, sends, symmetric
from planner.runtime.train import Options, Trainer
from planner.specs.layout import CHUNKED, V_SHAPED, Layout, stage_places


class Shared(sends.Mailbox):
    """A mailbox of processes of one machine without devices."""

    def __init__(self, layout: Layout, microbatches: int, like: Tensor, rank: int, folder: Path):
        super().__init__(layout, microbatches, like, rank)
        self.all = [self._file(folder / f"buffers-{r}", self.buffers * self.size, self.dtype) for r in range(layout.pp)]
        self.signals = [self._file(folder / f"signals-{r}", self.buffers, torch.int32) for r in range(layout.pp)]
        self.own = self.all[rank]
        self.sent = 0
        self.stages: list[Any] = []

    @staticmethod
    def _file(path: Path, size: int, dtype: torch.dtype) -> Tensor:
        return torch.from_file(str(path), shared=True, size=size, dtype=dtype)

    def send(self, tensor: Tensor, place: sends.Place, microbatch: int) -> None:
        rank = self.ranks[place[1]]
        at = self.at(rank, place, microbatch)
        assert self.signals[rank][at] == 0, "the last one has not been used yet"
        self.all[rank][at * self.size :][: self.size].copy_(tensor.detach().flatten())
        self.signals[rank][at] = 1
        self.sent += 1
        assert all(self._has(info) for stage in self.stages for info in _received(stage)), "torch has buffers besides"

    def _has(self, info: Any) -> bool:
        return bool(info.buffer.untyped_storage().data_ptr() == self.own.untyped_storage().data_ptr())

    def wait(self, place: sends.Place, microbatch: int) -> None:
        at, end = self.at(self.rank, place, microbatch), time.monotonic() + 60
        while self.signals[self.rank][at] == 0:
            assert time.monotonic() < end, f"{place} of micro-batch {microbatch} has not come"
            time.sleep(0)
        self.signals[self.rank][at] = 0


def _received(stage: Any) -> list[Any]:
    """What torch knows of the tensors that a stage gets from other ranks."""
    tables = {"forward": stage.args_recv_info, "backward": stage.grad_recv_info}
    places = stage.mailbox.places[stage.mailbox.rank]
    return [info for name, t in tables.items() if (name, stage.stage_index) in places for infos in t.values() for info in infos]


def steps(options: dict[str, Any], folder: Path | None) -> tuple[list[Tensor], int]:
    """Losses and gradients of two steps, each after an evaluation; the sends of this rank."""
    plan = plans.plan(plans.llama(8), **options)
    opened: list[Shared] = []

    def with_files(layout: Layout, microbatches: int, like: Tensor, group: Any, device: torch.device) -> Shared | None:
        if folder is not None:
            opened.append(Shared(layout, microbatches, like, dist.get_rank(group), folder))
            dist.barrier()
        return opened[0] if opened else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "open_mailbox", with_files)
        trainer = Trainer(plan, torch.device("cpu"), Options(lr=1e-2))
    if opened:
        opened[0].stages = plans.stages(trainer.schedule)
    found = []
    for step in range(2):
        tokens, targets = trainer.batches.get(7)
        with torch.no_grad():
            found.append(trainer.mean_loss(trainer.through(trainer.schedule.eval, tokens, targets)))
        found.append(torch.tensor(trainer.forward_backward(step)))
        found += list(trainer.named_gradients().values())
        trainer.optimizer_step(step)
    return found, opened[0].sent if opened else 0


def compare(options: dict[str, Any], folder: Path) -> list[int]:
    """Values that differ with a mailbox, on any rank, and the sends of all."""
    plain, _ = steps(options, None)
    mailed, sent = steps(options, folder)
    differ = sum(not torch.equal(a, b) for a, b in zip(plain, mailed, strict=True))
    counts = torch.tensor([differ, sent])
    dist.all_reduce(counts)
    return [int(n) for n in counts]


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("schedule", "v", "pp"),
    [
        ("1f1b", 1, 2), ("gpipe", 1, 2), ("interleaved", 4, 2), ("interleaved-zb", 2, 2), ("zbv", 2, 2), ("dualpipev", 2, 2),
        ("interleaved", 2, 4),
    ],
)  # fmt: skip
def test_a_mailbox_changes_nothing(schedule: str, v: int, pp: int, tmp_path: Path) -> None:
    options = {"pp": pp, "schedule": schedule, "virtual_stages": v, "micro_batch": 1}
    differ, sent = worlds.run(pp, compare, options, tmp_path)
    places = stage_places(schedule, pp, v)
    crossings = sum(a != b for (a, _), (b, _) in itertools.pairwise(places))
    assert differ == 0
    assert sent == 2 * 3 * 8 * crossings  # steps; an evaluation, and both directions of a step; micro-batches


@pytest.mark.parametrize("pp", [2, 3, 4])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", *CHUNKED, *V_SHAPED])
def test_each_crossing_has_one_place(schedule: str, pp: int) -> None:
    for v in (1,) if schedule in ("1f1b", "gpipe") else (2,) if schedule in V_SHAPED else (2, 3):
        layout = plans.plan(plans.llama(pp * v), pp=pp, schedule=schedule, virtual_stages=v).layout
        ranks = [rank for rank, _ in stage_places(schedule, pp, v)]
        for rank in range(pp):
            wanted = {("forward", s) for s in range(1, pp * v) if ranks[s] == rank != ranks[s - 1]}
            wanted |= {("backward", s) for s in range(pp * v - 1) if ranks[s] == rank != ranks[s + 1]}
            assert len(sends.places(layout, rank)) == len(wanted)
            assert set(sends.places(layout, rank)) == wanted


def test_ranks_of_one_node_and_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    layout = plans.plan(pp=2, dp=2).layout
    monkeypatch.delenv(symmetric.SWITCH, raising=False)
    assert sends.suits(layout)
    assert not sends.suits(plans.plan(dp=2).layout)
    monkeypatch.setenv(symmetric.SWITCH, symmetric.OFF)
    assert not sends.suits(layout)
    monkeypatch.delenv(symmetric.SWITCH)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not sends.suits(layout)
    assert sends.open_mailbox(layout, 1, torch.ones(1), None, torch.device("cpu")) is None  # type: ignore[arg-type]


class Deaf(Shared):
    """A mailbox whose copies arrive too late, or never."""

    def send(self, tensor: Tensor, place: sends.Place, microbatch: int) -> None:
        super().send(torch.zeros_like(tensor), place, microbatch)


def trial(folder: Path) -> list[bool]:
    """What a trial finds of a mailbox that works, and of one that does not."""
    layout = plans.plan(plans.llama(8), pp=2, schedule="zbv", virtual_stages=2).layout
    found = []
    for kind in (Shared, Deaf):
        own = folder / kind.__name__
        own.mkdir(exist_ok=True)
        mailbox = kind(layout, 2, torch.empty(1, 4, 8, dtype=torch.bfloat16), dist.get_rank(), own)
        dist.barrier()
        found.append(sends.exchange(mailbox, 1))
    return found


@pytest.mark.timeout(100)
def test_a_trial_tells_whether_it_works(tmp_path: Path) -> None:
    assert worlds.run(2, trial, tmp_path) == [True, False]
