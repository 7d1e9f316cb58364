"""What the cost functions are asked about: one model, job, machine and engine accounting; and arrays of layouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from planner.cost.accounting import Accounting
from planner.errors import input_error
from planner.specs.calibration import Calibration
from planner.specs.hardware import HardwareProfile
from planner.specs.job import Job
from planner.specs.layers import FrontEnd
from planner.specs.layout import (
    CONTEXTS,
    OFFLOADS,
    RANK_ORDERS,
    SCHEDULES,
    SPLIT_BACKWARD,
    TYPE_ORDERS,
    V_SHAPED,
    Layout,
    Stage,
)
from planner.specs.model import Model

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

NONE, GPIPE, ONE_F_ONE_B, INTERLEAVED, INTERLEAVED_ZB, ZBV, DUALPIPEV = range(len(SCHEDULES))
"""Codes of the schedules, in the order of their names."""
SPLIT_CODES = tuple(SCHEDULES.index(name) for name in SPLIT_BACKWARD)
V_CODES = tuple(SCHEDULES.index(name) for name in V_SHAPED)


NARROW_SHARE = {"fp8": 0.91, "fp4": 0.80}
"""What fp8 and fp4 products gain in training over what their peak rates promise: fitted on published runs of the
Transformer Engine stack (1.82 and 3.2 times bf16)."""

MAX_DEVICES = 1_000_000
"""Larger clusters are neither planned nor tried."""


@dataclass(frozen=True)
class Subject:
    """What a rule may look at: the model, the job, and how many devices there are."""

    model: Model
    job: Job
    gpus: int
    type_sizes: tuple[int, ...] = ()
    """Devices of each type, where the cluster has several."""


@dataclass(frozen=True)
class DeviceType:
    """The devices of one type in a cluster of several."""

    hardware: HardwareProfile
    gpus: int


@dataclass(frozen=True)
class Task:
    """A planning task: everything but the layout."""

    model: Model
    job: Job
    hardware: HardwareProfile
    gpus: int
    accounting: Accounting
    max_memory_fraction: float = 0.92
    max_oom_probability: float | None = None
    """How likely a layout may run out of memory (see `risk`); None for no limit of its own."""
    fronts: tuple[FrontEnd, ...] = ()
    """Front ends whose patch embeddings and projectors the first rank holds beside the token embedding (see `only`)."""
    types: tuple[DeviceType, ...] = ()
    """The device types of a cluster of several (see `devicetypes`), empty for one; `hardware` is then the first one's."""
    one_of_several: bool = False
    """Whether the model's layers stand for one kind among others (see `only`)."""

    def on(self, number: int) -> Task:
        """The task as one of its device types sees it: all devices of the cluster, as if they were of that type."""
        return replace(self, hardware=self.types[number].hardware, types=())

    @property
    def type_sizes(self) -> tuple[int, ...]:
        """Devices of each type, where the cluster has several."""
        return tuple(t.gpus for t in self.types)

    @property
    def profiles(self) -> tuple[HardwareProfile, ...]:
        """The profile of each device type: one, or those of `types`."""
        return tuple(t.hardware for t in self.types) or (self.hardware,)

    @property
    def peak(self) -> float:
        """Dense peak of one device at the job's precision, FLOP/s; the mean one over several types.

        Raises InputError when a profile lacks it.
        """
        if self.types:
            return sum(t.gpus * self.on(i).peak for i, t in enumerate(self.types)) / self.gpus
        figure = self.hardware.device.peak.get(self.job.precision)
        if figure is None:
            known = ", ".join(self.hardware.device.peak)
            what = f"profile {self.hardware.name} has no peak rate for {self.job.precision}"
            raise input_error(
                "PLN120", what, f"it has {known}", f"add device.peak.{self.job.precision}, or choose another precision"
            )
        return figure.base

    @property
    def linear_peak(self) -> float:
        """Peak of the layers' matrix products, FLOP/s: more than `peak` with narrow types (`Job.linears`).

        Raises InputError when the profile lacks that type.
        """
        kind = self.job.linears
        if kind == "same":
            return self.peak
        figure = self.hardware.device.peak.get(kind)
        if figure is None:
            what = f"profile {self.hardware.name} has no peak rate for {kind}"
            raise input_error("PLN120", what, "", f"add device.peak.{kind}, or set linears: same")
        return max(self.peak, figure.base * NARROW_SHARE[kind]) * self.constant("narrow")

    def constant(self, name: str) -> float:
        """A fitted constant of this engine on this machine, or its prior."""
        return self.calibration.value(name)

    @cached_property
    def calibration(self) -> Calibration:
        """The fitted constants of this engine on this machine."""
        return self.hardware.calibration(self.accounting.name)

    @cached_property
    def growth(self) -> float:
        """Factor on all times: straggling and congestion grow with every doubling of devices beyond one node."""
        return 1.0 + self.constant("scale") * max(0.0, math.log2(self.gpus / self.hardware.node_size))

    @property
    def reserved_ratio(self) -> float:
        """Reserved over allocated memory."""
        return self.accounting.reserved_ratio * self.constant("reserved")

    def only(self, kind: int) -> Task:
        """The task with all layers of one kind; those of a front end see its tokens, all others keep what lies outside its
        layers."""
        front = self.model.kinds[kind][0].front
        job = self.job.model_copy(update={"seq_len": front.tokens}) if front else self.job
        fronts = () if front else self.model.fronts
        return replace(self, model=self.model.only(kind), job=job, fronts=fronts, one_of_several=len(self.model.kinds) > 1)

    @property
    def limit(self) -> int:
        """Bytes that a plan may fill on one device."""
        return int(self.hardware.device.memory.base * self.max_memory_fraction)


def splits_backward(schedule: Ints) -> Bools:
    """Which schedules run weight gradients apart."""
    return _among(schedule, SPLIT_CODES)


def v_shaped(schedule: Ints) -> Bools:
    """Which schedules have two chunks on every rank, in a V."""
    return _among(schedule, V_CODES)


def _among(schedule: Ints, codes: tuple[int, ...]) -> Bools:
    found: Bools = schedule == codes[0]
    for code in codes[1:]:  # a few comparisons take less than np.isin
        found = found | (schedule == code)
    return found


def picked(columns: dict[str, Ints], rows: Ints | Bools) -> dict[str, Ints]:
    """Columns at `rows`, numbers or a mask; where the rows follow each other, views."""
    numbers: Ints = np.nonzero(rows)[0] if rows.dtype == bool else rows.astype(np.int64, copy=False)
    run = consecutive(numbers)
    return {name: column.take(numbers, axis=0) if run is None else column[run] for name, column in columns.items()}


def consecutive(rows: Ints) -> slice | None:
    """The slice that has the same rows, where they follow each other."""
    if len(rows) and int(rows[-1]) - int(rows[0]) == len(rows) - 1 and bool(np.all(rows[1:] > rows[:-1])):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return None


@dataclass(frozen=True)
class LayoutArray:
    """The outer choices of many layouts, one entry each, int64 arrays of equal length."""

    tp: Ints
    cp: Ints
    pp: Ints
    dp: Ints
    ep: Ints
    etp: Ints
    zero: Ints
    micro_batch: Ints
    schedule: Ints
    """Code of the schedule."""
    virtual_stages: Ints
    sequence_parallel: Ints
    """0 or 1."""
    microbatches: Ints
    """m = global_batch / (dp * micro_batch)."""
    offload: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """1 where optimizer states live in host memory; all 0 when left out."""
    order: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Code of the rank order; all 0 when left out."""
    sharded: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Ranks that share one copy of the states; 0 for all of dp * cp, also when left out."""

    type_order: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """1 where the first stages are on the second device type; all 0 when left out."""
    context: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Code of how cp groups share attention; all 0 when left out."""

    def __post_init__(self) -> None:
        for name in ("offload", "order", "sharded", "type_order", "context"):
            if len(getattr(self, name)) != len(self.tp):
                object.__setattr__(self, name, np.zeros(len(self.tp), dtype=np.int64))

    def __len__(self) -> int:
        return len(self.tp)

    def take(self, rows: Ints | Bools) -> LayoutArray:
        """The layouts at `rows`."""
        return LayoutArray(**picked({f.name: getattr(self, f.name) for f in fields(self)}, rows))

    def between(self, rows: slice) -> LayoutArray:
        """The layouts of a slice, as views."""
        return LayoutArray(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @property
    def data(self) -> Ints:
        """Ranks that hold the same parameters: dp cp."""
        return self.dp * self.cp

    @property
    def shard(self) -> Ints:
        """D, the ranks over which ZeRO shards: all that hold the same parameters, or a group of them."""
        return np.where(self.sharded > 0, self.sharded, self.data)

    @property
    def replicas(self) -> Ints:
        """Copies of the sharded states."""
        return self.data // self.shard

    @property
    def kept_zero(self) -> Ints:
        """ZeRO stage as it runs: torch's pipeline stages reduce gradients after the last micro-batch only, so that stage 2 is 1
        under the schedules that leave the reduction to them."""
        return np.where(splits_backward(self.schedule) & (self.zero == 2), 1, self.zero)

    @property
    def apart(self) -> Ints:
        """How far data-parallel neighbours stand apart beyond tp and cp: a pipeline between them, or nothing."""
        return np.where(self.order == 1, self.pp, 1)

    @property
    def span(self) -> Ints:
        """Ranks between the first and the last stage of one pipeline, both included."""
        return self.tp * self.cp * self.pp * np.where(self.order == 1, 1, self.dp)

    @property
    def expert_shard(self) -> Ints:
        """Ranks that hold the same experts: tp cp dp / (ep etp), at least 1."""
        return np.maximum(self.tp * self.cp * self.dp // (self.ep * self.etp), 1)

    def layout(self, row: int, stages: Sequence[Stage]) -> Layout:
        """The spec layout of one entry with its stages: the inverse of `of`."""
        names = ("tp", "cp", "pp", "dp", "ep", "etp", "zero", "micro_batch", "virtual_stages")
        degrees: dict[str, Any] = {name: int(getattr(self, name)[row]) for name in names}
        return Layout(
            **degrees,
            schedule=SCHEDULES[int(self.schedule[row])],  # type: ignore[arg-type]
            sequence_parallel=bool(self.sequence_parallel[row]),
            shard=int(self.sharded[row]) or None,
            offload=OFFLOADS[int(self.offload[row])],  # type: ignore[arg-type]
            order=RANK_ORDERS[int(self.order[row])],  # type: ignore[arg-type]
            type_order=TYPE_ORDERS[int(self.type_order[row])],  # type: ignore[arg-type]
            context=CONTEXTS[int(self.context[row])],  # type: ignore[arg-type]
            stages=list(stages),
        )

    @classmethod
    def of(cls, layouts: Sequence[Layout], job: Job) -> LayoutArray:
        """The outer choices of spec layouts."""

        def column(name: str) -> Ints:
            return np.array([getattr(x, name) for x in layouts], dtype=np.int64)

        return cls(
            **{name: column(name) for name in ("tp", "cp", "pp", "dp", "ep", "etp", "zero", "micro_batch", "virtual_stages")},
            schedule=np.array([SCHEDULES.index(x.schedule) for x in layouts], dtype=np.int64),
            sequence_parallel=column("sequence_parallel"),
            sharded=np.array([x.shard or 0 for x in layouts], dtype=np.int64),
            microbatches=np.array([x.microbatches(job) for x in layouts], dtype=np.int64),
            offload=np.array([OFFLOADS.index(x.offload) for x in layouts], dtype=np.int64),
            order=np.array([RANK_ORDERS.index(x.order) for x in layouts], dtype=np.int64),
            type_order=np.array([TYPE_ORDERS.index(x.type_order) for x in layouts], dtype=np.int64),
            context=np.array([CONTEXTS.index(x.context) for x in layouts], dtype=np.int64),
        )


@dataclass(frozen=True)
class StageArray:
    """Pipeline ranks of many layouts, flattened: `count` equal neighbouring ranks an entry, the first one at `index`.

    Only ranks that differ in nothing but their place may share an entry; since fewer micro-batches are in flight on
    later ranks, the first of a run needs the most memory. Output gradients that wait under a split backward are counted as
    on the last one.
    """

    row: Ints
    """Entry of the LayoutArray."""
    index: Ints
    """Pipeline rank, 0 first."""
    count: Ints
    layers: Ints
    selective: Ints
    full: Ints

    @property
    def strongest(self) -> Ints:
        """The strongest recompute mode of each: 0 none, 1 selective, 2 full."""
        return np.where(self.full > 0, 2, np.where(self.selective > 0, 1, 0))

    def between(self, rows: slice) -> StageArray:
        """The entries of a slice, as views."""
        return StageArray(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @classmethod
    def of(cls, layouts: Sequence[Layout]) -> StageArray:
        """One entry a pipeline rank of spec layouts."""
        rows = []
        for row, layout in enumerate(layouts):
            rows += [(row, i, 1, s.layers, *s.counts) for i, s in enumerate(layout.stages)]
        table = np.array(rows, dtype=np.int64).reshape(-1, 6)
        return cls(*(table[:, i].copy() for i in range(6)))


def even_runs(layouts: LayoutArray, n_layers: int, recompute: int) -> StageArray:
    """Even splits of `n_layers` (first and last rank light when they do not divide), one recompute mode for all.

    `recompute`: 0 none, 1 selective, 2 full. At most four runs a layout.
    """
    pp = layouts.pp
    base, extra = n_layers // pp, n_layers % pp
    middle = np.minimum(extra, np.maximum(pp - 2, 0))
    first_heavy = (extra > middle).astype(np.int64)
    zero, one = np.zeros_like(pp), np.ones_like(pp)
    index = np.stack([zero, one, 1 + middle, pp - 1], axis=1)
    count = np.stack([one, middle, np.maximum(pp - 2, 0) - middle, (pp > 1).astype(np.int64)], axis=1)
    held = np.stack([base + first_heavy, base + 1, base, base], axis=1)
    keep = count.ravel() > 0
    row = np.repeat(np.arange(len(layouts)), 4)[keep]
    index, count, layers = index.ravel()[keep], count.ravel()[keep], held.ravel()[keep]
    none = np.zeros_like(layers)
    return StageArray(row, index, count, layers, layers if recompute == 1 else none, layers if recompute == 2 else none)
