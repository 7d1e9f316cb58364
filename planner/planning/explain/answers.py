"""What an explanation says: typed data, printed by `report` and as JSON."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from planner.planfile import Breakdown
from planner.specs.base import Sparse, Spec
from planner.specs.layout import Layout

# ---- ranks ---------------------------------------------------------------------------------------------------------

Binding = Literal["memory in backward", "memory in update", "time", "rule", "nothing"]
"""What decides how many layers a rank holds, and how many of them it recomputes. `memory` also where it is exceeded."""


class OneMore(Spec):
    """What a rank would need to hold one more layer (one more a chunk, with virtual stages)."""

    layers: int
    over_gib: float
    """Memory beyond the limit with the recompute that the rank has; negative when it fits."""
    moment: Literal["backward", "update"]
    plain_time_s: float
    """Time of one micro-batch with that recompute, seconds."""
    recompute: str | None
    """The cheapest recompute with which it fits; None when none does."""
    time_s: float | None
    """Time of one micro-batch with the cheapest, seconds."""


class LessRecompute(Spec):
    """What a rank would need to recompute one step less."""

    recompute: str
    over_gib: float
    """Memory beyond the limit then; negative when it fits."""


class Rank(Sparse):
    """One pipeline rank: what binds it."""

    unwritten: ClassVar[tuple[str, ...]] = ("hardware",)

    stage: int
    hardware: str | None = None
    """Profile of its devices, on two device types."""
    layers: int
    recompute: str
    binding: Binding
    reason: str
    """One sentence."""
    slack_gib: float
    """Memory below the limit at the rank's peak; negative when it does not fit."""
    time_s: float
    """Compute, traffic and recompute of one micro-batch, seconds."""
    share: float
    """Of the slowest rank's time."""
    one_more: OneMore | None
    """None where no other rank could give a layer up."""
    less_recompute: LessRecompute | None
    """None where nothing is recomputed."""


class Bottleneck(Spec):
    """The slowest pipeline rank, that the others wait for."""

    stage: int
    time_s: float
    next_stage: int | None
    """The second slowest rank; None without a pipeline."""
    ahead_s: float
    """By how much the slowest rank takes longer than the next, seconds a micro-batch."""
    per_step_s: float
    """What a step would gain if the slowest rank were as fast as the next."""


# ---- runners-up ----------------------------------------------------------------------------------------------------


class Loss(Spec):
    """Another layout against the plan."""

    layout: Layout
    name: str
    step_time_s: float
    slower: float
    """Share by which it is slower; negative when it is faster."""
    difference: Breakdown
    """Seconds of each part of the step beyond the plan's."""
    peak_gib: float
    peak_difference_gib: float
    sentence: str


class Excluded(Spec):
    """Layouts of the declared space that were left out for one reason."""

    reason: Literal["rule", "memory", "bound", "solved", "open"]
    rule: str | None
    """Name of the rule in the certificate."""
    code: str | None
    layouts: int
    share: float
    words: str


# ---- why not -------------------------------------------------------------------------------------------------------


class BrokenRule(Spec):
    """A rule that no layout under some pins obeys."""

    pins: dict[str, list[Any]]
    """With these pins alone it is broken, whatever the other axes are."""
    code: str
    name: str
    what: str
    why: str
    fix: str


class Conflict(Spec):
    """Constraints that cannot hold together; without any of them the others can."""

    members: list[str]
    rules: list[str]
    """Codes of the rules among them."""
    stages: list[int]
    """Pipeline ranks whose memory limits are among them."""
    all_layers: bool
    """Whether "all layers are placed" is."""


class Shortfall(Spec):
    """The layout that comes closest to fitting."""

    layout: Layout
    name: str
    stage: int
    needs_gib: float
    limit_gib: float
    over_gib: float
    cause: str
    parts: dict[str, float]
    """GiB of each part on that rank."""


ChangeKind = Literal["layers", "axis", "states", "fraction", "nodes", "memory"]
"""Other stages of the same layout; an axis with its restriction lifted; another precision of states; a higher share of the
memory; more nodes; devices with more memory."""


class Change(Spec):
    """One change that makes something fit, and what was proven about it."""

    kind: ChangeKind
    text: str
    axis: str | None = None
    nodes: int | None = None
    gpus: int | None = None
    extra_gib: float | None = None
    layout: Layout
    """The fastest layout with the change."""
    step_time_s: float
    peak_gib: float
    status: Literal["optimal", "interrupted"]
    """Of the search with the change: `interrupted` proved that it fits, not that `layout` is the fastest."""


Verdict = Literal["the plan", "equal", "slower", "faster", "does not fit", "breaks rules"]


class WhyNot(Spec):
    """Why a layout under some pins is not the plan."""

    pins: dict[str, list[Any]]
    verdict: Verdict
    sentence: str
    notes: list[str]
    """What the plan's own space has to do with it."""
    broken: list[BrokenRule] = Field(default_factory=list)
    conflict: Conflict | None = None
    allowed: dict[str, list[Any]] = Field(default_factory=dict)
    """Where rules are broken: values of each pinned axis that the rules leave, the other pins kept."""
    shortfall: Shortfall | None = None
    loss: Loss | None = None
    """Where it fits: the best layout under the pins against the plan."""
    changes: list[Change] = Field(default_factory=list)
    status: Literal["optimal", "interrupted", "infeasible"]
    """Of the search under the pins."""
    layouts: int
    """How many the pins leave in the grid."""


# ---- places --------------------------------------------------------------------------------------------------------


class Group(Spec):
    """The process groups of one mesh dimension."""

    name: str
    size: int
    stride: int
    """Distance between the ranks of a group."""
    groups: int
    tier: str
    """The outermost network tier that a group crosses; `` for one rank."""


class Mesh(Spec):
    """A mesh, its dimensions from the outermost inwards."""

    dimensions: list[str]
    shape: list[int]
    groups: list[Group]


class Place(Spec):
    """One device."""

    rank: int
    local_rank: int
    dense: list[int]
    """Coordinates in the dense mesh, by its dimensions."""
    expert: list[int]
    """Coordinates (pp, expert dp, ep, etp)."""


class Node(Sparse):
    """The devices of one node."""

    unwritten: ClassVar[tuple[str, ...]] = ("hardware",)

    node: int
    hardware: str | None = None
    """Profile of its devices, on two device types."""
    places: list[Place]


class OneType(Spec):
    """What one device type would do, beside a plan for two."""

    what: str
    hardware: str
    gpus: int
    step_time_s: float | None = None
    """Of the fastest layout; None where there is none."""
    times_the_plan: float | None = None
    """That over the plan's step time."""
    layout: str | None = None
    """In one line."""
    proven: bool | None = None
    """Whether it is the proven optimum, or the best within a time limit."""
    reason: str | None = None
    """Why there is none."""


class Explanation(Sparse):
    """Why this plan, and why not another."""

    unwritten: ClassVar[tuple[str, ...]] = ("one_type",)

    name: str
    """The plan's layout in one line."""
    step_time_s: float
    peak_gib: float
    limit_gib: float
    fits: bool
    ranks: list[Rank]
    bottleneck: Bottleneck
    losses: list[Loss]
    excluded: list[Excluded]
    layouts: int | None
    """Size of the declared space; None for a layout that a person named."""
    dense: Mesh
    expert: Mesh | None
    """None for models without routed experts."""
    nodes: list[Node]
    unfit: WhyNot | None
    """What conflicts and what would help, where the layout does not fit."""
    why_not: WhyNot | None = None
    """The answer to a question, where one was asked."""
    one_type: list[OneType] = Field(default_factory=list)
    """For a proven plan on two device types: each type alone, and all devices at the slower one's speed."""
