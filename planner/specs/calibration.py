"""The few named constants that measured runs may move, and what a profile records of a fit."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field, model_validator

from planner.specs.base import Spec
from planner.specs.figures import Number, Ratio


def without_recipe(engine: str) -> str:
    """The engine of a name such as `megatron+2021`: what constants are fitted for."""
    return engine.partition("+")[0]


@dataclass(frozen=True)
class Constant:
    """A constant that calibration may move: its prior, its bounds, and how far from the prior it usually lies."""

    name: str
    prior: float
    low: float
    high: float
    spread: float
    """Standard deviation of the prior: of the logarithm for factors, of the number for `scale`."""
    meaning: str


CONSTANTS: dict[str, Constant] = {
    c.name: c
    for c in (
        Constant("compute", 1.0, 0.6, 2.0, 0.15, "time of matrix products and attention"),
        Constant("elementwise", 1.0, 0.5, 5.0, 0.40, "time of norms, activations and other memory-bound kernels"),
        Constant("host", 1.0, 0.2, 8.0, 0.60, "host time of a layer: the floor under small layers"),
        Constant("tp", 1.0, 0.3, 5.0, 0.35, "time of tensor-parallel collectives"),
        Constant("dp", 1.0, 0.2, 10.0, 0.60, "time of data-parallel and ZeRO collectives"),
        Constant("pp", 1.0, 0.1, 30.0, 0.80, "time of a pipeline's sends and receives"),
        Constant("ep", 1.0, 0.3, 8.0, 0.50, "time of expert-parallel exchanges"),
        Constant("scale", 0.01, -0.01, 0.04, 0.008, "growth of the step with every doubling of devices beyond one node"),
        Constant("narrow", 1.0, 0.7, 1.5, 0.10, "rate of fp8 and fp4 products over what the device's gain says"),
        Constant("outside", 1.0, 0.5, 12.0, 0.80, "memory outside the allocator: context, communicators"),
        Constant("reserved", 1.0, 0.95, 1.15, 0.03, "reserved over allocated memory"),
    )
}
"""What may be fitted, and nothing else: factors on the model's own terms (`scale` is a plain number)."""


class Calibration(Spec):
    """Constants of one engine on this machine, fitted to measured runs; those left out have their prior."""

    constants: dict[str, Number] = Field(default_factory=dict)
    """By name, see `CONSTANTS`."""
    time_error: Ratio | None = None
    """Relative error of the step time that 80 % of the runs behind the constants stay within."""
    memory_error: Ratio | None = None
    """The same of peak memory."""
    runs: str = ""
    """The measured runs behind the constants: how many, from which sources."""
    memory_labels: int = Field(default=0, ge=0)
    """Runs that fitted or ran out of memory, which the engine's buffers were checked against."""

    @model_validator(mode="after")
    def _known_and_within_bounds(self) -> Calibration:
        for name, figure in self.constants.items():
            if name not in CONSTANTS:
                raise ValueError(f"no constant called {name}; there are {', '.join(CONSTANTS)}")
            low, high = CONSTANTS[name].low, CONSTANTS[name].high
            if not low <= figure.base <= high:
                raise ValueError(f"{name} {figure.value} is outside {low} to {high}")
        return self

    def value(self, name: str) -> float:
        """The constant called `name`: fitted, or its prior."""
        return self.constants[name].base if name in self.constants else CONSTANTS[name].prior
