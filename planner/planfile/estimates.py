"""What the cost model said of a layout, as a plan states it: step time, memory, their parts and intervals."""

from __future__ import annotations

from typing import ClassVar, Literal

from planner.specs.base import Sparse, Spec
from planner.specs.figures import Provenance


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


class Estimate(Sparse):
    """What the cost model predicts for one layout."""

    unwritten: ClassVar[tuple[str, ...]] = ("simulated_step_time_s",)

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
    simulated_step_time_s: float | None = None
    """Of a plan whose ranks hold several chunks: the step with its schedule run action by action, every chunk at its own time.
    `step_time_s`, which the search compares, takes a rank's chunks to be equal. None where simulating would take long."""
