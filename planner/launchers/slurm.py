"""An sbatch script that starts the plan on a Slurm cluster: one task a node, torchrun inside."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping

from planner.errors import input_error
from planner.launchers.common import (
    PLAN_FILE,
    Emitted,
    RunSettings,
    environment,
    node_ranges,
    processes_a_node,
    quoted,
    runtime_arguments,
)
from planner.planfile import Plan

_ONE = ("$SLURM_NNODES", "$SLURM_NODEID")
"""Number of nodes, and of this node, in a job of one component."""

OPTIONS: dict[str, str] = {
    "partition": "",
    "account": "",
    "qos": "",
    "time": "24:00:00",
    "constraint": "",
    "reservation": "",
    "cpus-per-task": "",
}
"""`#SBATCH` options that a site sets with `--set slurm.NAME=VALUE`, and their defaults (empty: left out)."""
SECOND = ("partition", "account", "qos", "constraint", "reservation")
"""Those of them that may differ on the second of two device types, with `--set slurm.second-NAME=VALUE`."""
SELECTS = ("partition", "constraint", "reservation")
"""Those of them that tell Slurm which nodes have which devices."""


def emit(plan: Plan, settings: RunSettings, options: Mapping[str, str]) -> list[Emitted]:
    """`plan.json` and `job.sbatch`. Raises InputError for an unknown option."""
    broken = [k for k, v in options.items() if not re.fullmatch(r"[ -~]*", v)]
    if broken:
        raise input_error("PLN505", f"--set slurm.{broken[0]}: not one line of text", "", "give a plain value")
    known = [*OPTIONS, *(f"second-{name}" for name in SECOND if plan.cluster.types)]
    unknown = [k for k in options if k not in known]
    if unknown:
        raise input_error("PLN505", f"--set slurm.{unknown[0]}: no such option", f"options are {', '.join(known)}", "")
    script = _script(plan, settings, {**OPTIONS, **options})
    return [Emitted(PLAN_FILE, plan.to_json()), Emitted("job.sbatch", script, True)]


def _components(plan: Plan, options: Mapping[str, str]) -> list[dict[str, str]]:
    """The options of each component of the job, that with the first pipeline stages first: one, or two with two device types.

    Raises InputError where nothing tells Slurm which nodes have which devices.
    """
    own = {k: v for k, v in options.items() if not k.startswith("second-")}
    if not plan.cluster.types:
        return [own]
    other = own | {k.removeprefix("second-"): v for k, v in options.items() if k.startswith("second-")}
    if all(own.get(name) == other.get(name) for name in SELECTS):
        a, b = plan.cluster.types
        what = f"nothing tells Slurm which nodes have {a.device} and which {b.device}"
        fix = "add --set slurm.constraint=A --set slurm.second-constraint=B (or partition), in the order the types were named"
        raise input_error("PLN158", what, "both parts of the job would get any nodes", fix)
    return [other if nodes.second_named else own for nodes in node_ranges(plan)]


def _header(plan: Plan, options: Mapping[str, str]) -> str:
    """The `#SBATCH` lines; two device types are the components of a heterogeneous job, whose tasks are numbered through."""
    shared = {"output": "%x-%j.log", "open-mode": "append", "signal": "B:USR1@120"}
    blocks = []
    for i, own in enumerate(_components(plan, options)):
        nodes = node_ranges(plan)[i].type.nodes if plan.cluster.types else plan.cluster.nodes
        directives = _directives(plan, nodes, own) | (shared if i == 0 else {})
        blocks.append("\n".join(f"#SBATCH --{k}={v}" for k, v in directives.items()) + "\n#SBATCH --exclusive")
    blocks[0] += "\n#SBATCH --requeue"
    return "\n#SBATCH hetjob\n".join(blocks)


def _directives(plan: Plan, nodes: int, options: Mapping[str, str]) -> dict[str, object]:
    return {
        "job-name": re.sub(r"[^A-Za-z0-9._-]+", "-", plan.model.name),
        "nodes": nodes,
        "ntasks-per-node": 1,
        **({"gpus-per-node": processes_a_node(plan)} if plan.cluster.device_kind != "cpu" else {}),
        **{k: v for k, v in options.items() if v},
    }


def _script(plan: Plan, settings: RunSettings, options: Mapping[str, str]) -> str:
    per_node = processes_a_node(plan)
    header, types = _header(plan, options), bool(plan.cluster.types)
    # Slurm numbers the tasks of a heterogeneous step through its components, one task a node here.
    group, count, rank = ("--het-group=0,1 ", plan.cluster.nodes, "$SLURM_PROCID") if types else ("", *_ONE)
    listed = "SLURM_JOB_NODELIST_HET_GROUP_0" if types else "SLURM_JOB_NODELIST"
    placed = "".join(f"# {nodes.text}\n" for nodes in node_ranges(plan))
    exports = "\n".join(f'export {k}="${{{k}:-{v}}}"' for k, v in environment(plan).items())
    return f"""#!/usr/bin/env bash
{header}
{placed}# {plan.model.name}: plan {plan.digest}, made by planner {plan.planner}.
set -euo pipefail
# Slurm runs a copy of this script: PLAN_DIR is where it was submitted from, or where it lies, whichever holds the plan.
PLAN_DIR="${{PLAN_DIR:-${{SLURM_SUBMIT_DIR:-.}}}}"
script=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/^ *Command=//p' | head -n 1) || script=""
[ -f "$PLAN_DIR/{PLAN_FILE}" ] || PLAN_DIR=$(dirname "${{script:-$0}}")
cd "$PLAN_DIR"
grep -q '{plan.digest}' {PLAN_FILE} || {{
  echo "job.sbatch: $PLAN_DIR/{PLAN_FILE} is missing or another plan; submit from its folder or set PLAN_DIR" >&2
  exit 2
}}

{exports}
mapfile -t nodes < <(scontrol show hostnames "${listed}")
MASTER_ADDR="${{nodes[0]}}"
: "${{MASTER_ADDR:?no node in {listed}}}"
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# Static rendezvous: {rank[1:]} is the node's rank, so that the plan's groups stay inside their nodes.
# shellcheck disable=SC2016  # the task's own shell expands the variables
srun {group}--kill-on-bad-exit=1 bash -c 'exec "${{PYTHON:-python3}}" -m torch.distributed.run \\
  --nnodes "{count}" --node-rank "{rank}" \\
  --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" "$@"' bash \\
  --nproc-per-node {per_node} --max-restarts {settings.max_restarts} \\
  {quoted(runtime_arguments(settings))} "$@" &

# Two minutes before the time limit Slurm sends USR1 to this shell: let the run save and end, then queue the job again.
out={shlex.quote(settings.out)}
requeue() {{
  mkdir -p "$out" && touch "$out/stop"
  timeout 100 tail --pid="$!" -f /dev/null || true
  scontrol requeue "$SLURM_JOB_ID"
}}
trap requeue USR1
wait "$!"
"""
