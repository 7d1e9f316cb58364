"""One point of the search space, and the small file that asks whether such a point is feasible.

The rules about what divides what are not here: `engines` holds them as data, for search, check and runtime alike.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from planner.specs.base import Spec
from planner.specs.job import Job
from planner.specs.policy import Policy

Schedule = Literal["none", "gpipe", "1f1b", "interleaved"]
SCHEDULES: tuple[str, ...] = ("none", "gpipe", "1f1b", "interleaved")
"""Names in the order of their codes. `none` is gradient accumulation without a pipeline (pp = 1)."""
OFFLOADS: tuple[str, ...] = ("none", "optimizer")
"""In the order of their codes."""
RankOrder = Literal["tp-cp-dp-pp", "tp-cp-pp-dp"]
RANK_ORDERS: tuple[str, ...] = ("tp-cp-dp-pp", "tp-cp-pp-dp")
"""In the order of their codes: pipeline stages apart, or beside each other with data-parallel replicas apart."""
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


class Layout(Spec):
    """How the job is spread: degrees, ZeRO stage, micro-batch, schedule, and what each pipeline rank holds."""

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
    micro_batch: Positive = 1
    """Sequences that one data-parallel rank processes at once."""
    schedule: Schedule = "none"
    """Pipeline schedule; `none` exactly when pp is 1."""
    virtual_stages: Positive = 1
    """Chunks a pipeline rank holds; above 1 exactly with `interleaved`."""
    sequence_parallel: bool = False
    """Norms and residuals split over the sequence inside the tp group (Korthikanti 2022)."""
    offload: Literal["none", "optimizer"] = "none"
    """What lives in host memory: optimizer states and fp32 masters, updated there (ZeRO-Offload, arXiv 2101.06840)."""
    order: RankOrder = "tp-cp-dp-pp"
    """Axes from the innermost outwards: which groups of ranks are neighbours."""
    stages: list[Stage] = Field(min_length=1)
    """One entry a pipeline rank, first rank first."""

    @property
    def world_size(self) -> int:
        """Devices that the layout uses."""
        return self.tp * self.cp * self.pp * self.dp

    def microbatches(self, job: Job) -> int:
        """Micro-batches of one optimizer step on each data-parallel rank (floor; the rules demand a whole number)."""
        return job.global_batch // (self.dp * self.micro_batch)

    @property
    def chunks(self) -> list[list[int]]:
        """Layers of each chunk, as [pipeline rank][chunk]: see `chunk_layers`."""
        return [chunk_layers(stage.layers, self.virtual_stages) for stage in self.stages]


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


class Configuration(Spec):
    """A layout with everything needed to judge it: the file that `planner check` and `planner estimate` read."""

    model: str
    """Name of a shipped model, or the path of a model file, relative to this file."""
    hardware: str
    """Name of a shipped profile, or the path of a profile, relative to this file."""
    nodes: int | None = Field(default=None, gt=0, lt=2**31)
    gpus: int | None = Field(default=None, gt=0, lt=2**31)
    engine: str = "bundled"
    job: Job
    layout: Layout
    policy: Policy = Policy()
