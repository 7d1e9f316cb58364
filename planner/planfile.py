"""The plan file: schema, version, canonical form, digest, read, write.

Comes in: what `planning` assembled, or a file. Goes out: a `Plan` that holds everything a launcher and the runtime
need; they read nothing else. Equal inputs give equal bytes: how long the search took is not part of the file.
(The module is not called `plan`, because `planner.plan` is the function.)
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from planner._version import __version__
from planner.errors import Location, Problem, input_error
from planner.specs import files
from planner.specs.base import Sparse, Spec
from planner.specs.figures import Provenance
from planner.specs.hardware import HardwareProfile
from planner.specs.job import Job
from planner.specs.layout import Layout, Positive
from planner.specs.model import Model
from planner.specs.policy import Policy

FORMAT_VERSION = "2.1"
TWO_TYPES_VERSION = "2.2"
"""Written where a plan has two device types: readers of 2.1 refuse its fields."""
"""Major: older readers cannot read it. Minor: fields were added, all with defaults, so that files of that major still load."""


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


class StageMemory(Sparse):
    """Memory of one pipeline rank at its peak, GiB by part. The parts up to `transient` add up to `allocated`."""

    unwritten: ClassVar[tuple[str, ...]] = ("hardware", "limit_gib")

    stage: int
    params: float
    grads: float
    optimizer: float
    activations: float
    buffers: float
    """Receive buffers, stage outputs, library workspaces."""
    transient: float
    """What lives only at the peak: head and loss, gathered or recomputed layers, optimizer temporaries."""
    allocated: float
    """Sum of the above: what the framework's allocator reports."""
    reserved: float
    """Allocated and what the allocator keeps beside it."""
    outside: float
    """Driver context and communicators."""
    total: float
    """All that the device holds: reserved and outside."""
    headroom: float
    """The binding limit minus total."""
    cause: str
    """Which moment is the peak."""
    hardware: str | None = None
    """Profile of the devices that hold the stage, with two device types."""
    limit_gib: float | None = None
    """What a device of that type may hold, with two device types."""


Certainty = Literal["fitted", "assumed"]
"""fitted: the residual of a calibration of this engine on this hardware; assumed: the profile has none."""


class TimeInterval(Spec):
    """Where the measured step time should lie: from value / (1 + relative) to value * (1 + relative)."""

    low_s: float
    high_s: float
    relative: float
    """Relative error that four of five of the calibration's runs stay within, or the assumed one."""
    provenance: Certainty
    source: str
    """Which calibration, or why it is assumed."""


class MemoryInterval(Spec):
    """The same of `Memory.peak_gib`; `relative` holds for the allocated peak too."""

    low_gib: float
    high_gib: float
    relative: float
    provenance: Certainty
    source: str


class Memory(Spec):
    """Peak memory of the worst pipeline rank, and of each; with two device types the worst one is that with least headroom."""

    limit_gib: float
    """What a plan may fill: the lower of usable memory times the policy's fraction, and what its risk limit leaves."""
    limit_by: Literal["max_memory_fraction", "max_oom_probability"]
    """Which of the policy's limits that is: the one that binds."""
    usable_gib: float
    peak_gib: float
    """All that the device holds."""
    interval: MemoryInterval
    """Around `peak_gib`."""
    oom_probability: float
    """How likely the worst rank runs out of memory, from its allocated peak over the usable memory."""
    peak_allocated_gib: float
    """What the framework's allocator reports."""
    peak_stage: int
    host_gib: float = 0.0
    """GiB of optimizer states that each device of the fullest stage keeps in host memory (offload)."""
    peak_cause: str
    fits: bool
    stages: list[StageMemory]


class Breakdown(Spec):
    """Where one step's time goes, seconds on the slowest pipeline rank. The parts add up to the step time."""

    compute: float
    recompute: float
    tp_comm: float
    cp_comm: float
    ep_comm: float
    """Exposed exchanges of routed tokens."""
    zero_comm: float
    """Exposed gathers and reductions of every micro-batch (ZeRO 2 and 3)."""
    pp_comm: float
    bubble: float
    """Waiting for other pipeline ranks, filling and draining included."""
    dp_comm: float
    """Exposed gradient reduction and parameter gather, once a step."""
    optimizer: float
    other: float
    """Fixed cost of a step."""


class Estimate(Spec):
    """What the cost model predicts for one layout."""

    step_time_s: float
    interval: TimeInterval
    """Around `step_time_s`."""
    tokens_per_s: float
    tokens_per_s_per_gpu: float
    tflops_per_gpu: float
    """Model FLOPs of one device in `flops_convention`, TFLOP/s."""
    mfu: float
    """Model FLOPs in `flops_convention` over the dense peak."""
    mfu_causal: float | None = None
    """The same with causal attention: the keys that a query sees. None in plans of version 2.0."""
    hfu: float | None = None
    """Hardware FLOPs over the dense peak: those of `mfu`, and what the layout's recompute repeats. None in version 2.0."""
    flops_convention: Literal["full attention (PaLM, appendix B)"] = "full attention (PaLM, appendix B)"
    """6 (N - input embedding) + 12 L q s a token: every query against every key (arXiv 2204.02311)."""
    microbatches: int
    bubble_fraction: float
    breakdown: Breakdown
    memory: Memory
    provenance: Provenance
    """The least certain origin among the profile's figures."""


class Span(Spec):
    """A quantity that is proportional to the step time, with the interval that follows from the step time's."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> Span:
        """The same in other units, or of more."""
        return Span(value=self.value * factor, low=self.low * factor, high=self.high * factor)


class Rate(Spec):
    """A price or a power of one device, and where it comes from."""

    value: float
    provenance: Provenance | Literal["given"]
    """given: by whoever asked for the plan."""
    source: str


class Economy(Spec):
    """What training a number of tokens takes at the estimate's step time."""

    tokens: int
    steps: int
    """Optimizer steps: tokens over the tokens of one step, rounded up."""
    days: Span
    device_hours: Span
    cost_usd: Span | None
    """None without a price."""
    energy_mwh: Span | None
    """Of the devices at board power, times the PUE: an upper estimate. None without a power."""
    price_usd_per_device_hour: Rate | None
    power_watts: Rate | None
    """Board power of one device."""
    pue: float
    """Energy of the site over that of its devices; 1 counts the devices alone."""
    deadline_days: float | None
    notes: list[str]
    """What is missing, and how to read the energy."""


class ComputeOptimal(Spec):
    """How many tokens would be compute-optimal for a model of this size: a rule of thumb, where no budget was given."""

    tokens: int
    tokens_per_param: float
    counted: Literal["parameters", "active parameters"]
    """active parameters: of a mixture of experts."""
    days: Span
    """Training time at the estimate's step time."""
    source: str


class Space(Spec):
    """How the declared space was exhausted. by_rule + by_memory + by_bound + exact + open = enumerated."""

    enumerated: int
    by_rule: int
    by_memory: int
    by_bound: int
    exact: int
    open: int
    rules: dict[str, int] = Field(default_factory=dict)
    """How many outer rows each rule excluded."""


class LowestMemory(Spec):
    """The lowest memory limit under which some layout fits, found by bisection with the exact memory test of every row."""

    limit_gib: float
    """Some layout fits under it; the optimum is the fastest of those."""
    fraction: float
    """The same as a share of the usable memory."""
    impossible_gib: float
    """Proven: no layout of the space fits under it."""
    resolution: float
    """Share of `limit_gib` that the two are apart, at most."""
    tests: int
    """Limits tested."""


class Declared(Sparse):
    """The declared space, pins and forbids applied: an outer row takes one value of each axis; dp follows from the others."""

    unwritten: ClassVar[tuple[str, ...]] = ("type_order",)

    tp: list[Positive]
    cp: list[Positive]
    pp: list[Positive]
    dp: list[Positive]
    """Allowed dp degrees; empty for any."""
    ep: list[Positive]
    etp: list[Positive]
    any_etp: bool
    """Whether a row takes any of `etp`, instead of only 1 or its tp."""
    micro_batch: list[Positive]
    zero: list[int]
    schedules: dict[str, list[Positive]]
    """Virtual stages of each schedule."""
    sequence_parallel: list[bool]
    recompute: list[str]
    """Modes that a layer may have."""
    offload: list[str] = Field(default_factory=lambda: ["none"])
    """What may live in host memory."""
    order: list[str] = Field(default_factory=lambda: ["tp-cp-dp-pp"])
    """Rank orders."""
    type_order: list[str] = Field(default_factory=lambda: ["as-named"])
    """Which of two device types may hold the first stages."""


class Certificate(Spec):
    """What was proven, under the declared space and the integer cost model."""

    status: Literal["optimal", "infeasible", "interrupted"]
    objective: float | None
    """Step time of the fastest layout, seconds: the plan's, unless `choice` prefers another one to it."""
    bound: float | None
    """Proven lower bound on any layout of the space, seconds."""
    gap: float | None
    objective_ns: int | None
    """The integer that the proof is about."""
    space: Space
    declared: Declared | None = None
    """What the proof quantifies over. None in files of version 2.0, which cannot be verified."""
    complete: bool | None = None
    """Whether the search ran to its end, and so proved the alternatives too. None in files of version 2.0."""
    seconds: float | None = Field(default=None, exclude=True)
    """How long the search took. Shown, never written: equal inputs give equal files. Files before 2.1 state it."""
    solver: str
    lowest_memory: LowestMemory | None = None
    """The lower memory limit that the proof holds under, with `--objective memory`."""


class Alternative(Spec):
    """Another good layout: the best with its own (tp, cp, pp, ep)."""

    layout: Layout
    step_time_s: float
    slower: float
    """Share by which it is slower than the plan; below zero for the optimum that another layout is preferred to."""
    peak_gib: float
    oom_probability: float
    tokens_per_s_per_gpu: float


class Choice(Spec):
    """Why this layout is the plan among those that the search proved."""

    rule: Literal["fastest", "near tie"]
    """near tie: not the fastest, but within `tie` of it, with no less headroom and no more moving parts."""
    reason: str
    """One sentence."""
    tie: float
    """Relative difference in step time below which two layouts count as equally fast."""
    fastest_step_time_s: float
    """Of the optimum that the certificate is about; it is the first alternative when the rule is not `fastest`."""
    inside_interval: int
    """How many alternatives, the first ones, lie inside the estimate's interval: only a measurement can rank them."""


Objective = Literal["throughput", "time", "cost", "min-gpus", "memory"]
"""What a plan is the best for. One cluster: `memory` for the lowest peak and the fastest layout there, all others for the
fastest layout. Several: throughput and time pick the fastest, cost the least device-hours, min-gpus the fewest devices."""


class CountChoice(Spec):
    """Why the plan is for this number of devices, where several were compared."""

    compared: list[int]
    """Device counts."""
    reason: str
    """One sentence."""


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


def _digest_as_written(data: dict[str, Any]) -> str:
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


def write(plan: Plan, path: str | Path) -> None:
    """Write the plan so that a reader never sees half of it (in place where the path is not a regular file)."""
    write_text(plan.to_json(), path)


def write_text(text: str, path: str | Path) -> None:
    """Write a file so that a reader never sees half of it. Raises InputError."""
    target = Path(path).resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if target.exists() and not target.is_file():
            target.write_text(text, encoding="utf-8")
            return
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        why = error.strerror or str(error)
        raise input_error("PLN113", f"cannot write {path}", why, "give a writable path", Location(str(path))) from None


def is_plan(data: Any) -> bool:
    """Whether parsed data is a plan file."""
    return isinstance(data, dict) and data.get("format") == "planner.plan"


def read(path: str | Path) -> Plan:
    """Read and check a plan file. Raises InputError: not a plan, another version, or changed by hand."""
    return from_document(files.parse_document(path))


def from_document(document: files.Document) -> Plan:
    """The plan in a parsed document."""
    plan, stated = unchecked(document)
    # Fields that a newer minor version added are not in an older file: its own content has the digest it states.
    if stated is not None and stated not in (plan.digest, _digest_as_written(document.data)):
        why = f"its content has digest {plan.digest[:19]}…, the file states {stated[:19]}…"
        raise input_error(
            "PLN116", "the plan was changed after it was made", why, "make the plan again, or remove the digest line",
            Location(document.path, 1, 1),
        )  # fmt: skip
    return plan


def unchecked(document: files.Document) -> tuple[Plan, str | None]:
    """The plan in a parsed document, and the digest that the file states, whether they agree or not."""
    place = Location(document.path, 1, 1)
    if not is_plan(document.data):
        raise input_error("PLN114", "not a plan file", "it lacks format: planner.plan", "make one with planner plan -o", place)
    version = str(document.data.get("version", ""))
    if version.split(".")[0] != FORMAT_VERSION.split(".")[0]:
        why = f"this planner reads {FORMAT_VERSION.split('.')[0]}.x"
        raise input_error("PLN115", f"plan format {version}", why, "make the plan again", place)
    data = dict(document.data)
    stated = data.pop("digest", None)
    return files.build(Plan, document, data), None if stated is None else str(stated)


RUNNABLE = frozenset(("bundled", "compile"))
"""The bundled engine, and its recipes that change what runs; others only say how a run is priced."""


def refusals(plan: Plan) -> list[Problem]:
    """Why the bundled runtime will not run a plan: the rules of its engine, from the same table that the search uses."""
    from planner.cost.task import Subject
    from planner.engines.base import layout_problems
    from planner.engines.registry import engine_named

    if not RUNNABLE.issuperset(plan.engine.split("+")) or not plan.engine.startswith("bundled"):
        what = f"the plan is for engine {plan.engine}"
        why = "this runtime is the bundled one, alone or with +compile"
        return [Problem("PLN502", what, why, "plan again with --engine bundled")]
    subject = Subject(plan.model, plan.job, plan.cluster.gpus, tuple(t.gpus for t in plan.cluster.types))
    return layout_problems(subject, engine_named(plan.engine), plan.layout)
