"""Gathers and reductions of ZeRO by copy engines. That engines do them is a test on two GPUs (`test_cuda`); here the memory
that ranks share is files, and everything else is what runs there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plans
import pytest
import torch
import torch.distributed as dist
import worlds
from machines import task
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from planner.cost import memory
from planner.cost.task import LayoutArray
from planner.runtime import copies, dryrun, gather, scatter, symmetric


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dp": 2, "zero": 1}, True),
        ({"dp": 2, "zero": 3}, True),
        ({"cp": 2, "zero": 2}, True),
        ({"dp": 2, "zero": 0}, False),
        ({"dp": 2, "zero": 2, "offload": "optimizer"}, False),
        ({"tp": 2, "dp": 2, "zero": 3}, False),
        ({"pp": 2, "dp": 2, "zero": 2}, False),
        ({"dp": 4, "zero": 2, "shard": 2}, False),
        ({}, False),
    ],
    ids=str,
)
def test_all_ranks_must_share_one_copy(options: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    plan = plans.plan(**options)
    assert copies.suits(plan.layout) is expected
    assert dryrun.by_engines(plan) is expected
    machine = task(plan.model, plan.cluster.gpus, plan.job.seq_len, plan.job.global_batch, "bundled", plan.hardware)
    assert bool(memory.by_engines(machine, LayoutArray.of([plan.layout], plan.job))[0]) is expected, "as it is priced"


def test_all_ranks_must_be_of_one_node_and_nobody_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = plans.plan(dp=4, zero=3).layout
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not copies.suits(layout)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert copies.suits(layout)
    monkeypatch.setenv(symmetric.SWITCH, symmetric.OFF)
    assert not copies.suits(layout)


def test_gradients_come_as_backward_makes_them_unless_they_add_up_first() -> None:
    for options, expected in (
        ({"zero": 1}, torch.bfloat16), ({"zero": 1, "global_batch": 8}, torch.float32),
        ({"zero": 3, "global_batch": 8}, torch.bfloat16), ({"zero": 2, "precision": "fp32"}, torch.float32),
    ):  # fmt: skip
        plan = plans.plan(**{"dp": 2, "precision": "bf16", "micro_batch": 1, "global_batch": 2, **options})
        assert copies.gradient_type(plan.layout, plan.job) == expected


class Files:
    """Memory that processes share: each tensor is a file of every rank, in the order in which ranks make them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.places: dict[int, int] = {}
        self.kept: list[Tensor] = []

    def empty(self, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        number, count = len(self.places), torch.Size(size).numel()
        made = [self._file(number, rank, count, dtype) for rank in range(dist.get_world_size())][dist.get_rank()]
        self.places[made.data_ptr()] = number
        self.kept.append(made)
        return made.view(*size)

    def _file(self, number: int, rank: int, count: int, dtype: torch.dtype) -> Tensor:
        return torch.from_file(str(self.folder / f"{number}-{rank}"), shared=True, size=count, dtype=dtype)

    def meet(self, tensor: Tensor, group: dist.ProcessGroup) -> Handle:
        return Handle(self, self.places[tensor.data_ptr()], tensor.numel(), group)


class Handle:
    """What torch's handles do, over files."""

    def __init__(self, files: Files, number: int, count: int, group: dist.ProcessGroup):
        self.files, self.number, self.count, self.group = files, number, count, group
        self.barriers = 0

    def barrier(self, channel: int) -> None:
        self.barriers += 1
        dist.barrier(self.group)

    def get_buffer(self, rank: int, size: Sequence[int], dtype: torch.dtype, offset: int) -> Tensor:
        n = torch.Size(size).numel()
        assert rank != dist.get_rank(self.group), "of others"
        assert offset + n <= self.count, "inside"
        return self.files._file(self.number, rank, self.count, dtype)[offset:][:n].view(*size)


class Net(nn.Module):
    """Matrices whose rows two ranks, or three, do not always divide."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 5)) for _ in range(3))
        self.head = nn.Linear(5, 301)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.head(x)
        return out


def _gradients(device_mesh: Any, dtype: torch.dtype, by_engines: Files | None) -> tuple[list[Tensor], int]:
    """Gradients of two micro-batches of this rank's own data, and how often ranks met."""
    torch.manual_seed(7)
    net, policy = Net(), MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*net.blocks, net.head, net):
        fully_shard(module, mesh=device_mesh, mp_policy=policy)
    group, reduction = device_mesh.get_group(), None
    if by_engines is not None:
        gather.use(net.blocks, gather.EngineGather())
        room = scatter.largest_part(net.blocks, group.size())
        reduction = scatter.EngineReduction(dtype, room, group, torch.device("cpu"))
        reduction.meet(group)
        assert reduction.piece < 301 * 6 // group.size(), "the head goes in pieces"
        scatter.use(net, reduction)
    for i in range(2):
        torch.manual_seed(100 * i + dist.get_rank())
        net(torch.randn(4, 5).to(dtype)).float().square().mean().backward()
    met = 0 if reduction is None else reduction.memory.barriers
    return [param.grad.full_tensor() for param in net.parameters()], met  # type: ignore[union-attr]


def reduced(folder: Path) -> list[float]:
    """The largest relative difference of a gradient to what torch's own collectives make of it, by type."""
    files, mesh = Files(folder), init_device_mesh("cpu", (dist.get_world_size(),))
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(symmetric, "empty", files.empty)
        patch.setattr(symmetric, "meet", files.meet)
        for dtype in (torch.float32, torch.bfloat16):
            wanted, _ = _gradients(mesh, dtype, None)
            got, met = _gradients(mesh, dtype, files)
            assert met >= 2 * 2 * (3 + 2), "twice a piece, of three blocks and a head of two pieces or more, and twice all"
            found.append(max(float((a - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True)))
    return found


@pytest.mark.timeout(120)
@pytest.mark.parametrize("ranks", [2, 3])
def test_gradients_are_those_of_ordinary_collectives(ranks: int, tmp_path: Path) -> None:
    assert max(worlds.run(ranks, reduced, tmp_path)) < 1e-6  # in fp32, of what 16-bit types hold, too


def trials(folder: Path) -> list[bool]:
    """What trials find where memory works, where nothing arrives, and where it cannot be had on one rank."""
    files, group, device = Files(folder), dist.group.WORLD, torch.device("cpu")
    assert group is not None
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(symmetric, "meet", files.meet)
        patch.setattr(symmetric, "empty", files.empty)

        def all_work() -> None:
            reduction = scatter.EngineReduction(torch.bfloat16, 50, group, device)
            found.append(symmetric.works(gather.trial(gather.EngineGather(), group, device), device, group))
            steps = [lambda: reduction.meet(group), lambda: scatter.trial(reduction, group, device)]
            found.append(symmetric.works(steps, device, group))

        all_work()
        patch.setattr(Handle, "get_buffer", lambda self, rank, size, dtype, offset: torch.empty(*size, dtype=dtype))
        all_work()

        def alone(*args: Any) -> Tensor:
            if dist.get_rank() == 1:
                raise RuntimeError("no peer access")
            return files.empty(*args)

        patch.setattr(symmetric, "empty", alone)
        found.append(symmetric.works(gather.trial(gather.EngineGather(), group, device), device, group))
    return found


@pytest.mark.timeout(120)
def test_trials_tell_whether_it_works(tmp_path: Path) -> None:
    assert worlds.run(2, trials, tmp_path) == [True, True, False, False, False]


def test_other_reductions_are_refused() -> None:
    reduction = object.__new__(scatter.EngineReduction)
    with pytest.raises(ValueError, match="averaged or added up"):
        reduction(torch.ones(2), torch.ones(4), _Group(), dist.ReduceOp.MAX)  # type: ignore[arg-type]


class _Group:
    @staticmethod
    def rank() -> int:
        return 0

    @staticmethod
    def size() -> int:
        return 2
