"""Run many plans in one job of several processes and compare each with a run of one process.

`python worker.py reference DIR` writes each model's loss and gradients; `python worker.py N DIR [NAME ...]` compares
the plans of N processes and writes DIR/results-N.json.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import cases
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from planner.runtime import parallelize
from planner.runtime.mesh import start_processes
from planner.runtime.train import Options, Trainer

parallelize.COMPILER = "aot_eager"  # the traps are in tracing and autograd; generating C++ takes a minute a plan
OPTIONS = Options(lr=1e-3, steps=10)


def two_steps(trainer: Trainer) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Loss of two steps, gradient norm of the first, and its gradients."""
    first = trainer.forward_backward(0)
    gradients = trainer.named_gradients()
    norm, _ = trainer.optimizer_step(0)
    return {"first": first, "norm": norm, "second": trainer.forward_backward(1)}, gradients


def write_references(directory: Path) -> None:
    """One process, one file a model."""
    for model in cases.MODELS:
        plan = cases.reference(model)
        torch.save(two_steps(Trainer(plan, start_processes(plan), OPTIONS)), directory / f"{model}.pt")


def compare(processes: int, name: str, directory: Path) -> dict[str, Any]:
    """Largest differences of this rank, relative to the loss and to each gradient's norm."""
    start = time.perf_counter()
    plan = cases.build(processes, name)
    expected, wanted = torch.load(directory / f"{cases.case(processes, name)[0]}.pt")
    trainer = Trainer(plan, start_processes(plan), OPTIONS)
    scalars, gradients = two_steps(trainer)
    # Some gradients are zero but for rounding (key biases): they count against a share of the whole norm.
    floor = 1e-3 * expected["norm"]
    errors = {n: float((g - wanted[n]).norm() / wanted[n].norm().clamp_min(floor)) for n, g in gradients.items()}
    worst = max(errors, key=lambda n: errors[n])
    return {
        "names": sorted(gradients),
        "worst": worst,
        "gradient": errors[worst],
        "seconds": time.perf_counter() - start,
        **{key: abs(scalars[key] - expected[key]) / abs(expected[key]) for key in expected},
    }


def faults(processes: int, name: str, directory: Path) -> dict[str, Any]:
    """For plans that compute wrong gradients: parameters without one on any rank, and the error of the gradients' norm.

    No collective is about one parameter: ranks that lack different ones would wait for each other.
    """
    plan = cases.build(processes, name)
    expected, _ = torch.load(directory / f"{cases.case(processes, name)[0]}.pt")
    trainer = Trainer(plan, start_processes(plan), OPTIONS)
    trainer.forward_backward(0)
    found = torch.zeros(2, dtype=torch.float64)
    for param in trainer.parameters():
        if param.grad is None:
            found[0] += 1
        else:
            found[1] += param.grad.to_local().double().pow(2).sum()  # type: ignore[operator]
    dist.all_reduce(found)
    return {"missing": int(found[0]), "norm": abs(float(found[1].sqrt()) / expected["norm"] - 1.0)}


def process(rank: int, processes: int, directory: Path, names: list[str]) -> None:
    """One process of the job."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name in names:
        try:
            examine = faults if name in cases.REFUSED.get(processes, {}) else compare
            mine: Any = examine(processes, name, directory)
        except Exception:
            mine = {"error": traceback.format_exc()}
        everyone: list[Any] = [None] * processes
        dist.all_gather_object(everyone, mine)
        results[name] = everyone
        if rank == 0:
            (directory / f"results-{processes}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def main() -> None:
    """See the module."""
    what, directory, names = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    if what == "reference":
        write_references(directory)
    else:
        mp.spawn(process, args=(int(what), directory, names or list(cases.CASES[int(what)])), nprocs=int(what))


if __name__ == "__main__":
    main()
