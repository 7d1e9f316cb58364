"""A shell script that starts the plan with torchrun on each node."""

from __future__ import annotations

from planner.launchers.common import (
    PLAN_FILE,
    Emitted,
    RunSettings,
    environment,
    node_ranges,
    processes_a_node,
    quoted,
    runtime_arguments,
    type_check,
)
from planner.planfile import Plan


def emit(plan: Plan, settings: RunSettings) -> list[Emitted]:
    """`plan.json` and `launch.sh`."""
    nodes, per_node = plan.cluster.nodes, processes_a_node(plan)
    exports = "\n".join(f'export {k}="${{{k}:-{v}}}"' for k, v in environment(plan).items())
    every = f"NODE_RANK=<0..{nodes - 1}> MASTER_ADDR=<node 0> ./launch.sh   # on every node"
    usage = "./launch.sh" if nodes == 1 else every
    rendezvous = _SINGLE if nodes == 1 else _STATIC
    types = "".join(f"# {nodes.text}\n" for nodes in node_ranges(plan))
    script = f"""#!/usr/bin/env bash
# {plan.model.name} on {nodes} node(s) x {per_node} {plan.cluster.device}, made by planner {plan.planner}.
# plan {plan.digest}
# usage: {usage}
{types}set -euo pipefail
cd "$(dirname "${{BASH_SOURCE[0]}}")"

{exports}
{rendezvous.format(nodes=nodes)}{type_check(plan, "launch.sh", "$NODE_RANK")}
exec "${{PYTHON:-python3}}" -m torch.distributed.run \\
  "${{rendezvous[@]}}" \\
  --nproc-per-node {per_node} --max-restarts {settings.max_restarts} \\
  {quoted(runtime_arguments(settings))} "$@"
"""
    return [Emitted(PLAN_FILE, plan.to_json()), Emitted("launch.sh", script, executable=True)]


_SINGLE = """
rendezvous=(--standalone --nnodes 1)
"""

_STATIC = """
# Static rendezvous keeps the order of nodes, and with it the groups that the plan put inside a node.
: "${{NODE_RANK:?set NODE_RANK to the number of this node, from 0 up to {nodes} less 1}}"
: "${{MASTER_ADDR:?set MASTER_ADDR to the address of node 0}}"
rendezvous=(--nnodes {nodes} --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${{MASTER_PORT:-29500}}")
"""
