"""One point of the search space, and the small file that asks whether such a point is feasible.

The rules about what divides what are not here: `engines` holds them as data, for search, check and runtime alike.
"""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from planner.specs.base import Sparse, Spec
from planner.specs.job import Job
from planner.specs.policy import Policy

Schedule = Literal["none", "gpipe", "1f1b", "interleaved", "interleaved-zb", "zbv", "dualpipev"]
SCHEDULES: tuple[str, ...] = ("none", "gpipe", "1f1b", "interleaved", "interleaved-zb", "zbv", "dualpipev")
"""Names in the order of their codes. `none` is gradient accumulation without a pipeline (pp = 1); the last three are torch's
InterleavedZeroBubble, ZBVZeroBubble (both arXiv 2401.10241) and DualPipeV (arXiv 2412.19437)."""
CHUNKED: tuple[str, ...] = ("interleaved", "interleaved-zb")
"""Schedules with two chunks or more on every rank, chunk c of rank s being stage c pp + s."""
V_SHAPED: tuple[str, ...] = ("zbv", "dualpipev")
"""Schedules with two chunks on every rank, rank s holding stages s and 2 pp - 1 - s: the first rank has both ends."""
SPLIT_BACKWARD: tuple[str, ...] = ("interleaved-zb", "zbv", "dualpipev")
"""Schedules that run the backward for inputs and the one for weights apart, to fill bubbles with the latter."""
OFFLOADS: tuple[str, ...] = ("none", "optimizer")
"""In the order of their codes."""
RankOrder = Literal["tp-cp-dp-pp", "tp-cp-pp-dp"]
RANK_ORDERS: tuple[str, ...] = ("tp-cp-dp-pp", "tp-cp-pp-dp")
"""In the order of their codes: pipeline stages apart, or beside each other with data-parallel replicas apart."""
CONTEXTS: tuple[str, ...] = ("default", "ring")
"""In the order of their codes: how a cp group shares attention, the engine's first way or a ring beside it."""
TYPE_ORDERS: tuple[str, ...] = ("as-named", "reversed")
"""In the order of their codes: which of two device types holds the first pipeline stages, the first named or the second."""
RECOMPUTE_MODES: tuple[str, ...] = ("none", "selective", "full")
Positive = Annotated[int, Field(gt=0, lt=2**31)]

_PART = re.compile(r"^(selective|full):(\d+)$")


def parse_recompute(text: str, layers: int) -> tuple[int, int]:
    """(selective, full) layer counts of a stage with `layers` layers from "none", "full", "full:3,selective:2".

    The first layers of a stage are the recomputed ones: full first, then selective, then none.
    Raises ValueError when the text is malformed or counts more layers than the stage has.
    """
    if text in RECOMPUTE_MODES:
        return (layers if text == "selective" else 0, layers if text == "full" else 0)
    counts = {"selective": 0, "full": 0}
    for part in text.split(","):
        match = _PART.match(part.strip())
        if not match or counts[match[1]]:
            raise ValueError(f"'{text}' is not none, selective, full, or counts such as full:3,selective:2")
        counts[match[1]] = int(match[2])
    if sum(counts.values()) > layers:
        raise ValueError(f"'{text}' counts more layers than the {layers} of its stage")
    return counts["selective"], counts["full"]


def format_recompute(layers: int, selective: int, full: int) -> str:
    """The canonical text of a stage's recompute: the inverse of `parse_recompute`."""
    if selective == 0 and full == 0:
        return "none"
    if full == layers:
        return "full"
    if selective == layers:
        return "selective"
    return ",".join(f"{name}:{n}" for name, n in (("full", full), ("selective", selective)) if n)


class Stage(Spec):
    """What one pipeline rank holds. With virtual stages, `layers` counts all its chunks."""

    layers: int = Field(ge=0, lt=2**31)
    """Engines of ours want at least one (a rule); a few cut stages that hold the head alone."""
    recompute: str = "none"
    """`none`, `selective`, `full`, or the counts of the first layers, such as `full:3,selective:2`."""

    @model_validator(mode="after")
    def _recompute_is_valid(self) -> Stage:
        parse_recompute(self.recompute, self.layers)
        return self

    @property
    def counts(self) -> tuple[int, int]:
        """(selective, full) recomputed layers."""
        return parse_recompute(self.recompute, self.layers)


class Layout(Sparse):
    """How the job is spread: degrees, ZeRO stage, micro-batch, schedule, and what each pipeline rank holds."""

    unwritten: ClassVar[tuple[str, ...]] = ("type_order", "context")

    tp: Positive = 1
    """Tensor parallel degree."""
    cp: Positive = 1
    """Context parallel degree (the sequence is split)."""
    pp: Positive = 1
    """Pipeline parallel degree."""
    dp: Positive = 1
    """Data parallel degree."""
    ep: Positive = 1
    """Expert parallel degree; it borrows ranks from tp, cp and dp."""
    etp: Positive = 1
    """Tensor parallel degree inside experts."""
    zero: int = Field(default=0, ge=0, le=3)
    """ZeRO stage over dp * cp: 0 nothing sharded, 1 optimizer, 2 and gradients, 3 and parameters."""
    shard: Positive | None = None
    """Neighbouring ranks among dp * cp that share one copy of the states (hybrid sharding, arXiv 2304.11277, section 3.2.2);
    all of them when left out. The copies stay equal by all-reducing gradients across them."""
    micro_batch: Positive = 1
    """Sequences that one data-parallel rank processes at once."""
    schedule: Schedule = "none"
    """Pipeline schedule; `none` exactly when pp is 1."""
    virtual_stages: Positive = 1
    """Chunks a pipeline rank holds: 2 or more with `interleaved` and `interleaved-zb`, 2 with `zbv` and `dualpipev`, else 1."""
    sequence_parallel: bool = False
    """Norms and residuals split over the sequence inside the tp group (Korthikanti 2022)."""
    offload: Literal["none", "optimizer"] = "none"
    """What lives in host memory: optimizer states and fp32 masters, updated there (ZeRO-Offload, arXiv 2101.06840)."""
    order: RankOrder = "tp-cp-dp-pp"
    """Axes from the innermost outwards: which groups of ranks are neighbours."""
    type_order: Literal["as-named", "reversed"] = "as-named"
    """On two device types: whether the first stages are on the type that is named first, or on the other one."""
    context: Literal["default", "ring"] = "default"
    """How the ranks of a cp group share attention: by the engine's own way, or, where an engine has another first (bundled:
    Ulysses, arXiv 2309.14509), by keys and values around a ring (arXiv 2310.01889)."""
    stages: list[Stage] = Field(min_length=1)
    """One entry a pipeline rank, first rank first."""

    @property
    def world_size(self) -> int:
        """Devices that the layout uses."""
        return self.tp * self.cp * self.pp * self.dp

    @property
    def sharded(self) -> int:
        """Ranks over which ZeRO shards."""
        return self.shard or self.dp * self.cp

    def microbatches(self, job: Job) -> int:
        """Micro-batches of one optimizer step on each data-parallel rank (floor; the rules demand a whole number)."""
        return job.global_batch // (self.dp * self.micro_batch)

    @property
    def chunks(self) -> list[list[int]]:
        """Layers of each chunk, as [pipeline rank][chunk]: see `chunk_layers`."""
        return [chunk_layers(stage.layers, self.virtual_stages) for stage in self.stages]

    @property
    def chunk_ranges(self) -> list[list[range]]:
        """The model's layers that each chunk holds, as [pipeline rank][chunk]: the stages' layers join in stage order."""
        counts, starts, at = self.chunks, {}, 0
        for rank, chunk in stage_places(self.schedule, self.pp, self.virtual_stages):
            starts[rank, chunk] = at
            at += counts[rank][chunk]
        return [[range(starts[r, c], starts[r, c] + n) for c, n in enumerate(held)] for r, held in enumerate(counts)]

    @property
    def last_rank(self) -> int:
        """The pipeline rank that holds the model's last layers, the head and the loss."""
        return last_rank(self.schedule, self.pp)


def stage_of(schedule: str, pp: int, rank: int, chunk: int) -> int:
    """The stage of the model (0 first) that a chunk of a pipeline rank is."""
    return 2 * pp - 1 - rank if schedule in V_SHAPED and chunk else chunk * pp + rank


def stage_places(schedule: str, pp: int, virtual_stages: int) -> list[tuple[int, int]]:
    """(pipeline rank, chunk) of each stage, in stage order: the inverse of `stage_of`."""
    places = [(rank, chunk) for rank in range(pp) for chunk in range(virtual_stages)]
    return sorted(places, key=lambda place: stage_of(schedule, pp, *place))


def last_rank(schedule: str, pp: int) -> int:
    """The pipeline rank of the model's last stage."""
    return 0 if schedule in V_SHAPED else pp - 1


def chunk_layers(layers: int, virtual_stages: int) -> list[int]:
    """Split a rank's layers over its chunks: sizes differ by at most one, the first chunks take the extra ones.

    The last chunk of the last rank, which also holds the head, is so never longer than the others. The rules let only the last
    rank have unequal chunks: where v does not divide the model's layers, its last ones are one layer short.
    """
    base, extra = divmod(layers, virtual_stages)
    return [base + (1 if c < extra else 0) for c in range(virtual_stages)]


def even_stages(layers: int, pp: int, recompute: str = "none", virtual_stages: int = 1) -> list[Stage]:
    """Layers spread as evenly as they go, the last stages (and the first) one short when they do not divide.

    With virtual stages every rank holds whole multiples of them, but for what the last one lacks.
    """
    v = virtual_stages
    short = -layers % v
    base, extra = divmod(-(-layers // v), pp)
    order = [*range(1, pp - 1), 0, pp - 1] if pp > 1 else [0]
    if short and base == 1:  # a rank of one layer a chunk has none to lack
        order = [pp - 1, *order[:-1]]
    heavy = set(order[:extra])
    counts = [v * (base + (1 if s in heavy else 0)) for s in range(pp)]
    counts[-1] = max(counts[-1] - short, 0)
    return [Stage(layers=n, recompute=recompute) for n in counts]


class Share(Spec):
    """The nodes of one device type, in a cluster of two."""

    profile: str
    """Name of a shipped profile, or the path of a profile, relative to the file."""
    nodes: int = Field(gt=0, lt=2**31)


class Configuration(Spec):
    """A layout with everything needed to judge it: the file that `planner check` and `planner estimate` read."""

    model: str
    """Name of a shipped model, or the path of a model file, relative to this file."""
    hardware: str | list[Share]
    """Name of a shipped profile, or the path of a profile, relative to this file; a list of two profiles with their nodes where
    the cluster has two device types (then without `nodes` and `gpus`)."""
    nodes: int | None = Field(default=None, gt=0, lt=2**31)
    gpus: int | None = Field(default=None, gt=0, lt=2**31)
    engine: str = "bundled"
    job: Job
    layout: Layout
    policy: Policy = Policy()
