"""Run many plans in one job of several processes (see `worlds`) and compare each with a run of one process."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cases
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from planner.runtime import parallelize
from planner.runtime.train import Options, Trainer
from planner.specs import pieces

parallelize.COMPILER = "aot_eager"  # the traps are in tracing and autograd; generating C++ takes a minute a plan
OPTIONS = Options(lr=1e-3, steps=10)
CPU = torch.device("cpu")


def two_steps(trainer: Trainer) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Loss of two steps, gradient norm of the first, and its gradients."""
    first = trainer.forward_backward(0)
    gradients = trainer.named_gradients()
    norm, _ = trainer.optimizer_step(0)
    return {"first": first, "norm": norm, "second": trainer.forward_backward(1)}, gradients


def write_references(directory: Path, models: list[str]) -> None:
    """For a job of one process: one file a model, of loss and gradients."""
    for model in models:
        torch.save(two_steps(Trainer(cases.reference(model), CPU, OPTIONS)), directory / f"{model}.pt")


def compare(processes: int, name: str, directory: Path) -> dict[str, Any]:
    """Largest differences of this rank, relative to the loss and to each gradient's norm."""
    start = time.perf_counter()
    plan = cases.build(processes, name)
    expected, wanted = torch.load(directory / f"{cases.case(processes, name)[0]}.pt")
    with patch.object(pieces, "PIECE_BYTES", 2.0**14):  # the losses of compiled plans are cut into a few
        scalars, gradients = two_steps(Trainer(plan, CPU, OPTIONS))
    # Some gradients are zero but for rounding (key biases): they count against a share of the whole norm.
    floor = 1e-3 * expected["norm"]
    errors = {n: float((g.cpu() - wanted[n]).norm() / wanted[n].norm().clamp_min(floor)) for n, g in gradients.items()}
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
    trainer = Trainer(plan, CPU, OPTIONS)
    trainer.forward_backward(0)
    found = torch.zeros(2, dtype=torch.float64)
    for param in trainer.parameters():
        if param.grad is None:
            found[0] += 1
        else:
            local = param.grad.to_local() if isinstance(param.grad, DTensor) else param.grad
            found[1] += local.double().pow(2).sum().cpu()
    dist.all_reduce(found)
    return {"missing": int(found[0]), "norm": abs(float(found[1].sqrt()) / expected["norm"] - 1.0)}


def compare_all(processes: int, names: Iterable[str], directory: Path) -> dict[str, list[dict[str, Any]]]:
    """For a job of several processes: what each rank found, by case. An error in one does not end the others."""
    results: dict[str, Any] = {}
    for name in names:
        try:
            examine = faults if name in cases.REFUSED.get(processes, {}) else compare
            mine: Any = examine(processes, name, directory)
        except Exception:
            mine = {"error": traceback.format_exc()}
        results[name] = [None] * processes
        dist.all_gather_object(results[name], mine)
    return results
