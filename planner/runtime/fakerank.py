"""A rank that allocates and sends nothing: the meter of fake tensors, with the log of collectives and of what is alive.

Storages are followed from the operation that makes them; what a storage is for is read from FSDP2 and the optimizer at
the moment of the peak, and from the operation that made it otherwise.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._pytree import tree_leaves

from planner.runtime.meter import Meter, storages

SMALL = 1 << 18
"""Bytes up to which a collective is a scalar's, a norm weight's, or the loss's figures of each token: told apart in the log."""

_OPERATIONS = {
    "all_gather": ("allgather", "all_gather"),
    "reduce_scatter": ("reduce_scatter",),
    "all_reduce": ("allreduce", "all_reduce"),
    "all_to_all": ("alltoall", "all_to_all"),
    "broadcast": ("broadcast",),
    "send": ("send",),
    "receive": ("recv",),
}
"""The planner's words for c10d's operations, by how their names begin."""


@dataclass(frozen=True)
class Origin:
    """Where a storage comes from."""

    phase: str
    """forward, backward, or optimizer."""
    operation: str


@dataclass(frozen=True)
class Collective:
    """One kind of call: `group` as its axis, `n_bytes` of the whole tensor of one call (gathered, or before scattering)."""

    group: str
    op: str
    ranks: int
    n_bytes: int


class FakeMeter(Meter):  # type: ignore[no-untyped-call]
    """Counts fake tensors, logs collectives, and answers `.item()` with 1: nothing may depend on values.

    `axis` names a process group and what runs over it. Each step: call `start`, run it, read `peak`, `peak_tick` and `calls`.
    """

    def __init__(self, axis: Callable[[dist.ProcessGroup, str], str]) -> None:
        super().__init__()
        self.axis = axis
        self.calls: Counter[Collective] = Counter()
        self.origins: dict[int, Origin] = {}
        self.sent: set[int] = set()
        self.optimizing = False
        self.doing = Origin("forward", "")
        """The operation in hand."""
        self.tick = self.peak_tick = 0
        self.stop_at: int | None = None
        self.on_stop: Callable[[], None] = lambda: None
        self._paused = False

    def start(self, stop_at: int | None = None, on_stop: Callable[[], None] | None = None) -> None:
        """Forget the last step's peak and calls; `on_stop` is called when `stop_at` ticks of this step have passed."""
        self.peak, self.tick, self.peak_tick = self.current, 0, 0
        self.calls = Counter()
        self.stop_at, self.on_stop = stop_at, on_stop or (lambda: None)

    def counts(self, value: Tensor) -> bool:
        """Fake tensors are the job's here, but for those with which DTensor works out shapes."""
        return isinstance(value, FakeTensor) and not self._paused

    def living(self) -> Iterator[tuple[int, int, Origin]]:
        """(key, bytes, origin) of each live storage."""
        for key, size in self._sizes.items():
            if size:
                yield key, size, self.origins[key]

    def track(self, storage: torch.UntypedStorage) -> None:
        """As ever, and remember what made it."""
        ref = self._refs.get(id(storage))
        fresh = ref is None or ref() is not storage or not self._sizes.get(id(storage))
        if fresh:
            self._drop(id(storage))
            self.origins[id(storage)] = self.doing
            self._refs[id(storage)] = weakref.ref(storage, lambda _, key=id(storage): self._drop(key))  # type: ignore[misc]
        super().track(storage)

    def _track_living(self) -> None:
        """Nothing: every storage is followed from its birth."""

    def _set(self, key: int, n_bytes: int) -> None:
        before = self.peak
        super()._set(key, n_bytes)
        self.tick += 1
        if self.peak > before:
            self.peak_tick = self.tick
        if self.tick == self.stop_at:
            self.on_stop()

    def _drop(self, key: int) -> None:
        super()._drop(key)
        self.origins.pop(key, None)
        self.sent.discard(key)

    def __enter__(self) -> FakeMeter:
        meter = self

        def silently(name: str) -> Any:
            original = getattr(ShardingPropagator, name)

            def run(*args: Any, **kwargs: Any) -> Any:
                was, meter._paused = meter._paused, True
                try:
                    return original(*args, **kwargs)
                finally:
                    meter._paused = was

            return patch.object(ShardingPropagator, name, run)

        names = [n for n in ("_propagate_tensor_meta", "_propagate_tensor_meta_non_cached") if hasattr(ShardingPropagator, n)]
        self._patches = [silently(name) for name in names]
        for one in self._patches:
            one.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for one in self._patches:
            one.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].dtype.is_floating_point else 1
        namespace = func.namespace
        if namespace == "_c10d_functional" and func._opname.startswith("wait_tensor"):
            return args[0]  # in a fake run there is nothing to wait for, and a copy would count
        self.doing = Origin(self._phase(), func._opname)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if namespace in ("c10d", "_c10d_functional") and not self._paused:
            self._log(func, args, out)
        return out

    def _phase(self) -> str:
        if self.optimizing:
            return "optimizer"
        return (
            "forward" if torch._C._current_graph_task_id() == -1 else "backward"
        )  # callbacks after backward count as backward

    def _log(self, func: Any, args: Any, out: Any) -> None:
        name = func._opname.lstrip("_")
        op = "send" if _to_one(args) else next((w for w, starts in _OPERATIONS.items() if name.startswith(starts)), None)
        group = _group_of(args)
        if op is None or group is None or group.size() == 1:
            return
        tensors = [t for t in tree_leaves((args, out)) if isinstance(t, Tensor)]
        n_bytes = max((t.numel() * t.element_size() for t in tensors), default=0)
        self.calls[Collective(self.axis(group, op), op, group.size(), n_bytes)] += 1
        if func.namespace == "c10d":  # in place: buffers that FSDP2 or the pipeline made for it
            self.sent.update(id(s) for t in tensors for s in storages(t))


def _to_one(args: Any) -> bool:
    """Whether an all-to-all's split sizes give all rows to one other rank: a step of a ring."""
    splits = [value for value in args if isinstance(value, (list, tuple)) and len(value) > 1]
    return len(splits) == 2 and all(sum(rows != 0 for rows in sizes) == 1 for sizes in splits)


def _group_of(args: Any) -> dist.ProcessGroup | None:
    """The process group among an operation's arguments: an object, or a name."""
    for value in args:
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return dist.ProcessGroup.unbox(value)
        if isinstance(value, str) and value not in ("sum", "avg", "max", "min"):
            return torch._C._distributed_c10d._resolve_process_group(value)  # type: ignore[arg-type, unused-ignore]
    return None


class FusedRmsNorm(torch.autograd.Function):
    """What CUDA's fused kernel keeps and allocates (x, weight, one fp32 value a row), and no arithmetic."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight), None


@contextmanager
def fake_group(rank: int, size: int) -> Iterator[None]:
    """A process group of `size` ranks of which only `rank` exists, and whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("a dry run needs a process without a process group")
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def fake_tensors() -> FakeTensorMode:
    """The mode in which tensors have shapes and no memory."""
    return FakeTensorMode(allow_non_fake_inputs=True)
