"""The real program with one fault built in: `torchrun ... faulty.py FAULT RANK STEP PLAN [flags]`.

The fault happens on RANK at the beginning of STEP, in the first attempt only.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from planner.runtime import checkpoint, command, storage
from planner.runtime.train import Trainer

FAULT, RANK, STEP = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])


def strike(trainer: Trainer) -> None:
    """What goes wrong."""
    if FAULT == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif FAULT == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    elif FAULT == "stop":
        (Path(trainer.options.out) / "stop").touch()
    elif FAULT == "hang":
        time.sleep(1000)
    elif FAULT == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif FAULT == "nan":
        with torch.no_grad():
            param = dict(trainer.named_parameters())["layers.2.mlp.w2.weight"]
            (param.to_local() if hasattr(param, "to_local") else param)[0, 0] = float("nan")


def installed() -> None:
    """Put the fault where it belongs."""
    forward = Trainer.gradients

    def gradients(self: Trainer, step: int) -> torch.Tensor:
        if step == STEP and self.world.rank == RANK and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            strike(self)
        return forward(self, step)

    Trainer.gradients = gradients  # type: ignore[method-assign]
    if FAULT == "kill-save":  # between writing and publishing
        digest = storage.digest_of

        def digest_of(path: Path) -> Any:
            if path.parent.parent.name == f".{storage.name_of(STEP)}.partial" and os.environ["RANK"] == str(RANK):
                os.kill(os.getpid(), signal.SIGKILL)
            return digest(path)

        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            storage.digest_of = digest_of
    elif FAULT == "full":
        save = checkpoint.save

        class Full(checkpoint.FileSystemWriter):
            def write_data(self, *arguments: Any) -> Any:
                if os.environ["RANK"] == str(RANK):
                    raise OSError(28, "No space left on device")
                return super().write_data(*arguments)

        def failing(state: Any, storage_writer: Any, process_group: Any) -> Any:
            if storage.name_of(STEP) in str(storage_writer.path):
                storage_writer = Full(storage_writer.path)
            return save(state, storage_writer=storage_writer, process_group=process_group)

        checkpoint.save = failing


if __name__ == "__main__":
    del sys.argv[1:4]
    installed()
    command.main()
