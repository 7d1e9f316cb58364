"""Peak allocated bytes of a run without a GPU: follow every storage from the operation that makes it to its end.

Sizes are rounded up to 512 bytes, as CUDA's caching allocator does.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

ROUND = 512


def rounded(n_bytes: int) -> int:
    """What the caching allocator hands out for a request."""
    return -(-n_bytes // ROUND) * ROUND


def storages(value: Any) -> Iterator[torch.UntypedStorage]:
    """The real storages behind a tensor or a wrapper of tensors."""
    if not isinstance(value, torch.Tensor):
        return
    if is_traceable_wrapper_subclass(value):
        for name in value.__tensor_flatten__()[0]:
            yield from storages(getattr(value, name))
    elif value.device.type != "meta" and value.layout is torch.strided:
        with torch._C._DisableTorchDispatch():
            yield value.untyped_storage()


class Meter(TorchDispatchMode):
    """Context that counts live bytes. `current` and `peak` are bytes; storages alive at entry count.

    On real tensors fake ones are DTensor's, which work out shapes, and do not count.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._refs: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def counts(self, value: torch.Tensor) -> bool:
        """Whether this tensor's memory is the job's."""
        return type(value).__name__ != "FakeTensor"

    def _set(self, key: int, n_bytes: int) -> None:
        self.current += n_bytes - self._sizes.get(key, 0)
        self._sizes[key] = n_bytes
        self.peak = max(self.peak, self.current)

    def _drop(self, key: int) -> None:
        self.current -= self._sizes.pop(key, 0)
        self._refs.pop(key, None)

    def track(self, storage: torch.UntypedStorage) -> None:
        """Count a storage from now until it is freed. Tracking it again updates its size."""
        key = id(storage)
        ref = self._refs.get(key)
        if ref is None or ref() is not storage:
            self._drop(key)
            self._refs[key] = weakref.ref(storage, lambda _, key=key: self._drop(key))  # type: ignore[misc]
        self._set(key, rounded(storage.nbytes()))

    def _track_living(self) -> None:
        """Count all that exists already: weights, optimizer states, buffers that FSDP2 and the pipeline hold."""
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for thing in gc.get_objects():
                try:
                    is_tensor = isinstance(thing, torch.Tensor)
                except ReferenceError:  # a proxy of something gone
                    continue
                if is_tensor and self.counts(thing):
                    for storage in storages(thing):
                        self.track(storage)

    def __enter__(self) -> Meter:
        self._resize = torch.UntypedStorage.resize_
        resize, meter = self._resize, self

        def counted(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)  # FSDP2 frees and allocates gathered parameters this way
            if id(storage) in meter._refs:
                meter.track(storage)
            return result

        self._track_living()
        torch.UntypedStorage.resize_ = counted  # type: ignore[method-assign, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # let it become operations on local tensors, which come back here
        out = func(*args, **(kwargs or {}))
        # A view makes no memory. Views of storages never seen are gloo's: its reduce-scatter clones its input, where
        # NCCL's does not.
        fresh = not getattr(func, "is_view", False)
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor) and self.counts(value):
                for storage in storages(value):
                    if fresh or id(storage) in self._refs:
                        self.track(storage)
        return out
