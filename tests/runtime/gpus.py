"""Plans on two GPUs with NCCL against one GPU; `python tests/runtime/gpus.py [NAME ...]` prints each one's errors."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import plans
import torch
import worlds

from planner.runtime import copies, gather, scatter, sends
from planner.runtime.train import Options, Trainer
from planner.specs.model import Model

TOKENS = 96
"""Of which a rank holds two pieces of 24: fewer than the rows of 32 that the memory-efficient kernel writes."""
NARROW = {"first": 2e-2, "norm": 2e-2, "second": 2e-2, "gradient": 4e-2}
EXACT = dict.fromkeys(NARROW, 1e-4)
CASES: dict[str, tuple[int, dict[str, Any], dict[str, float]]] = {
    "ring-fp32": (2, {"cp": 2, "context": "ring"}, EXACT),
    "ring-fp32-zero3-selective": (2, {"cp": 2, "context": "ring", "zero": 3, "recompute": "selective"}, EXACT),
    "ring-bf16": (2, {"cp": 2, "context": "ring", "precision": "bf16"}, NARROW),
    "ring-bf16-zero3-selective": (
        2, {"cp": 2, "context": "ring", "precision": "bf16", "zero": 3, "recompute": "selective"}, NARROW,
    ),
    "ring-bf16-zero2-full": (2, {"cp": 2, "context": "ring", "precision": "bf16", "zero": 2, "recompute": "full"}, NARROW),
    "ulysses-fp32": (2, {"cp": 2}, EXACT),
    "ulysses-bf16-zero2": (2, {"cp": 2, "precision": "bf16", "zero": 2}, NARROW),
    "offload-zero1": (2, {"dp": 2, "zero": 1, "offload": "optimizer"}, EXACT),
    "offload-zero3-bf16": (2, {"dp": 2, "zero": 3, "offload": "optimizer", "precision": "bf16"}, NARROW),
    "zero1-bf16": (2, {"dp": 2, "zero": 1, "precision": "bf16"}, NARROW),
    "zero2-fp32": (2, {"dp": 2, "zero": 2}, EXACT),
    "zero3-fp32": (2, {"dp": 2, "zero": 3, "micro_batch": 2}, EXACT),
    "zero3-bf16-full": (2, {"dp": 2, "zero": 3, "precision": "bf16", "recompute": "full"}, NARROW),
    "pp2-bf16": (2, {"pp": 2, "precision": "bf16"}, NARROW),
    "pp2-fp32": (2, {"pp": 2}, EXACT),
    "pp2-gpipe-selective": (2, {"pp": 2, "schedule": "gpipe", "recompute": "selective"}, EXACT),
    "pp2-interleaved": (2, {"pp": 2, "schedule": "interleaved", "virtual_stages": 2}, EXACT),
    "pp2-interleaved-zb": (2, {"pp": 2, "schedule": "interleaved-zb", "virtual_stages": 2}, EXACT),
    "pp2-zbv": (2, {"pp": 2, "schedule": "zbv", "virtual_stages": 2}, EXACT),
    "pp2-dualpipev": (2, {"pp": 2, "schedule": "dualpipev", "virtual_stages": 2}, EXACT),
}  # fmt: skip


def model() -> Model:
    """Two query heads of 64 to each key/value head."""
    return plans.llama(hidden=256, width=384)


def steps(name: str | None, directory: Path) -> dict[str, float]:
    """Two steps of a case, compared with the reference; the reference itself without a name."""
    options: dict[str, Any] = {"micro_batch": 8} if name is None else CASES[name][1]
    plan = plans.plan(model(), seq_len=TOKENS, **options)
    trainer = Trainer(plan, torch.device("cuda", torch.cuda.current_device()), Options(lr=1e-3, steps=10))
    if copies.suits(plan.layout):
        assert all(map(_by_engines, trainer.parts[0].blocks()))
    if sends.suits(plan.layout):
        assert all(stage.mailbox is not None for stage in plans.stages(trainer.schedule))
    found = {"first": trainer.forward_backward(0)}
    gradients = {n: g.cpu() for n, g in trainer.named_gradients().items()}
    found["norm"], _ = trainer.optimizer_step(0)
    found["second"] = trainer.forward_backward(1)
    if name is None:
        torch.save((found, gradients), directory / "reference.pt")
        return found
    expected, wanted = torch.load(directory / "reference.pt")
    floor = 1e-3 * expected["norm"]
    worst = max(float((g - wanted[n]).norm() / wanted[n].norm().clamp_min(floor)) for n, g in gradients.items())
    return {"gradient": worst, **{k: abs(found[k] / expected[k] - 1.0) for k in expected}}


def _by_engines(block: Any) -> bool:
    """Whether FSDP2 gathers and reduces a block through copy engines."""
    group = block._get_fsdp_state()._fsdp_param_group
    kinds = {group._all_gather_comm: gather.EngineGather, group._reduce_scatter_comm: scatter.EngineReduction}
    return all(isinstance(comm, kind) for comm, kind in kinds.items())


def fp8() -> list[float]:
    """Losses of 20 steps with fp8 products."""
    plan = plans.plan(model(), seq_len=TOKENS, precision="bf16")
    plan = plan.model_copy(update={"job": plan.job.model_copy(update={"linears": "fp8"})})
    trainer = Trainer(plan, torch.device("cuda", 0), Options(lr=3e-3, steps=20))
    return [trainer.train_step(step)[0] for step in range(20)]


def run(name: str | None, folder: Path) -> dict[str, float]:
    """The errors of a case; the reference without a name."""
    found: dict[str, float] = worlds.run(CASES[name][0] if name else 1, steps, name, folder, timeout_s=200, cuda=True)
    return found


def wrong(name: str, errors: dict[str, float]) -> dict[str, float]:
    """Errors of a case beyond what its types allow."""
    return {k: v for k, v in errors.items() if not v < CASES[name][2][k]}


def main(names: list[str]) -> int:
    """Run the reference and the cases, print their errors; 1 if any is too large."""
    with tempfile.TemporaryDirectory() as folder:
        run(None, Path(folder))
        return int(sum(_shown(name, run(name, Path(folder))) for name in names or CASES) > 0)


def _shown(name: str, errors: dict[str, float]) -> bool:
    """Print a case; whether it is wrong."""
    figures, bad = "  ".join(f"{k} {v:.1e}" for k, v in errors.items()), bool(wrong(name, errors))
    print(f"{name:28} {'WRONG' if bad else 'ok':6} {figures}", flush=True)
    return bad


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
