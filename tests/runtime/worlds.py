"""Run a function in several processes that form a gloo process group; what rank 0 returns comes back.

The processes are forked from a server that has imported torch and the runtime once: a fresh interpreter takes seconds of
processor time for that, each time. They meet at a file, not at a port.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

multiprocessing.set_forkserver_preload(["planner.runtime.command"])


def run(processes: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 700.0, cuda: bool = False) -> Any:
    """`function(*arguments)` in each process; the result of rank 0, as JSON keeps it. With `cuda` each has a GPU, and NCCL.

    Fails with the first error, or with every process's stacks when they take longer than `timeout_s`.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        context: Any = mp.start_processes(
            _process,
            (folder, processes, function, arguments, timeout_s, cuda),
            processes,
            join=False,
            start_method="forkserver",
        )
        end = time.monotonic() + timeout_s + 20
        while not context.join(timeout=1):
            if time.monotonic() > end:
                for process in context.processes:
                    process.kill()
                stacks = "\n".join(p.read_text() for p in sorted(folder.glob("stacks-*")))
                raise AssertionError(f"{function.__name__} took more than {timeout_s} s\n{stacks}")
        return json.loads((folder / "result.json").read_text())


def _process(
    rank: int, folder: Path, size: int, function: Callable[..., Any], arguments: Any, timeout_s: float, cuda: bool
) -> None:
    with (folder / f"stacks-{rank}.txt").open("w") as stacks:
        faulthandler.dump_traceback_later(timeout_s, file=stacks)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
        torch.set_num_threads(1)
        store = dist.FileStore(str(folder / "store"), size)
        device = torch.device("cuda", rank) if cuda else None
        if device is not None:
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, device_id=device)
        result = function(*arguments)
        if rank == 0:
            (folder / "result.json").write_text(json.dumps(result))
        dist.barrier()
        dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()
