"""Collectives by kind, size and group: NCCL between GPUs, gloo between CPU processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from planner.measure.bench import Bench
from planner.measure.overheads import held

if TYPE_CHECKING:
    import torch

OPERATIONS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send")
_SIZES = {"cuda": range(12, 31, 2), "cpu": range(12, 25, 2)}
"""Powers of two: bytes of the full tensor."""
_COUNTS = {"cuda": (20, 6), "cpu": (6, 2)}
"""Calls in a row, of small tensors and of large ones."""
_LARGE = {"cuda": 1 << 26, "cpu": 1 << 20}


def group_sizes(world: int) -> list[int]:
    """Ranks of the groups that are measured: powers of two that divide the world, and the world, which comes first."""
    return [world] + [n for n in (1 << i for i in range(world.bit_length() - 1, 0, -1)) if n < world and world % n == 0]


def measure(b: Bench) -> None:
    """Memory of communicators, then seconds of each operation by size, in groups that fill the machine side by side."""
    import torch
    import torch.distributed as dist

    flag = torch.zeros(1, device=b.device)

    def agree(mine: bool) -> bool:
        flag.fill_(float(mine))
        dist.all_reduce(flag)
        return bool(flag.item())

    b.agree = agree
    _communicators(b)
    cases = [(n, 1 << power) for n in group_sizes(b.world) for power in _SIZES[b.kind]]
    groups = {n: _own_group(b, n) for n in group_sizes(b.world)}
    refused: set[str] = set()
    for n, size in b.cases(cases, least=len(_SIZES[b.kind]), together=True):
        for name, call in _calls(b, groups[n], n, size).items():
            if name not in refused:
                seconds = _seconds(b, call, size)
                if seconds is None:
                    refused.add(name)
                else:
                    b.record(name, seconds, ranks=n, bytes=size)


def _own_group(b: Bench, n: int) -> Any:
    """The group of `n` neighbours that this rank is in; every rank makes all of them."""
    import torch.distributed as dist

    made = [dist.new_group(list(range(start, start + n))) for start in range(0, b.world, n)]
    return made[b.rank // n]


def _communicators(b: Bench) -> None:
    """Bytes that the first communicator takes, with what the library itself loads, and that one more takes."""
    import torch.distributed as dist

    for name in ("first communicator", "communicator"):
        before = held(b.kind)
        group = dist.group.WORLD if name.startswith("first") else dist.new_group()
        calls = _calls(b, group, b.world, _LARGE[b.kind])
        for operation in OPERATIONS[:3]:
            _seconds(b, calls[operation], _LARGE[b.kind])
        del calls
        b.record(name, max(held(b.kind) - before, 0))


def _calls(b: Bench, group: Any, n: int, size: int) -> dict[str, Callable[[], Any]]:
    """Every operation on a tensor of `size` bytes (the gathered one); sends are from even ranks to odd ones."""
    import torch
    import torch.distributed as dist

    def tensor(n_bytes: int) -> torch.Tensor:
        return torch.zeros(n_bytes // 4, device=b.device)

    size = size // (4 * n) * 4 * n
    whole, part, other = tensor(size), tensor(size // n), tensor(size)
    here = b.rank // n * n
    place = b.rank - here
    found: dict[str, Callable[[], Any]] = {
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole, group=group),
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group),
    }
    if n == 2:
        there = here + 1 - place
        found["send"] = (lambda: dist.send(whole, there, group)) if place == 0 else (lambda: dist.recv(whole, there, group))
    return found


def _seconds(b: Bench, call: Callable[[], Any], size: int) -> float | None:
    """Seconds of an operation; None where the library does not have it, on all ranks alike."""
    import torch.distributed as dist

    try:
        call()
        call()
    except (RuntimeError, ValueError, NotImplementedError):
        return None
    b.clock.synchronize()
    dist.barrier()
    count = _COUNTS[b.kind][0 if size <= _LARGE[b.kind] // 4 else 1]
    return sorted(b.clock.together(call, count) for _ in range(3))[1]
