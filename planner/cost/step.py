"""One optimizer step: integer primitives of each layout, and the time and memory of its stages from them.

The integer model that search, estimate and proof share. Per pipeline rank s with n layers (n1 selectively, n2 fully
recomputed), in-flight count K, m micro-batches, v chunks:

    R_s = n (F + B) + n1 r1 + n2 r2 + embedding (first) + head (last) + p2p
    T   = ceil( ( (v m - 1) max_s R_s + sum_s R_s ) / v + max_s d_s ) + constant
    d_s = max(gradient and parameter traffic - what hides under compute, its exposed share) + optimizer
    Mem_s = max( states + K (act + boundary) - unmade + transient, update states + update transient ) + buffers

Under a split backward the pipeline's term is `pipeline_time`, and the output gradients that wait count with the activations.

Every primitive is rounded up to whole nanoseconds and bytes. (v m - 1) max + sum is the makespan of a pipeline of
equal stages (Narayanan 2021, section 2.2) and not below it for unequal ones; tests compare it with `schedules.simulate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np

from planner.cost import peaks, unmade
from planner.cost.blending import Stack
from planner.cost.primitives import Blend, Primitives
from planner.cost.schedules import chunk_moments, ends, in_flight, layers_of, put_off
from planner.cost.task import Bools, Ints, LayoutArray, StageArray, Task, v_shaped
from planner.specs.layout import SCHEDULES, Layout


@dataclass(frozen=True)
class StageCost:
    """Time and memory of pipeline ranks; int64 arrays over the entries of a StageArray."""

    time: Ints
    """R, ns for one micro-batch."""
    once: Ints
    """d, ns once a step."""
    backward_bytes: Ints
    """Held by the allocator while micro-batches run: allocated, and what its pools keep (`ZeroRule.pooled`)."""
    ending_bytes: Ints
    """The same when a backward has passed the last layer, between two micro-batches or beside whole gradients being reduced."""
    update_bytes: Ints
    """Allocated when the step's last backward has passed the last layer, and while the optimizer runs."""

    def without(self, pooled: Ints) -> StageCost:
        """What is allocated, where pools keep `pooled` bytes."""
        return replace(self, backward_bytes=self.backward_bytes - pooled, ending_bytes=self.ending_bytes - pooled)

    @property
    def after_bytes(self) -> Ints:
        """The larger of the two when a backward has passed the last layer."""
        return np.maximum(self.ending_bytes, self.update_bytes)

    @property
    def allocated(self) -> Ints:
        """Peak bytes that the allocator holds, before the reserved ratio; without pools they are allocated."""
        return np.maximum(self.backward_bytes, self.after_bytes)


def stage_time(p: Primitives, first: Ints, last: Ints, layers: Ints, selective: Ints, full: Ints) -> Ints:
    """R of ranks, ns: all that a rank computes for one micro-batch; every argument broadcasts against the fields of `p`.

    With chunks the step made of it is exact for ranks of equal layers, head and embedding included. Ranks of unequal ones
    wait for each other's chunks now and then: simulations of 600 random splits are 2 % off on average, 6 % longer at the
    95th percentile. Where a rank's chunks mix kinds unequally (`blending`), others wait for the longest one when they meet it:
    half of what the rest lack to it counts beside them. Simulations of 300 even splits of five sequences are 7 % longer at
    most, and shorter mostly (tests/cost/test_chunks.py).
    """
    return layers * (p.forward + p.backward) + selective * p.recompute1 + full * p.recompute2 + end_time(p, first, last)


def end_time(p: Primitives, first: Ints, last: Ints) -> Ints:
    """The part of R that layers do not add to, ns."""
    return first * p.embedding + last * p.head + p.p2p


def stage_once(p: Primitives, first: Ints, last: Ints, layers: Ints) -> Ints:
    """d of ranks, ns: exposed step-wise traffic and the optimizer."""
    return np.maximum(*stage_traffic(p, first, last, layers)) + stage_update(p, first, last, layers)


def stage_traffic(p: Primitives, first: Ints, last: Ints, layers: Ints) -> tuple[Ints, Ints]:
    """(step-wise traffic less what hides under compute, what of it stays exposed in any case), ns."""
    traffic = layers * (p.comm - p.hide) + first * p.comm_first + last * p.comm_last
    return traffic, layers * p.floor + first * p.floor_first + last * p.floor_last


def stage_update(p: Primitives, first: Ints, last: Ints, layers: Ints) -> Ints:
    """The optimizer's part of d, ns."""
    return layers * p.update + first * p.update_first + last * p.update_last


def layers_by_kind(task: Task, layout: Layout) -> Ints:
    """Layers of each kind on each pipeline rank, shape (ranks, kinds)."""
    return chunks_by_kind(task, layout).sum(axis=1)


def chunks_by_kind(task: Task, layout: Layout) -> Ints:
    """Layers of each kind in each chunk of each pipeline rank, shape (ranks, chunks, kinds)."""
    kinds = task.model.kind_of_layer
    counts = np.zeros((layout.pp, layout.virtual_stages, len(task.model.kinds)), dtype=np.int64)
    for s, chunks in enumerate(layout.chunk_ranges):
        for c, layers in enumerate(chunks):
            for kind in kinds[layers.start : layers.stop]:
                counts[s, c, kind] += 1
    return counts


def blended_ranks(task: Task, kinds: Stack, layouts: Sequence[Layout], microbatches: Ints) -> Blend:
    """Primitives of every rank of layouts, one after the other; `kinds` has an entry for each of them."""
    if all(x.virtual_stages == 1 for x in layouts):
        return kinds.blend(np.concatenate([layers_by_kind(task, x) for x in layouts]))
    counts = [chunks_by_kind(task, x) for x in layouts]
    held = []
    for x, m in zip(layouts, microbatches, strict=True):
        codes = (np.array([SCHEDULES.index(x.schedule)]), np.array([x.pp]), np.array([1]), np.array([m]))
        plain = in_flight(*codes, np.arange(x.pp))[:, None, None]
        held.append(plain if x.virtual_stages == 1 else chunk_moments(x.pp, x.virtual_stages, np.array([m]))[0])
    v, moments = max(x.virtual_stages for x in layouts), max(h.shape[1] for h in held)
    padded = [np.pad(c, ((0, 0), (0, v - c.shape[1]), (0, 0))) for c in counts]
    longer = [np.pad(h, ((0, 0), (0, moments - h.shape[1]), (0, v - h.shape[2]))) for h in held]
    return kinds.blend(np.concatenate(padded), moments=np.concatenate(longer))


class Held(NamedTuple):
    """What ranks hold of micro-batches in flight."""

    flight: Ints
    """Micro-batches (of a chunk each) at most."""
    layers: Ints
    """(Layer, micro-batch) pairs whose activations are saved."""
    selective: Ints
    """Those of selectively recomputed layers."""
    full: Ints
    """Those of fully recomputed layers."""
    deferred: Ints
    """Those whose output gradients wait for weight gradients."""

    def bytes(self, p: Primitives) -> Ints:
        """All that they save, for primitives by rank."""
        less = self.selective * (p.act0 - p.act1) + self.full * (p.act0 - p.act2)
        return self.layers * p.act0 - less + self.deferred * p.deferred


def held(layouts: LayoutArray, stages: StageArray) -> Held:
    """What ranks hold when the most micro-batches are in flight; `layouts` has an entry for each of `stages`.

    With chunks a rank is recomputed as a whole or not at all, so its saved layers weigh all or nothing.
    """
    x, n1, n2 = layouts, stages.selective, stages.full
    place = (x.schedule, x.pp, x.virtual_stages, x.microbatches, stages.index)
    flight = in_flight(*place)
    weight = layers_of(flight, x.pp, x.virtual_stages, x.microbatches, stages.layers)
    whole = x.virtual_stages > 1
    weight1 = np.where(whole, np.where(n1 > 0, weight, 0), flight * n1)
    weight2 = np.where(whole, np.where(n2 > 0, weight, 0), flight * n2)
    waiting = put_off(x.schedule, x.pp, stages.index + stages.count - 1) * (stages.layers // x.virtual_stages)
    return Held(flight, weight, weight1, weight2, waiting)


def run_ends(layouts: LayoutArray, stages: StageArray) -> tuple[Ints, Ints]:
    """(first, last): which entries of `stages` hold the embedding, and the head; `layouts` has an entry for each of them."""
    x = layouts
    first, last = ends(x.schedule, x.pp, stages.index)
    return first, np.where(~v_shaped(x.schedule) & (stages.index + stages.count == x.pp), 1, last)


class AtPeak(NamedTuple):
    """What of its gradients, activations and temporaries a rank has when it holds the most."""

    missing: int
    """Bytes of gradients that no backward has made yet."""
    share: float
    """Of the activations that the rank saves when the most micro-batches are in flight, the part that is there."""
    beyond: int
    """Of the (layer, micro-batch) pairs that these are, those that are gone: they never meet the head's temporaries."""
    headed: bool
    """Whether the rank has the head's temporaries then: on a last rank without, those of a layer meet all pairs."""


def at_peak(p: Primitives, layouts: LayoutArray, stages: StageArray, s: int, ending: str | None) -> AtPeak:
    """That of rank `s` of a layout, whose peak is at `ending` (`peak_ending`); `p` by rank. `stage_cost` adds such parts up."""
    q, one = p.take(np.array([s])), stages.between(slice(s, s + 1))
    (first, last), there = run_ends(layouts, one), held(layouts, one)
    if ending is not None:
        left = int(unmade.left_between(q, there.flight)[0]) if ending == "between" else 0
        return AtPeak(0, left / int(there.flight[0]), 0, False)
    saved = there.bytes(q)
    missing, kept = unmade.most_held(q, first, there.flight, one.layers, saved)
    beyond = peaks.beyond_head(q, last, there.flight, one.layers, there.layers)
    mode = int(one.strongest[0])
    inner, outer = peaks.transients(q, first, mode)
    headed = bool(last[0] and (not beyond[0] or beyond[0] * q.saved(mode)[0] <= (outer - inner)[0]))
    return AtPeak(missing, kept / max(int(saved[0]), 1), int(beyond[0]) if headed else 0, headed)


def peak_ending(cost: StageCost, p: Primitives, layouts: LayoutArray, stages: StageArray, s: int, pooled: int) -> str | None:
    """Which ending decides the peak of rank `s` of a layout: `between`, or one of `endings`; None where a backward does.
    `p` by rank, `cost` without the rank's `pooled` bytes."""
    if int(cost.after_bytes[s]) <= int(cost.backward_bytes[s]):
        return None
    if int(cost.update_bytes[s]) >= int(cost.ending_bytes[s]):
        return "update"
    row = np.array([s])
    first, last = ends(layouts.schedule[:1], layouts.pp[:1], stages.index[row])
    closing = int(peaks.endings(p.take(row), first, last)["closing"].of(stages.layers[row])[0]) - pooled
    return "closing" if closing == int(cost.ending_bytes[s]) else "between"


def stage_cost(p: Primitives, layouts: LayoutArray, stages: StageArray, blended: Primitives | None = None) -> StageCost:
    """Time and memory of each rank; `p` and `layouts` are per layout, `stages` flattened, `blended` per rank (`blend`)."""
    q, x = p.take(stages.row) if blended is None else blended, layouts.take(stages.row)
    first, last = run_ends(x, stages)
    n, n1, n2 = stages.layers, stages.selective, stages.full
    there = held(x, stages)
    flight, saved, strongest = there.flight, there.bytes(q), stages.strongest
    transient, beyond = np.zeros_like(n), peaks.beyond_head(q, last, flight, n, there.layers)
    for mode in range(3):
        if np.any(under := strongest == mode):
            inner, headed = peaks.transients(q, first, mode)
            one = np.where(last == 1, headed, inner)
            if np.any(beyond):
                one = one - peaks.spared_by_head(beyond, q.saved(mode), headed - inner)
            transient = np.where(under, one, transient)
    left = saved * unmade.left_between(q, flight) // flight
    between = first * (n * q.state + left) + peaks.between_base(q, first, last, flight)
    never = unmade.spared(q, first, flight, n, saved)
    found = peaks.endings(q, first, last)
    return StageCost(
        stage_time(q, first, last, n, n1, n2),
        stage_once(q, first, last, n),
        n * q.state + peaks.stage_base_bytes(q, first, last, flight) + saved - never + transient,
        np.maximum(found["closing"].of(n), between),
        found["update"].of(n),
    )


@dataclass(frozen=True)
class StepCost:
    """Time and memory of layouts; int64 arrays over layouts."""

    step: Ints
    """T, ns."""
    allocated: Ints
    """Peak allocated bytes of the worst rank."""
    excess: Ints
    """Those beyond what the allocator may hold; negative when there is room."""

    @property
    def fits(self) -> Bools:
        """Whether each layout fits."""
        return self.excess <= 0


def pipeline_time(factor: Ints | int, slowest: Ints | np.int64, total: Ints | np.int64, credit: Ints | int) -> Ints:
    """What a pipeline takes for all micro-batches, v-ths of ns: the search, the estimate and the proof share it.

    `factor` = v m - 1, `slowest` = max R, `total` = sum R: factor max R + sum R. Under a split backward `credit`
    (`Primitives.credit`) less, but never less than the slowest rank computes: exact for equal ranks; in simulations of 2,400
    random pipelines (unequal ranks, head, sends) at most 2 % below the action lists' makespan, 3 % above it on average.
    """
    return np.asarray(np.maximum(factor * slowest + total - credit, (factor + 1) * slowest))


def credited(p: Primitives, layouts: LayoutArray, time: Ints) -> int:
    """How much of the credit of one layout's split backward counts, for R of each of its ranks: v-ths of ns."""
    factor, slowest = int(layouts.virtual_stages[0] * layouts.microbatches[0]) - 1, int(time.max())
    plain = factor * slowest + int(time.sum())
    return plain - int(pipeline_time(factor, np.int64(slowest), np.int64(time.sum()), p.credit)[0])


class Whole(Protocol):
    """The fields of `Primitives` that count once a step."""

    @property
    def credit(self) -> Ints: ...
    @property
    def constant(self) -> Ints: ...


def combine(p: Whole, layouts: LayoutArray, slowest: Ints, total: Ints, once: Ints) -> Ints:
    """T from max R, sum R and max d, ns."""
    v = layouts.virtual_stages
    pipeline = pipeline_time(v * layouts.microbatches - 1, slowest, total, p.credit)
    return -(-(pipeline + v * once) // v) + p.constant


def step_cost(p: Primitives, layouts: LayoutArray, stages: StageArray, blended: Primitives | None = None) -> StepCost:
    """Time and peak memory of each layout. Every layout must have at least one stage entry."""
    cost = stage_cost(p, layouts, stages, blended)
    size = len(layouts)
    order = np.argsort(stages.row, kind="stable") if np.any(np.diff(stages.row) < 0) else slice(None)
    row = stages.row[order]
    starts = np.searchsorted(row, np.arange(size))

    def worst(values: Ints) -> Ints:
        return np.maximum.reduceat(values[order], starts)

    total = np.add.reduceat((cost.time * stages.count)[order], starts)
    # Ranks of other device types may hold other amounts.
    capacity = p.capacity.take(stages.row) if blended is None else blended.capacity
    step = combine(p, layouts, worst(cost.time), total, worst(cost.once))
    return StepCost(step, worst(cost.allocated), worst(cost.allocated - capacity))
