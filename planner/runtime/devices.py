"""What this machine has to run on."""

from __future__ import annotations

import os


def one_node(ranks: int) -> bool:
    """Whether `ranks` processes, all of a job, are of this node, as torchrun says; so they are where nothing says otherwise."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", ranks)) == ranks


def local_devices() -> tuple[str, int]:
    """("cuda", accelerators) or ("cpu", cores) of this machine."""
    import torch

    if torch.cuda.is_available():
        return "cuda", torch.cuda.device_count()
    return "cpu", os.cpu_count() or 1
