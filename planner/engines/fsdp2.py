"""What FSDP2 holds and moves at each ZeRO stage: fp32 masters, a copy in the compute type, reduction in fp32.

Shared by the engines that are built on it. Verified with a storage meter and collective counts on the bundled runtime.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from planner.cost.accounting import BY_ENGINES, COMPUTE, Held, Traffic, ZeroRule

_MASTER = (Held("params", 4, shard=False), Held("optimizer", 8, shard=False))
_SHARDED = (Held("params", 4, shard=True, host=True), Held("optimizer", 8, shard=True))
_HELD_GRADIENT = Held("grads", 4, shard=True, when="accumulating", host=True)
# FSDP2 copies parameters to the compute type even in a group of one, and in fp32; fp32 on one rank is not wrapped.
_COPY = Held("params", COMPUTE, shard=False, when="copied")
_OWN_GRADIENT = Held("grads", COMPUTE, shard=False, when="copied")
_REDUCE_INPUT = Held("grads", 4, shard=False)
_REDUCE_OUTPUT = Held("grads", 4, shard=True)
_GRADIENT = Held("grads", 4, shard=True, host=True)
_EQUALISE = Traffic("all_reduce", 4, "step", "backward", over="replicas")
"""Hybrid sharding: the sum of the last reduction goes to the other copies of the states."""
_STEP_GATHER = Traffic("all_gather", COMPUTE, "step", "forward")
# With one micro-batch stages 0 and 1 reduce in their only backward; with several they add up whole fp32 gradients.
# A reduced shard becomes the gradient, or is added to it and freed.
_ONCE_INPUT = Held("grads", 4, shard=False, when="single")
_ONCE_OUTPUT = Held("grads", 4, shard=True, when="single")
_ONCE_OWN = Held("grads", COMPUTE, shard=False, when="single")
_CARRIED = Held("grads", 4, shard=False, when="accumulating")
_WHOLE_INPUT = Held("grads", 4, shard=False, when="copied")
_WHOLE_OUTPUT = Held("grads", 4, shard=False, when="single")
# A unit frees its copy before it is reduced, but keeps it between micro-batches.
_ONCE_COPY = Held("params", COMPUTE, shard=False, when="single")
_AHEAD = Held("params", COMPUTE, shard=False)

ZERO = {
    0: ZeroRule(
        backward=(*_MASTER, _COPY, Held("grads", 4, shard=False, when="accumulating")),
        update=(*_MASTER, Held("grads", 4, shard=False)),
        traffic=(Traffic("all_reduce", 4, "step", "backward"),),
        unit_reduction=(Held("grads", 4, shard=False, when="single"),),
        head_reduction=(_WHOLE_INPUT, _WHOLE_OUTPUT),
        last_unit=(_WHOLE_INPUT,),
        own=(_OWN_GRADIENT,),
        finish=(_WHOLE_INPUT, _WHOLE_OUTPUT),
        released=(_COPY,),
    ),
    1: ZeroRule(
        backward=(*_SHARDED, _COPY, Held("grads", 4, shard=False, when="accumulating")),
        update=(*_SHARDED, _GRADIENT),
        traffic=(_STEP_GATHER, Traffic("reduce_scatter", 4, "step", "backward"), _EQUALISE),
        unit_reduction=(_ONCE_INPUT, _ONCE_OUTPUT),
        head_reduction=(_ONCE_INPUT, _ONCE_OUTPUT),
        last_unit=(_OWN_GRADIENT, _REDUCE_INPUT),
        own=(_OWN_GRADIENT,),
        finish=(_ONCE_OWN, _REDUCE_INPUT, _REDUCE_OUTPUT),
        released=(_COPY,),
    ),
    2: ZeroRule(
        backward=(*_SHARDED, _COPY, _HELD_GRADIENT),
        update=(*_SHARDED, _GRADIENT),
        traffic=(_STEP_GATHER, Traffic("reduce_scatter", 4, "microbatch", "backward"), _EQUALISE),
        unit_reduction=(_REDUCE_INPUT, _ONCE_OUTPUT),
        head_reduction=(_REDUCE_INPUT, _ONCE_OUTPUT),
        carried=(_CARRIED,),
        last_unit=(_OWN_GRADIENT, _REDUCE_INPUT),
        own=(_OWN_GRADIENT,),
        finish=(_OWN_GRADIENT, _REDUCE_INPUT, _REDUCE_OUTPUT),
        reduced=(_REDUCE_OUTPUT,),
        released=(_ONCE_COPY,),
    ),
    3: ZeroRule(
        backward=(*_SHARDED, _HELD_GRADIENT),
        update=(*_SHARDED, _GRADIENT),
        traffic=(
            Traffic("all_gather", COMPUTE, "microbatch", "forward"),
            Traffic("all_gather", COMPUTE, "microbatch", "backward"),
            Traffic("reduce_scatter", 4, "microbatch", "backward"),
            _EQUALISE,
        ),
        unit=(_AHEAD, _AHEAD),
        unit_reduction=(_REDUCE_INPUT, _ONCE_OUTPUT),
        # The head's parameters stay gathered from forward to backward, and its reduction runs beside the last layer.
        head=(Held("params", COMPUTE, shard=False),),
        head_reduction=(_REDUCE_INPUT, _ONCE_OUTPUT),
        carried=(_CARRIED,),
        last_unit=(_OWN_GRADIENT, _REDUCE_INPUT),
        own=(_OWN_GRADIENT,),
        finish=(_OWN_GRADIENT, _REDUCE_INPUT, _REDUCE_OUTPUT),
        reduced=(_REDUCE_OUTPUT,),
        ahead=(_AHEAD,),
        # The gathered buffer, the table copied out of it, and the reduction that the last backward left.
        again=(_AHEAD, _AHEAD, _CARRIED),
    ),
}  # fmt: skip

_POOLED = {k: Held("grads", 4, shard=k > 0, when="sharded" if k < 2 else "single_sharded", host=True) for k in ZERO}
POOLING = {k: replace(rule, pooled=(_POOLED[k],)) for k, rule in ZERO.items()}
"""The same with what the allocator keeps. Reduced gradients are memory of the stream that reduces them: nothing else in a step
can have it. They are no part of a backward's peak, unless several micro-batches add up in them (2 and 3). Measured on two H200
(torch 2.11): reserved beyond allocated memory is this, 1 to 2 GiB for the gathered ends of the model, and some percent."""


def _by_engines(stage: int) -> ZeroRule:
    """A stage's rule where copy engines carry gradients to the rank that adds them up in fp32.

    FSDP2's input of a reduction has the type in which backward made them, and what comes from the other ranks lies in a buffer
    of the size of one layer's. Stage 1 is that of several micro-batches, whose fp32 sums are sent; with one it is stage 2.
    """
    rule, size = POOLING[stage], 4 if stage == 1 else COMPUTE
    inputs = (_REDUCE_INPUT, _ONCE_INPUT, _CARRIED)
    held: dict[str, Any] = {
        f.name: tuple(replace(item, size=size) if item in inputs else item for item in getattr(rule, f.name))
        for f in fields(rule)
    }
    traffic = tuple(replace(t, size=size) if t.op == "reduce_scatter" else t for t in rule.traffic)
    return ZeroRule(**{**held, "traffic": traffic, "received": (Held("grads", size, shard=True),)})


ENGINES = {BY_ENGINES + stage: _by_engines(stage) for stage in (1, 2, 3)}
"""The rules where copy engines gather and reduce."""
