"""Low-rank adapters beside a frozen base: LoRA (arXiv 2106.09685), and QLoRA's quantised base (arXiv 2305.14314)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from planner.specs.base import Spec

Target = Literal["attention", "mlp", "experts"]
Base = Literal["same", "fp8", "int8", "nf4"]

NF4_BLOCK = 64
"""Weights that share one 8-bit constant (QLoRA, section 3)."""
NF4_CONSTANTS = 256
"""Constants that share one fp32 constant of the second quantisation (QLoRA, section 3: 8/64 + 32/(64 * 256) = 0.127 bits)."""


class Adapter(Spec):
    """Every adapted matrix W of (out, in) stays frozen and gets B A beside it: A of (rank, in), B of (out, rank).

    Frozen are all other weights too: norms, biases, router, and matrices that `targets` leaves out. Norms, biases, router,
    embedding and head are kept in the compute type, matrices of the layers in `base`.
    """

    rank: int = Field(gt=0, le=65536)
    """Width between A and B."""
    targets: list[Target] = Field(default=["attention", "mlp"], min_length=1)
    """What is adapted: the projections around attention, the dense MLP (or the shared experts), the routed experts."""
    base: Base = "same"
    """Type in which the layers' frozen matrices are stored: the compute type, one byte a weight (fp8 with one scale a matrix;
    int8 with one fp32 scale an output), or 4 bits with double quantisation (nf4)."""
    train_embeddings: bool = False
    """Embedding, head and final norm are trained as in full training, not frozen."""

    @field_validator("targets")
    @classmethod
    def _targets_once(cls, value: list[Target]) -> list[Target]:
        if len(set(value)) < len(value):
            raise ValueError("names a target twice")
        return value

    def weight_bytes(self, compute_bytes: int) -> float:
        """Bytes of one weight of a frozen matrix: of nf4 4 bits and 0.127 bits of constants."""
        if self.base == "nf4":
            return (4.0 + 8.0 / NF4_BLOCK + 32.0 / (NF4_BLOCK * NF4_CONSTANTS)) / 8.0
        return float(compute_bytes) if self.base == "same" else 1.0

    @property
    def output_bytes(self) -> float:
        """Bytes besides for every output of a frozen matrix: int8 has an fp32 scale for each (arXiv 2208.07339, section 2)."""
        return 4.0 if self.base == "int8" else 0.0

    @property
    def text(self) -> str:
        """In a few words: `LoRA rank 16`, `QLoRA rank 16, nf4 base`."""
        return f"LoRA rank {self.rank}" if self.base == "same" else f"QLoRA rank {self.rank}, {self.base} base"
