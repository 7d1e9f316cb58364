"""What a layer's backward computes again under selective recompute, and what it has kept.

After Korthikanti 2022 (arXiv 2205.05198), by operators: torch's selective checkpoint."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, _CachedTorchDispatchMode, create_selective_checkpoint_contexts

from planner.runtime.attention import SAVED_BY_SELECTIVE

KEEP_ATTENTION = functools.partial(create_selective_checkpoint_contexts, list(SAVED_BY_SELECTIVE))
"""A partial, because the compiler takes no other kind of context function."""


_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
_KEPT_PRODUCTS = (0, 1, 2, 4)
"""Of a layer's products in order (queries, keys, values, output, the MLP's): those that are cheap to keep for their work. The
fifth is the MLP's first; its last is needed by nothing."""


def keep_products() -> Any:
    """Contexts of selective recompute that keep some products as well (engine trait `selective-products`)."""
    seen: dict[bool, int] = {False: 0, True: 0}

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in SAVED_BY_SELECTIVE:
            return CheckpointPolicy.MUST_SAVE
        if op not in _PRODUCTS:
            return CheckpointPolicy.PREFER_RECOMPUTE
        at = seen[ctx.is_recompute]
        seen[ctx.is_recompute] += 1
        return CheckpointPolicy.MUST_SAVE if at in _KEPT_PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]


class _Again(_CachedTorchDispatchMode):  # type: ignore[no-untyped-call]
    """Backward's mode, in which what is not kept may run more often than it did in forward.

    FSDP2 gathers the experts of a layer ahead of its forward, and within it when it runs again: to torch 2.13 that is an error.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in SAVED_BY_SELECTIVE:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)  # type: ignore[no-untyped-call]


def keep_attention_beside_experts() -> Any:
    """Contexts of selective recompute for a layer with experts, which may be a unit of FSDP2 of their own."""
    forward, backward = KEEP_ATTENTION()
    backward.__class__ = _Again
    return forward, backward
