"""What the search proved, as a plan states it: the declared space, the certificate, runners-up and why this layout."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from planner.specs.base import Sparse, Spec
from planner.specs.layout import Layout, Positive


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

    unwritten: ClassVar[tuple[str, ...]] = ("type_order", "context")

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
    context: list[str] = Field(default_factory=lambda: ["default"])
    """How cp groups may share attention."""


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
