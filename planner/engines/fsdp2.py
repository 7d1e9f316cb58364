"""What FSDP2 holds and moves at each ZeRO stage: fp32 masters, a copy in the compute type, reduction in fp32.

Shared by the engines that are built on it. Verified with a storage meter and collective counts on the bundled runtime.
"""

from __future__ import annotations

from planner.cost.accounting import COMPUTE, Held, Traffic, ZeroRule

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
_ONCE_INPUT = Held("grads", 4, shard=False, when="single")
_ONCE_OUTPUT = Held("grads", 4, shard=True, when="single")
_CARRIED = Held("grads", 4, shard=False, when="accumulating")

ZERO = {
    0: ZeroRule(
        backward=(*_MASTER, _COPY, Held("grads", 4, shard=False, when="accumulating")),
        update=(*_MASTER, Held("grads", 4, shard=False)),
        traffic=(Traffic("all_reduce", 4, "step", "backward"),),
        unit=(_OWN_GRADIENT,),
        unit_reduction=(Held("grads", 4, shard=False, when="single"),),
        head_reduction=(Held("grads", 4, shard=False, when="single"),),
        last_reduction=(Held("grads", 4, shard=False, when="copied"),),
        last_unit=(_OWN_GRADIENT, Held("grads", 4, shard=False, when="copied")),
    ),
    1: ZeroRule(
        backward=(*_SHARDED, _COPY, Held("grads", 4, shard=False, when="accumulating")),
        update=(*_SHARDED, _GRADIENT),
        traffic=(_STEP_GATHER, Traffic("reduce_scatter", 4, "step", "backward"), _EQUALISE),
        unit=(_OWN_GRADIENT,),
        unit_reduction=(_ONCE_INPUT, _ONCE_OUTPUT),
        head_reduction=(_ONCE_INPUT, _ONCE_OUTPUT),
        last_reduction=(_REDUCE_INPUT,),
        last_unit=(_OWN_GRADIENT, _REDUCE_INPUT),
    ),
    2: ZeroRule(
        backward=(*_SHARDED, _COPY, _HELD_GRADIENT),
        update=(*_SHARDED, _GRADIENT),
        traffic=(_STEP_GATHER, Traffic("reduce_scatter", 4, "microbatch", "backward"), _EQUALISE),
        unit=(_OWN_GRADIENT,),
        unit_reduction=(_REDUCE_INPUT, _REDUCE_OUTPUT),
        head_reduction=(_REDUCE_INPUT, _REDUCE_OUTPUT),
        carried=(_CARRIED,),
        last_reduction=(_REDUCE_INPUT,),
        last_unit=(_OWN_GRADIENT, _REDUCE_INPUT),
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
        unit=(Held("params", COMPUTE, shard=False), Held("params", COMPUTE, shard=False), _OWN_GRADIENT),
        unit_reduction=(_REDUCE_INPUT, _REDUCE_OUTPUT),
        # The head's parameters stay gathered from forward to backward, and its reduction runs beside the last layer.
        head=(Held("params", COMPUTE, shard=False),),
        head_reduction=(_REDUCE_INPUT, _REDUCE_OUTPUT),
        carried=(_CARRIED,),
        last_reduction=(_REDUCE_INPUT,),
        last_unit=(_OWN_GRADIENT, _REDUCE_INPUT),
    ),
}  # fmt: skip
