"""The cost model's integers as an `Estimate` for people: seconds by cause, GiB by part, the peak's moment named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from planner.cost import devicetypes, frozen, intervals, memory, peaks, primitives, risk, step
from planner.cost.primitives import Primitives, TimeParts
from planner.cost.schedules import in_flight
from planner.cost.states import params_by_place
from planner.cost.step import StageCost
from planner.cost.task import Ints, LayoutArray, StageArray, Task
from planner.planfile import Breakdown, Estimate, Memory, MemoryInterval, StageMemory, TimeInterval
from planner.planning.utilisation import utilisation
from planner.specs.figures import Provenance
from planner.specs.layout import Layout
from planner.units import GIB


@dataclass(frozen=True)
class _Kind:
    """One kind of layers, priced for the layout."""

    p: Primitives
    parts: TimeParts
    sources: tuple[frozen.Source, ...]


@dataclass(frozen=True)
class _Priced:
    """One layout with everything that was computed for it."""

    task: Task
    layout: Layout
    x: LayoutArray
    stages: StageArray
    types: tuple[int, ...]
    """The device type of each rank."""
    by_type: tuple[tuple[_Kind, ...], ...]
    """Each kind of layers, on each device type."""
    counts: Ints
    """Layers by kind of each rank, shape (ranks, kinds)."""
    q: Primitives
    """Primitives of each rank."""
    cost: StageCost
    """What is allocated."""
    pooled: Ints
    """Bytes of each rank that the allocator's pools keep beside, until its update."""

    @cached_property
    def held(self) -> Ints:
        """Bytes of each rank that count against its memory."""
        return self.cost.without(-self.pooled).allocated

    def task_of(self, s: int) -> Task:
        """The task as rank s sees it: on its device type."""
        return _tasks(self.task)[self.types[s]]

    def kinds(self, s: int) -> tuple[_Kind, ...]:
        """Each kind of layers on the device type of rank s."""
        return self.by_type[self.types[s]]

    def base(self, s: int) -> _Kind:
        """The kind that embedding, head and sends are priced with."""
        return self.kinds(s)[self.task.model.text_kind]

    @cached_property
    def state_bytes(self) -> tuple[tuple[tuple[memory.StateBytes, memory.StateBytes], ...], ...]:
        """States a parameter of each source, on each device type: of what every rank holds, and of experts."""
        x, text = self.x, self.task.model.text_kind
        sources = [[task for task, _, _ in kinds[text].sources] for kinds in self.by_type]
        return tuple(
            tuple((memory.state_bytes(t, x, x.shard), memory.state_bytes(t, x, x.expert_shard)) for t in tasks)
            for tasks in sources
        )

    def mean(self, values: Sequence[float], rank: int) -> float:
        """Mean over the layers of a rank of what one layer of each kind takes."""
        held = self.counts[rank]
        return float(np.dot(held, np.array(values))) / max(int(held.sum()), 1)


def estimate_layout(task: Task, layout: Layout) -> Estimate:
    """What the cost model predicts for one layout (which must obey the rules)."""
    x, stages = LayoutArray.of([layout], task.job), StageArray.of([layout])
    by_type = tuple(_kinds(t, x) for t in _tasks(task))
    found = devicetypes.layout_cost(task, layout)
    types, counts = devicetypes.stages_of(task, layout), step.layers_by_kind(task, layout)
    pooled = devicetypes.pooled_bytes(task, layout)
    cost = found.stages.without(pooled)
    priced = _Priced(task, layout, x, stages, types, by_type, counts, found.ranks, cost, pooled)
    seconds = int(found.total.step[0]) / 1e9
    rate = task.job.tokens_per_step / seconds
    used = utilisation(task, layout, rate / task.gpus)
    breakdown = _breakdown(priced, seconds)
    return Estimate(
        step_time_s=seconds,
        interval=_time_interval(task, seconds),
        tokens_per_s=rate,
        tokens_per_s_per_gpu=rate / task.gpus,
        tflops_per_gpu=used.model_flops / 1e12,
        mfu=used.mfu,
        mfu_causal=used.mfu_causal,
        hfu=used.hfu,
        microbatches=int(x.microbatches[0]),
        bubble_fraction=breakdown.bubble / seconds,
        breakdown=breakdown,
        memory=_memory(priced),
        provenance=_provenance(task, layout),
    )


def _tasks(task: Task) -> tuple[Task, ...]:
    """The task on each device type."""
    return tuple(task.on(i) for i in range(len(task.types))) or (task,)


def _kinds(task: Task, x: LayoutArray) -> tuple[_Kind, ...]:
    """Each kind of layers on one device type."""
    tasks = [task] if task.model.homogeneous else [task.only(k) for k in range(len(task.model.kinds))]
    return tuple(_Kind(*primitives.price_with_parts(t, x), frozen.sources(t, x)) for t in tasks)


def _breakdown(c: _Priced, seconds: float) -> Breakdown:
    """Parts of the step on the slowest rank; what rounding leaves is in `other`."""
    time, once = c.cost.time, c.cost.once
    s = int(np.argmax(time))
    n, n1, n2 = (int(a[s]) for a in (c.stages.layers, c.stages.selective, c.stages.full))
    last = s == c.layout.last_rank
    m, v = int(c.x.microbatches[0]), c.layout.virtual_stages
    one = {
        k: c.mean([float(getattr(kind.parts, k)[0]) for kind in c.kinds(s)], s) for k in ("compute", "tp", "cp", "ep", "zero")
    }
    again_tp, again_cp = (
        sum(
            k * c.mean([float(getattr(x.parts, f"recompute_{axis}")[i][0]) for x in c.kinds(s)], s)
            for i, k in enumerate((n1, n2))
        )
        for axis in ("tp", "cp")
    )
    again = (n1 * int(c.q.recompute1[s]) + n2 * int(c.q.recompute2[s])) / 1e9
    ends = (int(c.q.embedding[s]) if s == 0 else 0) + (int(c.q.head[s]) if last else 0)
    ends_tp, ends_zero = (
        sum(
            float(getattr(c.base(s).parts, f"{end}_{part}")[0]) for end, here in (("embedding", s == 0), ("head", last)) if here
        )
        for part in ("tp", "zero")
    )
    d = int(np.argmax(once))
    update = int(c.stages.layers[d]) * int(c.q.update[d])
    update += (int(c.q.update_first[d]) if d == 0 else 0) + (int(c.q.update_last[d]) if d == c.layout.last_rank else 0)
    parts = {
        "compute": m * (n * one["compute"] + ends / 1e9 - ends_tp - ends_zero),
        "recompute": m * (again - again_tp - again_cp),
        "tp_comm": m * (n * one["tp"] + ends_tp + again_tp),
        "cp_comm": m * (n * one["cp"] + again_cp),
        "ep_comm": m * n * one["ep"],
        "zero_comm": m * (n * one["zero"] + ends_zero),
        "pp_comm": m * int(c.q.p2p[s]) / 1e9,
        "bubble": (int(time.sum()) - int(time[s]) - step.credited(c.q, c.x, time)) / v / 1e9,
        "dp_comm": (int(once[d]) - update) / 1e9,
        "optimizer": update / 1e9,
    }
    if v > 1 and len(c.kinds(s)) > 1:  # what its shorter chunks wait for others at their longest one
        busy = ("compute", "recompute", "tp_comm", "cp_comm", "ep_comm", "zero_comm", "pp_comm")
        parts["bubble"] += max(m * int(time[s]) / 1e9 - sum(parts[name] for name in busy), 0.0)
    return Breakdown(**parts, other=max(seconds - sum(parts.values()), 0.0))


def _time_interval(task: Task, seconds: float) -> TimeInterval:
    spread = max((intervals.time_spread(t) for t in _tasks(task)), key=lambda s: s.relative)
    low, high = spread.around(seconds)
    return TimeInterval(low_s=low, high_s=high, relative=spread.relative, provenance=spread.provenance, source=spread.source)


def _memory_interval(task: Task, gib: float) -> MemoryInterval:
    spread = max((intervals.memory_spread(t) for t in _tasks(task)), key=lambda s: s.relative)
    low, high = spread.around(gib)
    return MemoryInterval(
        low_gib=low, high_gib=high, relative=spread.relative, provenance=spread.provenance, source=spread.source
    )


LimitName = Literal["max_memory_fraction", "max_oom_probability"]


def _limit(c: _Priced, s: int) -> tuple[float, LimitName]:
    """GiB that rank s's device may hold, and which limit says so; one of what is allocated counts with what lies around it."""
    limit = c.task_of(s).limit / GIB
    allocated = risk.allocated_limit(c.task_of(s))
    if allocated is None:
        return limit, "max_memory_fraction"
    allowed = _held(c, s, allocated) / GIB
    return (allowed, "max_oom_probability") if allowed < limit else (limit, "max_memory_fraction")


def _held(c: _Priced, s: int, allocated: int) -> float:
    """Bytes that a device holds while `allocated` bytes are: with what the allocator keeps, and what lies outside."""
    return allocated * c.task_of(s).reserved_ratio + int(c.q.outside[s])


def _memory(c: _Priced) -> Memory:
    stages = [_stage_memory(c, s, _limit(c, s)[0]) for s in range(c.layout.pp)]
    whole = replace(c, x=replace(c.x, offload=np.zeros_like(c.x.offload)))
    # The stage that comes nearest to its limit: with one device type the one that holds most.
    peak = max(stages, key=lambda m: m.total) if not c.task.types else min(stages, key=lambda m: m.headroom)
    limit, limit_by = _limit(c, peak.stage)
    risks = [risk.out_of_memory_probability(c.task_of(s), a) for s, a in enumerate(c.held[:, None].astype(float))]
    return Memory(
        limit_gib=limit,
        limit_by=limit_by,
        usable_gib=c.task_of(peak.stage).hardware.device.memory.base / GIB,
        peak_gib=peak.total,
        interval=_memory_interval(c.task, peak.total),
        oom_probability=max(float(each[0]) for each in risks),
        peak_allocated_gib=peak.allocated if c.task.types else max(m.allocated for m in stages),
        peak_stage=peak.stage,
        peak_cause=peak.cause,
        host_gib=max(_hosted(whole, s) for s in range(c.layout.pp)) / GIB if c.layout.offload == "optimizer" else 0.0,
        fits=bool(np.all(c.held <= c.q.capacity)),
        stages=stages,
    )


def _stage_memory(c: _Priced, s: int, limit: float) -> StageMemory:
    """One rank's memory by part at its peak moment; rounding goes to `transient`."""
    ending = step.peak_ending(c.cost, c.q, c.x, c.stages, s, int(c.pooled[s]))
    updating = ending == "update"
    allocated = int(c.cost.allocated[s])
    parts = _states(c, s, updating)
    first, last = int(s == 0), int(s == c.layout.last_rank)
    a = np.array
    q, peak = c.q.take(a([s])), step.at_peak(c.q, c.x, c.stages, s, ending)
    parts["grads"] -= peak.missing
    receive = int(peaks.receive_bytes(q, a([first]), a([last]))[0])
    most = int(in_flight(c.x.schedule, c.x.pp, c.x.virtual_stages, c.x.microbatches, a([s]))[0])
    sends = 1 if c.layout.virtual_stages > 1 or ending else 1 - last
    outputs = sends * (most if ending in (None, "between") else 0) * int(q.boundary[0])
    shared = 0 if ending else int(peaks.shared_inputs(q, a([first]), a([most]))[0])
    buffers = receive + outputs - shared + int(q.fixed[0])
    flight = round(peak.share * most)
    transient = int(getattr(q, ending)[0]) if ending in ("between", "closing") else _transient(c, s, peak, updating)
    activations = max(0, allocated - sum(parts.values()) - buffers - transient) if flight else 0
    transient = allocated - sum(parts.values()) - buffers - activations
    total = _held(c, s, int(c.held[s])) / GIB
    return StageMemory(
        stage=s,
        **{k: v / GIB for k, v in parts.items()},
        activations=activations / GIB,
        buffers=buffers / GIB,
        transient=transient / GIB,
        allocated=allocated / GIB,
        reserved=total - int(c.q.outside[s]) / GIB,
        outside=int(c.q.outside[s]) / GIB,
        total=total,
        headroom=limit - total,
        cause=_cause(c, s, peak, flight, ending),
        hardware=c.task_of(s).hardware.name if c.task.types else None,
        limit_gib=limit if c.task.types else None,
    )


def _hosted(whole: _Priced, s: int) -> int:
    """Bytes of optimizer states of one rank that live in host memory; `whole` is the layout without offload."""
    return _states(whole, s, updating=True)["optimizer"]


def _states(c: _Priced, s: int, updating: bool) -> dict[str, int]:
    """Bytes of parameters, gradients and optimizer states on one rank, its experts and frozen weights included."""
    found = [_states_of(c, i, s, updating) for i in range(len(c.base(s).sources))]
    return {part: sum(states[part] for states in found) for part in memory.PARTS}


def _states_of(c: _Priced, source: int, s: int, updating: bool) -> dict[str, int]:
    """The same of the parameters under one rule: trained (0) or frozen (1)."""
    places, each = params_by_place(c.base(s).sources[source][1]), [k.sources[source].counts for k in c.kinds(s)]
    shared, routed = c.state_bytes[c.types[s]][source]
    held, experts = (shared.update, routed.update) if updating else (shared.backward, routed.backward)
    layers = [int(n) for n in c.counts[s]]
    if s == c.layout.last_rank:
        layers[c.task.model.text_kind] += c.task.model.mtp
    count = sum(n * float(counts["layer"][0]) for n, counts in zip(layers, each, strict=True))
    count += float(places["first"][0]) if s == 0 else 0.0
    count += float(places["last"][0]) if s == c.layout.last_rank else 0.0
    owned = sum(n * float(counts["experts"][0]) for n, counts in zip(layers, each, strict=True))
    return {part: int(held[part][0] * count + experts[part][0] * owned) for part in memory.PARTS}


def _transient(c: _Priced, s: int, peak: step.AtPeak, updating: bool) -> int:
    if updating:
        return 0
    first, last = np.array([int(s == 0)]), np.array([int(peak.headed)])
    return int(peaks.stage_transient(c.q.take(np.array([s])), first, last, int(c.stages.strongest[s]))[0])


_ENDINGS = {
    "update": "end of backward and optimizer update",
    "between": "the embedding's gradient between two micro-batches",
    "closing": "end of backward, whole gradients being reduced",
}


def _cause(c: _Priced, s: int, peak: step.AtPeak, flight: int, ending: str | None) -> str:
    """The peak's moment in words."""
    if ending:
        return _ENDINGS[ending] + (f", {flight} in flight" if flight else "")
    mode, elsewhere = int(c.stages.strongest[s]), np.zeros(1, dtype=np.int64)
    q = c.q.take(np.array([s]))
    layer = int(peaks.stage_transient(q, elsewhere, elsewhere, mode)[0])
    if peak.headed and int(q.head_transient[0]) >= layer:
        kind = "fp32" if c.task.accounting.logit_bytes > 4 else c.task.job.precision
        return f"backward of the head, logits in {kind}, {flight} in flight"
    return f"backward of a {'recomputed ' if mode else ''}layer, {flight} in flight"


_TRUST: tuple[Provenance, ...] = ("measured", "fitted", "datasheet", "assumed")


def _provenance(task: Task, layout: Layout) -> Provenance:
    """The least certain origin among the figures that decide this estimate."""
    origins: list[Provenance] = []
    for hardware in task.profiles:
        d = hardware.device
        origins += [d.memory.provenance, d.memory_bandwidth.provenance, d.gemm.provenance]
        origins += [d.attention.provenance, d.sustained.provenance]
        if layout.world_size > 1:
            origins += [o for tier in hardware.network for o in (tier.bandwidth.provenance, tier.efficiency.provenance)]
    return max(origins, key=_TRUST.index)
