"""What is trained: sequence length, global batch, precision, optimizer, adapter."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from planner.specs.adapter import Adapter
from planner.specs.base import Spec

Precision = Literal["bf16", "fp16", "fp32"]
Linears = Literal["same", "fp8", "fp4"]
COMPUTE_BYTES: dict[str, int] = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of one activation element at each precision."""


class Job(Spec):
    """One training job. Master weights, optimizer states and gradient reduction are fp32 at every precision."""

    seq_len: int = Field(gt=0, lt=2**31)
    """Tokens of one sequence."""
    global_batch: int = Field(gt=0, lt=2**31)
    """Sequences of one optimizer step, over the whole cluster."""
    precision: Precision = "bf16"
    """Type of matrix products and activations."""
    linears: Linears = "same"
    """Type of the layers' matrix products where it is narrower than `precision`; attention, head and states are not."""
    optimizer: Literal["adamw"] = "adamw"
    adapter: Adapter | None = None
    """Low-rank adapters beside a frozen base (LoRA, QLoRA); everything is trained when left out."""

    @property
    def compute_bytes(self) -> int:
        """Bytes of one activation element."""
        return COMPUTE_BYTES[self.precision]

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.seq_len * self.global_batch
