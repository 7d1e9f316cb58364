"""What every launcher shares: emitted files, the environment a plan needs, the runtime's command."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from planner.errors import InputError, Location, Problem, input_error
from planner.planfile import ClusterType, Plan
from planner.specs.layout import TYPE_ORDERS
from planner.specs.training import Options, words

PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class Emitted:
    """One file to write."""

    name: str
    text: str
    executable: bool = False


class RunSettings(Options):
    """What launch files add to a plan: the runtime's options, and torchrun's."""

    max_restarts: int = Field(default=0, ge=0, description="How often torchrun restarts a job that failed.")


def environment(plan: Plan) -> dict[str, str]:
    """Environment variables that belong to the plan."""
    if plan.cluster.device_kind == "cpu":
        return {"OMP_NUM_THREADS": "1"}
    if plan.cluster.device_kind == "rocm":
        return {"OMP_NUM_THREADS": "8", "PYTORCH_HIP_ALLOC_CONF": "expandable_segments:True"}
    # With expandable segments reserved memory stays within a percent of allocated; without, up to 30 % above.
    return {"OMP_NUM_THREADS": "8", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def runtime_arguments(settings: Options, plan_path: str = PLAN_FILE) -> list[str]:
    """The bundled runtime's module and its arguments."""
    return ["-m", "planner.runtime.train", plan_path, *words(settings)]


def quoted(parts: list[str]) -> str:
    """Words as shell text."""
    return " ".join(shlex.quote(w) for w in parts)


def processes_a_node(plan: Plan) -> int:
    """Processes that each node starts. Raises InputError when the devices do not spread evenly."""
    cluster = plan.cluster
    if cluster.gpus % cluster.nodes:
        what = f"{cluster.gpus} devices do not spread evenly over {cluster.nodes} nodes"
        raise input_error("PLN503", what, "every node starts as many processes", "plan for whole nodes")
    return cluster.gpus // cluster.nodes


@dataclass(frozen=True)
class NodeRange:
    """Nodes of one device type, by their ranks."""

    type: ClusterType
    first: int
    """Node rank of the first of them."""
    second_named: bool
    """Whether it is the type that was named second."""

    @property
    def last(self) -> int:
        """Node rank of the last of them."""
        return self.first + self.type.nodes - 1

    @property
    def text(self) -> str:
        """Which node ranks they have."""
        ranks = f"node ranks {self.first} to {self.last}" if self.last > self.first else f"node rank {self.first}"
        return f"{ranks}: {self.type.hardware} ({self.type.device})"


def node_ranges(plan: Plan) -> tuple[NodeRange, ...]:
    """Which node ranks each of two device types has: those of the first pipeline stages come first. Empty for one type."""
    if not plan.cluster.types:
        return ()
    first, second = (1, 0) if plan.layout.type_order == TYPE_ORDERS[1] else (0, 1)
    a, b = plan.cluster.types[first], plan.cluster.types[second]
    return NodeRange(a, 0, first == 1), NodeRange(b, a.nodes, second == 1)


def type_check(plan: Plan, script: str, node_rank: str) -> str:
    """Shell lines that warn where a node has other devices than its rank wants; empty for one type, and without nvidia-smi."""
    ranges = node_ranges(plan)
    if not ranges or plan.cluster.device_kind != "cuda":
        return ""
    first, second = ranges
    return f"""
wanted="{first.type.device}"
[ "{node_rank}" -lt {second.first} ] || wanted="{second.type.device}"
found=$(nvidia-smi --query-gpu=name --format=csv,noheader -i 0 2>/dev/null) || found=""
[ -z "$found" ] || [ "$found" = "$wanted" ] ||
  echo "{script}: node rank {node_rank} holds the stages for $wanted, this node has $found" >&2
"""


def write(files: list[Emitted], folder: Path, force: bool) -> list[Path]:
    """Write the files; refuses to overwrite other content unless `force`. Raises InputError."""
    changed = []
    for f in files:
        target = folder / f.name
        if target.exists() and (not target.is_file() or target.read_bytes() != f.text.encode()):
            changed.append(target)
    if changed and not force:
        problems = [Problem("PLN504", f"{t} exists with other content", "", "use --force, or another folder") for t in changed]
        raise InputError(problems)
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for f in files:
            target = folder / f.name
            target.write_text(f.text, encoding="utf-8")
            if f.executable:
                target.chmod(0o755)
            written.append(target)
    except OSError as error:
        raise input_error(
            "PLN113", f"cannot write to {folder}", error.strerror or str(error), "", Location(str(folder))
        ) from None
    return written
