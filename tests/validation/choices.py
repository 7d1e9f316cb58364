"""Plans for tasks on two H200, the planner's pick and eight other layouts each, to be run with `trials`:

    python tests/validation/choices.py FOLDER [TASK ...]
    python tests/validation/trials.py OUT FOLDER/TASK-*.json

The others are the best layouts of other kinds: ZeRO stages, pipelines by schedule, tensor and context parallelism, recompute,
micro-batches. `TASK-00.json` is the pick.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parents[2]))

from planner import planfile
from planner.errors import PlannerError
from planner.planfile import Plan
from planner.planning.make import make_plan
from planner.planning.request import Request
from planner.specs.job import Job
from tests.validation.test_measured_h200 import MODELS

TASKS = {
    "1b-4k": ("1b", 4096, 16),
    "1b-16k": ("1b", 16384, 4),
    "3b-4k": ("3b", 4096, 8),
    "3b-16k": ("3b", 16384, 2),
    "8b-4k": ("8b", 4096, 4),
    "8b-2k": ("8b", 2048, 16),
}
"""Model, tokens of a sequence, sequences of a step."""
OTHERS = 8
KINDS: tuple[dict[str, list[object]], ...] = (
    {"pp": [1], "zero": [0]}, {"pp": [1], "zero": [1]}, {"pp": [1], "zero": [2]}, {"pp": [1], "zero": [3]},
    {"schedule": ["1f1b"]}, {"schedule": ["interleaved"]}, {"tp": [2]}, {"cp": [2]},
    {"pp": [1], "zero": [2], "micro_batch": [1]}, {"pp": [1], "zero": [3], "micro_batch": [2]},
    {"schedule": ["interleaved"], "virtual_stages": [2]}, {"schedule": ["zbv"]}, {"schedule": ["gpipe"]},
    {"pp": [1], "zero": [3], "recompute": ["selective"]}, {"pp": [1], "zero": [2], "recompute": ["full"]},
)  # fmt: skip


def plans(task: str) -> Iterator[Plan]:
    """The pick, then others, no layout twice."""
    name, seq_len, batch = TASKS[task]
    job = Job(seq_len=seq_len, global_batch=batch)
    seen: list[object] = []
    for pins in ({}, *KINDS):
        try:
            plan = make_plan(Request(MODELS[name], "h200-sxm", job, gpus=2, pins=pins), alternatives=1)
        except PlannerError:
            continue  # no such layout exists, or none fits
        if plan.layout not in seen and len(seen) <= OTHERS:
            seen.append(plan.layout)
            yield plan


def main() -> None:
    """Write the plans of the tasks of the command line, or of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("tasks", nargs="*", default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for task in args.tasks:
        for i, plan in enumerate(plans(task)):
            x = plan.layout
            planfile.write(plan, args.folder / f"{task}-{i:02}.json")
            what = f"tp{x.tp} cp{x.cp} pp{x.pp} dp{x.dp} zero{x.zero} mb{x.micro_batch} {x.schedule} v{x.virtual_stages}"
            recompute = "/".join(sorted({stage.recompute for stage in x.stages}))
            print(f"{task}-{i:02} {what} {recompute} {plan.estimate.step_time_s:.3f} s", flush=True)


if __name__ == "__main__":
    main()
