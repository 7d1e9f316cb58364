"""Peak allocated bytes of real runs by the storage meter, beside what the planner predicts.

`python metering.py N FILE` runs every case of N processes in one job and writes {name: [bytes of each rank]}.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import moe_metering
import plans
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from planner.planfile import Plan
from planner.runtime.mesh import start_processes
from planner.runtime.meter import Meter
from planner.runtime.train import Options, Trainer
from planner.specs.layout import SPLIT_BACKWARD

LLAMA = plans.llama(4, 128, 1024, width=352)
GPT = plans.gpt(4, 128, 1024, max_positions=128)
GEMMA = plans.gemma(128, 1024, 32, 352, tied=False)
SIZES: dict[str, Any] = {"seq_len": 128, "global_batch": 8}


def _cases() -> dict[int, dict[str, Plan]]:
    found: dict[int, dict[str, Plan]] = {1: {}, 2: {}, 4: {}}

    def add(processes: int, name: str, model: Any = LLAMA, **options: Any) -> None:
        found[processes][name] = plans.plan(model, **SIZES, **options)

    for precision in ("fp32", "bf16"):
        for recompute in ("none", "selective", "full"):
            add(1, f"one-{precision}-{recompute}", precision=precision, recompute=recompute, micro_batch=2)
        for zero in range(4):
            for m in (1, 4):
                mode = "full" if zero in (1, 3) else "none"
                name = f"dp2-zero{zero}-{precision}-m{m}-{mode}"
                add(2, name, precision=precision, recompute=mode, dp=2, zero=zero, micro_batch=4 // m)
        add(2, f"tp2-{precision}", precision=precision, tp=2, recompute="selective", micro_batch=2)
        add(2, f"tp2-gpt-{precision}", GPT, precision=precision, tp=2, micro_batch=2)
        add(2, f"dp2-zero3-local-{precision}", GEMMA, precision=precision, dp=2, zero=3, micro_batch=2)
        for mode in ("none", "selective", "full"):
            add(2, f"cp2-{precision}-{mode}", precision=precision, cp=2, zero=2, recompute=mode, micro_batch=2)
        for schedule in ("1f1b", "gpipe"):
            add(2, f"pp2-{schedule}-{precision}", precision=precision, pp=2, schedule=schedule)
        interleaved: dict[str, Any] = {"schedule": "interleaved", "virtual_stages": 2}
        add(2, f"pp2-interleaved-{precision}", precision=precision, pp=2, **interleaved)
        for schedule in SPLIT_BACKWARD:
            split: dict[str, Any] = {"schedule": schedule, "virtual_stages": 2, "precision": precision, "pp": 2}
            add(2, f"pp2-{schedule}-{precision}", micro_batch=1, **split)
            for zero in (0, 2):
                add(4, f"pp2-dp2-{schedule}-zero{zero}-{precision}", dp=2, zero=zero, **split)
        for zero in range(4):
            add(4, f"pp2-dp2-zero{zero}-{precision}", precision=precision, pp=2, dp=2, zero=zero, recompute="full")
        add(4, f"tp2-dp2-zero3-{precision}", precision=precision, tp=2, dp=2, zero=3, micro_batch=2)
        for zero in (1, 3):
            add(4, f"dp4-shard2-zero{zero}-{precision}", precision=precision, dp=4, shard=2, zero=zero, micro_batch=1)
        add(4, f"cp2-dp2-zero3-{precision}", precision=precision, cp=2, dp=2, zero=3, micro_batch=2)
        add(4, f"tp2-pp2-{precision}", precision=precision, tp=2, pp=2, recompute="selective")
        add(4, f"pp4-{precision}", precision=precision, pp=4)
    return found


CASES = {n: {**own, **moe_metering.CASES[n]} for n, own in _cases().items()}


def peak(plan: Plan) -> int:
    """Peak bytes of the third step: all lasting state exists by then."""
    trainer = Trainer(plan, start_processes(plan), Options())
    for step in range(2):
        trainer.train_step(step)
    with Meter() as meter:
        trainer.train_step(2)
    return meter.peak


def process(rank: int, processes: int, path: Path) -> None:
    """One process of the job."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    found = {}
    for name, plan in CASES[processes].items():
        everyone: list[Any] = [None] * processes
        dist.is_initialized() or start_processes(plan)
        dist.all_gather_object(everyone, peak(plan))
        found[name] = everyone
        gc.collect()
        if rank == 0:
            path.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(process, args=(int(sys.argv[1]), Path(sys.argv[2])), nprocs=int(sys.argv[1]))
