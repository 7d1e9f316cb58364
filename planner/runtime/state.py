"""A trainer's state as named tensors, the same names in every layout, written and read by torch.distributed.checkpoint.

    model.<parameter>              fp32 master weight
    optim.<parameter>.<state>      AdamW's `step`, `exp_avg`, `exp_avg_sq`
    rng.<rank>.<generator>         bytes of a process's generators
    loss_scale                     factor, good steps, skipped steps (fp16)

Names of parameters do not depend on the plan and DTensors know what part of the whole they hold, so that a checkpoint
saved under one plan loads under another.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as read
from torch.distributed.fsdp import FSDPModule

from planner.errors import input_error
from planner.runtime import masters

if TYPE_CHECKING:
    from planner.runtime.train import Trainer


def tensors(trainer: Trainer) -> dict[str, Tensor]:
    """This rank's weights and optimizer states by name: the living tensors, not copies.

    Builds the optimizer's states when there are none yet, with a step that changes nothing.
    """
    for part in trainer.parts.values():
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # an evaluation may have left it gathered
    if not all(p in trainer.optimizer.state for p in trainer.parameters()):
        _build_states(trainer)
    found: dict[str, Tensor] = {}
    for name, param in trainer.named_parameters():
        found[f"model.{name}"] = masters.values(param).detach()
        for key, value in trainer.optimizer.state[param].items():
            found[f"optim.{name}.{key}"] = value.detach()
    return found


def _build_states(trainer: Trainer) -> None:
    """A step on zero gradients at rate zero: weights stay, moments are zero."""
    optimizer = trainer.optimizer
    rates = [group["lr"] for group in optimizer.param_groups]
    for param in trainer.parameters():
        param.grad = torch.zeros_like(param, dtype=param.grad_dtype)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for values in optimizer.state.values():
        if isinstance(values.get("step"), Tensor):
            values["step"].zero_()


def generators(rank: int, device: torch.device) -> dict[str, Tensor]:
    """The states of this process's random generators, as bytes."""
    numpy = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    found = {"torch": torch.get_rng_state(), "python": _bytes(random.getstate()), "numpy": _bytes(numpy)}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return {f"rng.{rank}.{name}": value for name, value in found.items()}


def restore_generators(values: dict[str, Tensor], device: torch.device) -> None:
    """Set this process's generators."""
    for name, value in values.items():
        kind = name.rsplit(".", 1)[1]
        if kind == "torch":
            torch.set_rng_state(value)
        elif kind == "cuda" and device.type == "cuda":
            torch.cuda.set_rng_state(value, device)
        elif kind == "python":
            version, internal, gauss = json.loads(value.numpy().tobytes())
            random.setstate((version, tuple(internal), gauss))
        elif kind == "numpy":
            state = json.loads(value.numpy().tobytes())
            state["state"]["key"] = np.array(state["state"]["key"], dtype=np.uint32)
            np.random.set_state(state)


def _bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def to_host(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory, which training does not change."""
    return {name: value.to("cpu", copy=True) for name, value in state.items()}


def load(trainer: Trainer, path: Path, group: Any) -> None:
    """Read a state into the trainer, whatever layout saved it. Collective. Raises InputError for another model's."""
    world = trainer.world
    reader = FileSystemReader(path)
    saved: Metadata = reader.read_metadata()
    state = tensors(trainer)
    _same_model(state, saved, path)
    # More processes than saved it have no generators there: theirs stay as they are.
    shapes = {name: _shape(saved, name) for name in generators(world.rank, world.device)}
    own = {name: torch.empty(shape, dtype=torch.uint8) for name, shape in shapes.items() if shape is not None}
    scale = {name: value for name, value in trainer.scale.state().items() if _shape(saved, name) is not None}
    read({**state, **own, **scale}, storage_reader=reader, process_group=group)
    masters.refresh(trainer.parameters())
    trainer.scale.restore(scale)
    restore_generators(own, world.device)


def _shape(saved: Metadata, name: str) -> tuple[int, ...] | None:
    entry = saved.state_dict_metadata.get(name)
    return tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None


def _same_model(state: dict[str, Tensor], saved: Metadata, path: Path) -> None:
    """Raises InputError with the first tensor that the checkpoint lacks or holds in another shape."""
    for name, value in state.items():
        shape = _shape(saved, name)
        if shape == tuple(value.shape):
            continue
        why = f"{name} is {list(value.shape)} here and {'absent' if shape is None else list(shape)} there"
        fix = "resume with the model that was saved, or give another --checkpoint-dir"
        raise input_error("PLN612", f"{path.parent} is a checkpoint of another model", why, fix)
