"""What every fully sharded engine moves and gathers for a micro-batch, whatever it keeps: parameters gathered for forward and
for backward, gradients reduced, two units' parameters and one unit's gradients whole at a time, all in the compute type."""

from __future__ import annotations

from planner.cost.accounting import COMPUTE, Held, Traffic

GATHER_AND_REDUCE = (
    Traffic("all_gather", COMPUTE, "microbatch", "forward"),
    Traffic("all_gather", COMPUTE, "microbatch", "backward"),
    Traffic("reduce_scatter", COMPUTE, "microbatch", "backward"),
)
_PARAMS, _GRADS = Held("params", COMPUTE, shard=False), Held("grads", COMPUTE, shard=False)
UNIT = (_PARAMS, _PARAMS, _GRADS)
"""The layer whose backward runs, and the parameters of the one gathered ahead."""
HEAD = (_PARAMS, _GRADS)
