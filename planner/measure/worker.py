"""One measuring process: `python -m planner.measure.worker KIND BUDGET FOLDER`, started for each device by `run`.

Environment: RANK, WORLD_SIZE. Writes FOLDER/rankN; the first rank prints progress as lines of JSON.
"""

from __future__ import annotations

import datetime
import os
import platform
import sys
from pathlib import Path
from typing import Any

from planner.measure import attention, collectives, gemm, memory, overheads, overlap, records, sustained
from planner.measure.bench import Bench
from planner.measure.timing import Clock

_ALONE = {
    "overheads": overheads.measure, "gemm": gemm.measure, "attention": attention.measure, "memory": memory.measure,
    "sustained": sustained.measure,
}  # fmt: skip
_TOGETHER = {"collectives": collectives.measure, "overlap": overlap.measure}


def main() -> None:
    """Run all sections and write the rows."""
    import torch
    import torch.distributed as dist

    kind, budget, folder = sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.manual_seed(rank)
    if kind == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    b = Bench(kind, rank, world, budget, Clock(kind))
    store = dist.FileStore(str(folder / "store"), world)  # type: ignore[attr-defined]
    result = records.Measurements(environment(kind, world), b.rows)
    for name, section in (_ALONE | (_TOGETHER if world > 1 else {})).items():
        _meet(store, name, world)
        if name == "collectives":
            _join(store, kind, rank, world)
        b.start(name)
        section(b)
        if kind == "cuda":
            torch.cuda.empty_cache()
        records.write(result, folder / f"rank{rank}")  # what is done is kept, whatever comes
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def _meet(store: Any, name: str, world: int) -> None:
    """Begin a section together, so that shared parts of the machine are shared as in training."""
    store.add(f"begin {name}", 1)
    if int(store.add(f"begin {name}", 0)) == world:
        store.set(f"go {name}", "1")
    store.wait([f"go {name}"], datetime.timedelta(seconds=300))


def _join(store: Any, kind: str, rank: int, world: int) -> None:
    import torch.distributed as dist

    backend = "nccl" if kind == "cuda" else "gloo"
    limit = datetime.timedelta(seconds=180)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)


def environment(kind: str, world: int) -> dict[str, Any]:
    """What was measured, when, and with which software."""
    import torch

    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    found: dict[str, Any] = {
        "date": today, "kind": kind, "devices": world, "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name, "compute_units": properties.multi_processor_count,
            "local_devices": torch.cuda.device_count(), "cuda": torch.version.cuda or torch.version.hip or "",
            "nccl": ".".join(str(v) for v in torch.cuda.nccl.version()),  # type: ignore[no-untyped-call]
        }  # fmt: skip
        software = f"PyTorch {torch.__version__}, CUDA {found['cuda']}, NCCL {found['nccl']}"
        found["stamp"] = f"{world} x {properties.name}, {software}, {today}"
    else:
        cores = os.cpu_count() or 1
        found |= {"device": "CPU process", "compute_units": 1, "local_devices": cores, "processor": _processor()}
        found["stamp"] = (
            f"{world} processes of one thread on {cores} cores ({found['processor']}), "
            f"PyTorch {torch.__version__}, gloo, {today}"
        )
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
