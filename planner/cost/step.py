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

from planner.cost import unmade
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


def stage_base_bytes(p: Primitives, first: Ints, last: Ints, flight: Ints) -> Ints:
    """Bytes of a rank that do not depend on its layers, while micro-batches run."""
    extras = first * p.state_first + last * p.state_last
    return extras + (1 - first) * p.entering + p.fixed + passing_bytes(p, first, last, flight)


class Passing(Protocol):
    """The fields of `Primitives` that say what ranks keep of what they pass on."""

    @property
    def boundary(self) -> Ints: ...
    @property
    def entering(self) -> Ints: ...
    @property
    def chunks(self) -> Ints: ...
    @property
    def waiting(self) -> Ints: ...
    @property
    def carried(self) -> Ints: ...
    @property
    def receive(self) -> Ints: ...
    @property
    def alike(self) -> Ints: ...


def passing_bytes(p: Passing, first: Ints, last: Ints, flight: Ints) -> Ints:
    """The part of these that depends on how many chunk-micro-batches are in flight, on chunks and on buffers."""
    passed = flight * passed_bytes(p, first, last) + last * p.waiting
    return passed + receive_bytes(p, first, last) + (p.chunks - 1) * p.carried


def passed_bytes(p: Passing, first: Ints, last: Ints) -> Ints:
    """Bytes that each chunk-micro-batch in flight adds to what a rank passes on: its output, less its input (shared)."""
    sends = np.where(p.chunks > 1, 1, 1 - last)  # with chunks the last rank passes on all but its last one
    return np.asarray(sends * p.boundary - (1 - first) * p.entering)


def shared_inputs(p: Primitives, first: Ints, flight: Ints) -> Ints:
    """Received inputs in flight, which their first layers save as well: counted once. One is made up for by the gradient
    that the rank has sent last, which lives until its next backward. On the first rank nothing is left out."""
    return (1 - first) * (flight - 1) * p.entering


def receive_bytes(p: Passing, first: Ints, last: Ints) -> Ints:
    """Receive buffers of a rank: activations into all but the model's first stage, gradients into all but its last."""
    return buffers_held(p, first, last) * p.receive


def buffers_held(p: Passing, first: Ints, last: Ints) -> Ints:
    """Of how many chunks and directions a rank has receive buffers."""
    return 2 * p.chunks - (first + last) * (1 - p.alike)


def stage_transient(p: Primitives, first: Ints, last: Ints, mode: int) -> Ints:
    """Peak temporaries of a rank whose strongest recompute mode is `mode` (0 none, 1 selective, 2 full)."""
    m = moments(p, first, mode)
    head = np.maximum(np.maximum(m.head.bytes, m.head_reduction.bytes), m.head_finish.bytes)
    return np.maximum(np.where(last == 1, head, m.layer.bytes), np.maximum(m.reduction.bytes, m.finish.bytes))


def head_excess(p: Primitives, first: Ints, mode: int) -> Ints:
    """How much more temporaries take on a last rank at its head's backward than at that of a layer; negative for less."""
    one = np.ones_like(first)
    return stage_transient(p, first, one, mode) - stage_transient(p, first, 0 * one, mode)


class Headed(Protocol):
    """The fields of `Primitives` that say what is in flight when the head runs backward."""

    @property
    def headed(self) -> Ints: ...
    @property
    def chunks(self) -> Ints: ...


class HeadedRank(NamedTuple):
    """They alone."""

    headed: Ints
    chunks: Ints


def beyond_head(p: Headed, last: Ints, flight: Ints, layers: Ints, pairs: Ints) -> Ints:
    """Of the `pairs` (layer, micro-batch) that a rank with `layers` layers holds at most, those beyond what the last rank holds
    when its head runs backward: chunks with a layer more than others are first ones, and the head is in the last."""
    there = flight * (layers // p.chunks) + p.headed * (layers % p.chunks)
    return np.where((p.headed >= 0) & (last == 1), np.maximum(pairs - there, 0), 0)


def spared_by_head(beyond: Ints, saved: Ints, excess: Ints) -> Ints:
    """Bytes of the head's temporaries (`head_excess`) that never meet the most activations, for `saved` bytes of a pair."""
    return np.where(beyond > 0, np.minimum(beyond * saved, excess), 0)


class Moment(NamedTuple):
    """A moment of backward: what a unit's own backward takes, and the reduction buffers beside it."""

    unit: Ints
    beside: Ints

    @property
    def bytes(self) -> Ints:
        """All of it."""
        return self.unit + self.beside


class Moments(NamedTuple):
    """The moments of backward at which a rank's temporaries may peak."""

    head: Moment
    """The last rank's first unit, beside what the micro-batch before left to be reduced."""
    layer: Moment
    """The first unit of the other ranks, beside the same."""
    head_reduction: Moment
    """A layer of the last rank beside the head's reduction."""
    reduction: Moment
    """A layer beside the reduction of the one before, whose saved activations are gone."""
    finish: Moment
    """The end of a layer's backward."""
    head_finish: Moment
    """The end of the head's."""


def moments(p: Primitives, first: Ints, mode: int) -> Moments:
    """The moments at which a rank's temporaries may peak, under its strongest recompute mode."""
    layer = p.transient + p.remade(mode)
    carried = np.where(first == 1, p.carried_first, p.carried)
    nothing = np.zeros_like(carried)
    return Moments(
        Moment(p.head_transient, carried), Moment(layer, carried), Moment(layer, p.head_reduction),
        Moment(layer, p.reduction_rest(mode)), Moment(p.finish_rest(mode), nothing), Moment(p.head_finish, nothing),
    )  # fmt: skip


class Ending(NamedTuple):
    """Bytes of a rank when backward has passed its last layer: `start + layers * state`."""

    start: Ints
    state: Ints

    def of(self, layers: Ints) -> Ints:
        """Bytes of ranks with `layers` layers."""
        return self.start + layers * self.state


def endings(p: Primitives, first: Ints, last: Ints) -> dict[str, Ending]:
    """What a rank holds when backward ends and while the optimizer runs (`update`), and on the first rank at the embedding's
    reduction beside whole accumulated gradients (`closing`)."""
    beside = receive_bytes(p, first, last) + p.fixed
    transient = p.last_reduction + np.where(first == 1, p.last_embedding, p.last_layer)
    update = first * p.updating_first + last * p.updating_last + transient + beside
    closing = first * (p.state_first + last * p.state_last + beside + p.closing)
    return {"update": Ending(update, p.updating), "closing": Ending(closing, first * p.state)}


def stage_update_bytes(p: Primitives, first: Ints, last: Ints, layers: Ints) -> Ints:
    """Bytes of a rank when the step's last backward has passed its last layer, and while the optimizer runs."""
    return np.maximum.reduce([ending.of(layers) for ending in endings(p, first, last).values()])


def between_base(p: Primitives, first: Ints, last: Ints, flight: Ints) -> Ints:
    """Bytes of the first rank that do not depend on its layers at the embedding's gradient between two micro-batches, when
    activations are of one fewer than `flight`; 0 on other ranks."""
    extras = p.state_first + last * p.state_last + p.fixed
    return first * (extras + p.between) + between_passing(p, first, last, flight)


def between_passing(p: Passing, first: Ints, last: Ints, flight: Ints) -> Ints:
    """The part of these that `passing_bytes` is of those of a backward; each chunk has a buffer of its own.

    The output of the micro-batch whose backward ends is still there: the stage frees it when that returns.
    """
    carried = (p.chunks - 1) * p.carried
    return first * (receive_bytes(p, first, last) + carried + flight * passed_bytes(p, first, last))


def saved_limit(p: Primitives, first: Ints, last: Ints, flight: Ints, layers: Ints, mode: int, pairs: Ints | None = None) -> Ints:
    """Bytes that a rank with `layers` layers may save for backward when its strongest recompute mode is `mode`; negative when
    it does not fit at all. `pairs`: (layer, micro-batch) pairs in flight, of use where chunks may be unequal."""
    return saved_limits(p, first, last, flight, layers, (mode,), pairs)[0]


def saved_limits(
    p: Primitives, first: Ints, last: Ints, flight: Ints, layers: Ints, modes: Sequence[int], pairs: Ints | None = None
) -> list[Ints]:
    """The same under each of `modes`: they differ in their temporaries alone."""
    beyond = np.zeros(1, dtype=np.int64) if pairs is None else beyond_head(p, last, flight, layers, pairs)
    left = p.capacity - layers * p.state
    most, base = _between_limit(p, first, last, flight, left), left - stage_base_bytes(p, first, last, flight)

    def within(mode: int) -> Ints:
        room = base - stage_transient(p, first, last, mode)
        if np.any(beyond):
            room = room + spared_by_head(beyond, p.saved(mode), head_excess(p, first, mode))
        return np.minimum(unmade.most_saved(p, first, flight, layers, room), most)

    return [within(mode) for mode in modes]


def _between_limit(p: Primitives, first: Ints, last: Ints, flight: Ints, left: Ints) -> Ints:
    """The same for what the first rank holds between two micro-batches, of `left` bytes beside its layers' states."""
    room = left - between_base(p, first, last, flight)
    return np.where(first == 1, unmade.part_within(room, unmade.left_between(p, flight), flight), unmade.NO_LIMIT)


def peak_ending(cost: StageCost, p: Primitives, layouts: LayoutArray, stages: StageArray, s: int, pooled: int) -> str | None:
    """Which ending decides the peak of rank `s` of a layout: `between`, or one of `endings`; None where a backward does.
    `p` by rank, `cost` without the rank's `pooled` bytes."""
    if int(cost.after_bytes[s]) <= int(cost.backward_bytes[s]):
        return None
    if int(cost.update_bytes[s]) >= int(cost.ending_bytes[s]):
        return "update"
    row = np.array([s])
    first, last = ends(layouts.schedule[:1], layouts.pp[:1], stages.index[row])
    closing = int(endings(p.take(row), first, last)["closing"].of(stages.layers[row])[0]) - pooled
    return "closing" if closing == int(cost.ending_bytes[s]) else "between"


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


def stage_cost(p: Primitives, layouts: LayoutArray, stages: StageArray, blended: Primitives | None = None) -> StageCost:
    """Time and memory of each rank; `p` and `layouts` are per layout, `stages` flattened, `blended` per rank (`blend`)."""
    q, x = p.take(stages.row) if blended is None else blended, layouts.take(stages.row)
    first, last = run_ends(x, stages)
    n, n1, n2 = stages.layers, stages.selective, stages.full
    flight, weight, weight1, weight2, waiting = held(x, stages)
    saved = weight * q.act0 - weight1 * (q.act0 - q.act1) - weight2 * (q.act0 - q.act2) + waiting * q.deferred
    strongest = np.where(n2 > 0, 2, np.where(n1 > 0, 1, 0))
    transient, beyond = np.zeros_like(n), beyond_head(q, last, flight, n, weight)
    for mode in range(3):
        if np.any(there := strongest == mode):
            one = stage_transient(q, first, last, mode)
            if np.any(beyond):
                one = one - spared_by_head(beyond, q.saved(mode), head_excess(q, first, mode))
            transient = np.where(there, one, transient)
    left = saved * unmade.left_between(q, flight) // flight
    between = first * (n * q.state + left) + between_base(q, first, last, flight)
    never = unmade.spared(q, first, flight, n, saved)
    found = endings(q, first, last)
    return StageCost(
        stage_time(q, first, last, n, n1, n2),
        stage_once(q, first, last, n),
        n * q.state + stage_base_bytes(q, first, last, flight) + saved - never + transient,
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
