"""An sbatch script that starts the plan on a Slurm cluster: one task a node, torchrun inside."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping

from planner.errors import input_error
from planner.launchers.common import PLAN_FILE, Emitted, RunSettings, environment, processes_a_node, quoted, runtime_arguments
from planner.planfile import Plan

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


def emit(plan: Plan, settings: RunSettings, options: Mapping[str, str]) -> list[Emitted]:
    """`plan.json` and `job.sbatch`. Raises InputError for an unknown option."""
    broken = [k for k, v in options.items() if not re.fullmatch(r"[ -~]*", v)]
    if broken:
        raise input_error("PLN505", f"--set slurm.{broken[0]}: not one line of text", "", "give a plain value")
    unknown = [k for k in options if k not in OPTIONS]
    if unknown:
        raise input_error("PLN505", f"--set slurm.{unknown[0]}: no such option", f"options are {', '.join(OPTIONS)}", "")
    return [Emitted(PLAN_FILE, plan.to_json()), Emitted("job.sbatch", _script(plan, settings, {**OPTIONS, **options}), True)]


def _script(plan: Plan, settings: RunSettings, options: Mapping[str, str]) -> str:
    per_node = processes_a_node(plan)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", plan.model.name)
    directives = {
        "job-name": name,
        "nodes": plan.cluster.nodes,
        "ntasks-per-node": 1,
        **({"gpus-per-node": per_node} if plan.cluster.device_kind != "cpu" else {}),
        **{k: v for k, v in options.items() if v},
        "output": "%x-%j.log",
        "open-mode": "append",
        "signal": "B:USR1@120",
    }
    header = "\n".join(f"#SBATCH --{k}={v}" for k, v in directives.items())
    exports = "\n".join(f'export {k}="${{{k}:-{v}}}"' for k, v in environment(plan).items())
    return f"""#!/usr/bin/env bash
{header}
#SBATCH --exclusive
#SBATCH --requeue
# {plan.model.name}: plan {plan.digest}, made by planner {plan.planner}.
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
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR="${{nodes[0]}}"
: "${{MASTER_ADDR:?no node in SLURM_JOB_NODELIST}}"
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# Static rendezvous: SLURM_NODEID is the node's rank, so that the plan's groups stay inside their nodes.
# shellcheck disable=SC2016  # the task's own shell expands the variables
srun --kill-on-bad-exit=1 bash -c 'exec "${{PYTHON:-python3}}" -m torch.distributed.run \\
  --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" \\
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
