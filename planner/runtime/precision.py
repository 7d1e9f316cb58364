"""Compute types: bf16, fp16 with a dynamic loss scale, fp32, and fp8 products of the layers (torchao, on CUDA)."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn

from planner.errors import input_error
from planner.planfile import Plan
from planner.runtime.model import Decoder
from planner.specs.job import Precision

DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class LossScale:
    """A factor on the loss that keeps small fp16 gradients above zero (Micikevicius 2017, arXiv 1710.03740, section 3.2).

    A step whose gradients overflow is skipped and halves the factor; `INTERVAL` good steps in a row double it. Whether they
    overflow is read off the global norm, which is one number for all ranks. In other types the factor stays 1.
    """

    START, INTERVAL = 2.0**16, 2000

    def __init__(self, precision: Precision):
        self.active = precision == "fp16"
        self.value = self.START if self.active else 1.0
        self.good_steps = 0
        self.skipped = 0
        """Steps that were skipped so far."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it, by name; nothing in other types than fp16."""
        values = [self.value, float(self.good_steps), float(self.skipped)]
        return {"loss_scale": torch.tensor(values, dtype=torch.float64)} if self.active else {}

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Continue from `state()`; nothing where the checkpoint has none."""
        if self.active and "loss_scale" in saved:
            value, good, skipped = saved["loss_scale"].tolist()
            self.value, self.good_steps, self.skipped = value, int(good), int(skipped)

    def unscale(self, params: list[nn.Parameter]) -> None:
        """Divide the gradients by the factor."""
        grads = [p.grad for p in params if p.grad is not None]
        if self.active and grads:
            torch._foreach_mul_(grads, 1.0 / self.value)

    def accepts(self, norm: Tensor | float) -> bool:
        """Whether gradients of this global norm make a step; adapts the factor."""
        if not self.active:
            return True
        if bool(torch.isfinite(torch.as_tensor(norm))):
            self.good_steps += 1
            if self.good_steps == self.INTERVAL:
                self.value, self.good_steps = self.value * 2.0, 0
            return True
        self.value, self.good_steps = max(self.value / 2.0, 1.0), 0
        self.skipped += 1
        return False


def check_fp8(plan: Plan, device: torch.device) -> None:
    """Raise InputError when the plan's fp8 products cannot run here."""
    if plan.job.linears != "fp8":
        return
    why = ""
    if device.type != "cuda":
        why = "fp8 products need a CUDA device"
    elif torch.cuda.get_device_capability(device) < (8, 9):
        why = f"{torch.cuda.get_device_name(device)} has no fp8 units (they came with compute capability 8.9)"
    elif importlib.util.find_spec("torchao") is None:
        why = "torchao is not installed"
    if why:
        raise input_error("PLN519", "linears fp8 cannot run here", why, "pip install 'planner[fp8]', or set linears: same")


def apply_fp8(part: Decoder) -> None:
    """Make the layers' matrices multiply in fp8, scaled tensor by tensor; sizes not divisible by 16 stay as they are."""
    from torchao.float8 import convert_to_float8_training  # type: ignore[import-not-found, unused-ignore]

    def fits(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and not (module.in_features % 16 or module.out_features % 16)

    for block in part.blocks():
        convert_to_float8_training(block, module_filter_fn=fits)
