"""The plan: a layout with its estimate, its proof and its inputs; version, canonical form and digests."""

from __future__ import annotations

import hashlib
import json
from typing import Any, ClassVar, Literal

from pydantic import Field

from planner._version import __version__
from planner.planfile.economy import ComputeOptimal, Economy
from planner.planfile.estimates import Estimate
from planner.planfile.proofs import Alternative, Certificate, Choice, CountChoice, Objective
from planner.specs.base import Sparse, Spec
from planner.specs.hardware import HardwareProfile
from planner.specs.job import Job
from planner.specs.layout import Layout
from planner.specs.model import Model
from planner.specs.policy import Policy

FORMAT_VERSION = "2.1"
"""Major: older readers cannot read it. Minor: fields were added, all with defaults, so that files of that major still load."""
TWO_TYPES_VERSION = "2.2"
"""Written where a plan has two device types: readers of 2.1 refuse its fields."""


class ClusterType(Spec):
    """The devices of one type, in a cluster of two."""

    hardware: str
    """Name of the hardware profile."""
    nodes: int = Field(gt=0)
    gpus: int = Field(gt=0)
    device: str
    peak_flops: float = Field(gt=0)
    """Dense peak of one device at the job's precision, FLOP/s."""


class Cluster(Sparse):
    """The machine that a plan is made for, as far as launching needs it."""

    unwritten: ClassVar[tuple[str, ...]] = ("types",)

    hardware: str
    """Name of the hardware profile; of both, joined by " + ", with two device types."""
    nodes: int = Field(gt=0)
    gpus: int = Field(gt=0)
    """Devices in all (processes, on a CPU)."""
    node_size: int = Field(gt=0)
    """Devices of one node."""
    device: str
    device_kind: Literal["cuda", "rocm", "cpu"]
    peak_flops: float = Field(gt=0)
    """Dense peak of one device at the job's precision, FLOP/s; the mean one with two device types."""
    types: list[ClusterType] = Field(default_factory=list)
    """The two device types as they were named; empty with one. Ranks are numbered through the nodes of the type that holds the
    first pipeline stages (`layout.type_order`), then through those of the other."""


class Inputs(Sparse):
    """Where the plan came from, and digests that tell whether an input changed."""

    unwritten: ClassVar[tuple[str, ...]] = ("second_hardware",)

    model: str
    hardware: str
    second_hardware: str | None = None
    """The second of two device types; its digests are called so too."""
    digests: dict[str, str]
    """Of the files that were read; of the canonical form where an object was given, and of the job."""
    contents: dict[str, str] = Field(default_factory=dict)
    """Of the canonical form of the model, hardware and job as the plan holds them: see `content_digests`."""
    pins: dict[str, list[Any]] = Field(default_factory=dict)
    """Allowed values by axis: axes and values in ascending order, however they were given."""
    forbidden: list[str] = Field(default_factory=list)


class Plan(Sparse):
    """A layout with its prediction, its proof, and all that is needed to launch it."""

    unwritten: ClassVar[tuple[str, ...]] = ("second_hardware",)

    format: Literal["planner.plan"] = "planner.plan"
    version: str = FORMAT_VERSION
    planner: str = __version__
    model: Model
    job: Job
    cluster: Cluster
    hardware: HardwareProfile
    """The profile that the estimate was made with, merged: the plan can be judged anywhere. Of two the first one named."""
    second_hardware: HardwareProfile | None = None
    """The profile of the second device type."""
    engine: str
    policy: Policy
    layout: Layout
    estimate: Estimate
    certificate: Certificate | None = None
    """None for a layout that a person named (`planner estimate`)."""
    choice: Choice | None = None
    """None for a layout that a person named."""
    alternatives: list[Alternative] = Field(default_factory=list)
    objective: Objective = "throughput"
    count_choice: CountChoice | None = None
    """None where one device count was asked for."""
    economy: Economy | None = None
    """None without a token budget."""
    compute_optimal: ComputeOptimal | None = None
    """None with a token budget."""
    inputs: Inputs

    def to_data(self) -> dict[str, Any]:
        """Plain JSON data, with the digest."""
        return {**self.model_dump(mode="json"), "digest": self.digest}

    @property
    def profiles(self) -> tuple[HardwareProfile, ...]:
        """The profile of each device type, one or two."""
        return (self.hardware,) if self.second_hardware is None else (self.hardware, self.second_hardware)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical form."""
        return _digest(self.model_dump(mode="json"))

    def to_json(self) -> str:
        """The text of a plan file: two spaces, keys in schema order, a final newline."""
        return json.dumps(self.to_data(), indent=2, allow_nan=False) + "\n"


def _digest(data: dict[str, Any]) -> str:
    """SHA-256 of a plan's data, without the search's wall time that older files state."""
    proof = data.get("certificate")
    if isinstance(proof, dict):
        data = {**data, "certificate": {k: v for k, v in proof.items() if k != "seconds"}}
    return "sha256:" + hashlib.sha256(canonical(data).encode()).hexdigest()


def digest_as_written(data: dict[str, Any]) -> str:
    """The digest of a file's own data, less the one that it states; "" for what JSON cannot hold."""
    try:
        return _digest({k: v for k, v in data.items() if k != "digest"})
    except (TypeError, ValueError):
        return ""


def content_digests(model: Model, hardware: HardwareProfile, job: Job, second: HardwareProfile | None = None) -> dict[str, str]:
    """SHA-256 of the canonical form of what a plan embeds, by its name there."""
    parts: dict[str, Spec] = {"model": model, "hardware": hardware, "job": job}
    parts |= {} if second is None else {"second_hardware": second}
    texts = {name: canonical(part.model_dump(mode="json")) for name, part in parts.items()}
    return {name: "sha256:" + hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


def canonical(data: Any) -> str:
    """JSON with sorted keys and no spaces: equal data, equal text."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
