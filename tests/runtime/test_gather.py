"""When gathers go through copy engines. That they are right is a test on two GPUs (`test_cuda`): nothing else can run them."""

from __future__ import annotations

import os
from typing import Any

import plans
import pytest
import torch
import worlds
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from planner.runtime import gather


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
    layout = plans.plan(**options).layout
    assert gather.suits(layout) is expected


def test_all_ranks_must_be_of_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = plans.plan(dp=4, zero=3).layout
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not gather.suits(layout)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert gather.suits(layout)


@pytest.mark.parametrize(("version", "set_by_user", "expected"), [
    ((2, 28, 9), None, "2"), ((2, 27, 5), None, None), ((2, 28, 9), "0", "0"),
])  # fmt: skip
def test_the_policy_is_asked_for_once_and_never_overridden(
    version: tuple[int, ...], set_by_user: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv(gather.POLICY, raising=False)
    if set_by_user is not None:
        monkeypatch.setenv(gather.POLICY, set_by_user)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: version)
    gather.prepare(plans.plan(dp=2, zero=3).layout)
    assert os.environ.get(gather.POLICY) == expected


class _Plain(gather.EngineGather):
    """The same gather with a buffer of ordinary memory."""

    used = 0

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Any, input_tensor: Any, group: Any, async_op: bool = False) -> Any:
        type(self).used += 1
        return torch.distributed.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)


def through_the_interface() -> int:
    """FSDP2's calls of the interface in a forward and a backward."""
    module = nn.Linear(8, 8)
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    module.set_custom_all_gather(_Plain())  # type: ignore[operator]
    module(torch.ones(2, 8)).sum().backward()
    return _Plain.used


@pytest.mark.timeout(120)
def test_fsdp2_gathers_through_the_interface() -> None:
    assert worlds.run(2, through_the_interface) == 1
