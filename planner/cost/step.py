"""One optimizer step: integer primitives of each layout, and the time and memory of its stages from them.

The integer model that search, estimate and proof share. Per pipeline rank s with n layers (n1 selectively, n2 fully
recomputed), in-flight count K, m micro-batches, v chunks:

    R_s = n (F + B) + n1 r1 + n2 r2 + embedding (first) + head (last) + p2p
    T   = ceil( ( (v m - 1) max_s R_s + sum_s R_s ) / v + max_s d_s ) + constant
    d_s = max(gradient and parameter traffic - what hides under compute, its exposed share) + optimizer
    Mem_s = max( states + K (act + boundary) + transient, update states + update transient ) + buffers

Every primitive is rounded up to whole nanoseconds and bytes. (v m - 1) max + sum is the makespan of a pipeline of
equal stages (Narayanan 2021, section 2.2) and not below it for unequal ones; tests compare it with `schedules.simulate`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from planner.cost import memory, operators
from planner.cost.collectives import collective_seconds, neighbour_seconds
from planner.cost.compute import overlapped, streaming_seconds
from planner.cost.memory import ceil
from planner.cost.schedules import in_flight, in_flight_layers
from planner.cost.task import GPIPE, Bools, Floats, Ints, LayoutArray, StageArray, Task, even_runs
from planner.specs.layout import SCHEDULES


@dataclass(frozen=True)
class Primitives:
    """Integers of each layout: ns for one micro-batch, bytes for one rank. int64 arrays of equal length."""

    # time of one layer and micro-batch
    forward: Ints
    backward: Ints
    recompute1: Ints
    """Extra time of one selectively recomputed layer."""
    recompute2: Ints
    """Extra time of one fully recomputed layer."""
    # time of a rank
    embedding: Ints
    head: Ints
    p2p: Ints
    """Exposed send and receive of one micro-batch, forward and backward, all chunks."""
    # once a step
    comm: Ints
    """Step-wise dp traffic of one layer."""
    comm_first: Ints
    comm_last: Ints
    hide: Ints
    """dp traffic that one layer's compute hides."""
    floor: Ints
    """Part of `comm` that stays exposed in any case."""
    floor_first: Ints
    floor_last: Ints
    update: Ints
    """Optimizer time of one layer."""
    update_first: Ints
    update_last: Ints
    constant: Ints
    # bytes
    state: Ints
    """States of one layer while micro-batches run."""
    state_first: Ints
    state_last: Ints
    carried: Ints
    """Reduction buffer of a micro-batch's last layer, kept into the next micro-batch (ranks but the first)."""
    carried_first: Ints
    """The same of the embedding (first rank)."""
    updating: Ints
    """States of one layer while the optimizer runs."""
    updating_first: Ints
    updating_last: Ints
    last_reduction: Ints
    """Reduction buffer of the layer before the last unit when backward ends."""
    last_layer: Ints
    """Gradients and reduction of the last unit when it is a layer."""
    last_embedding: Ints
    """The same when it is the embedding (first rank)."""
    act0: Ints
    """Saved activations of one layer and micro-batch without recompute."""
    act1: Ints
    """... with selective recompute."""
    act2: Ints
    """... with full recompute."""
    transient: Ints
    """Temporaries of one layer's backward, gathered copies included."""
    reduction: Ints
    """Reduction buffers beside them, once the layer's own activations are gone."""
    head_transient: Ints
    head_reduction: Ints
    """Reduction buffers of the head's unit, beside the last layer's backward."""
    waiting: Ints
    """Kept on a pipeline's last rank by losses that wait for their backward (GPipe), and as the stage's output."""
    boundary: Ints
    """Stage output kept for each chunk-micro-batch in flight."""
    receive: Ints
    """Receive buffers of one chunk and direction."""
    chunks: Ints
    """v."""
    fixed: Ints
    """Library workspaces, and buffers that an engine keeps for one layer."""
    capacity: Ints
    """What the allocator may hold: the limit less what lies outside, over the reserved ratio."""
    outside: Ints
    """Driver context and communicators."""

    def take(self, rows: Ints | Bools) -> Primitives:
        """The primitives at `rows`."""
        if rows.dtype == bool:
            rows = np.nonzero(rows)[0]
        return Primitives(**{f.name: getattr(self, f.name).take(rows, axis=0) for f in fields(self)})


@dataclass(frozen=True)
class TimeParts:
    """Float seconds behind `Primitives.forward` and its like, for the breakdown. Arrays over layouts."""

    compute: Floats
    tp: Floats
    cp: Floats
    zero: Floats
    """Exposed gathers and reductions of every micro-batch."""
    head_tp: Floats
    recompute_tp: tuple[Floats, Floats]


def primitives(task: Task, layouts: LayoutArray) -> Primitives:
    """The integers of each layout."""
    return primitive_table(task, layouts).of(slice(None))


def primitives_with_parts(task: Task, layouts: LayoutArray) -> tuple[Primitives, TimeParts]:
    """The integers, and the float times that they were made of."""
    table = primitive_table(task, layouts)
    return table.of(slice(None)), table.parts()


@dataclass(frozen=True)
class PrimitiveTable:
    """Primitives of the distinct combinations among layouts, spread over layouts when asked for.

    Nearly all of them depend on (tp, cp, micro_batch, sequence_parallel, dp, zero) only: a few thousand combinations at
    most, however many layouts there are.
    """

    task: Task
    layouts: LayoutArray
    share: Ints
    """Combination of each layout."""
    columns: dict[str, Ints]
    """Fields of `Primitives` by combination."""
    boundary: Ints
    waiting: Ints
    output: Ints
    hops: tuple[Ints, ...]
    """ns of one neighbour's send by network tier."""
    times: dict[str, Floats]

    def of(self, rows: slice) -> Primitives:
        """The primitives of some layouts."""
        a, d = self.task.accounting, self.task.hardware.device
        x = LayoutArray(**{f.name: getattr(self.layouts, f.name)[rows] for f in fields(LayoutArray)})
        share = self.share[rows]
        boundary = self.boundary.take(share)
        many = x.pp > 1
        buffers = np.where(a.receive_all_microbatches, x.microbatches, a.receive_count)
        outside = ceil(d.context.base + d.communicator.base * memory.communicators(x))
        waiting = np.where(x.schedule == GPIPE, x.microbatches - 1, 0) * self.waiting.take(share)
        return Primitives(
            **{k: v.take(share) for k, v in self.columns.items()},
            p2p=self._p2p(x, share),
            constant=np.full(len(x), int(a.step_seconds * 1e9), dtype=np.int64),
            waiting=waiting + np.where(many, self.output.take(share), 0),
            boundary=np.where(many & a.keeps_stage_output, boundary, 0),
            receive=np.where(many, boundary * buffers, 0),
            chunks=x.virtual_stages,
            capacity=np.floor((self.task.limit - outside) / a.reserved_ratio).astype(np.int64),
            outside=outside,
        )

    def _p2p(self, x: LayoutArray, share: Ints) -> Ints:
        """Exposed neighbour traffic of one micro-batch: both directions through each of the v chunks."""
        span = x.tp * x.cp * x.dp * x.pp
        exposed = [self.task.accounting.pp_exposed.get(name, 1.0) for name in SCHEDULES]
        once = self.hops[0].take(share)
        for tier, hop in zip(self.task.hardware.network, self.hops[1:], strict=False):
            once = np.where(span > (tier.size or np.inf), hop.take(share), once)
        both = ceil(2.0 * np.array(exposed)[x.schedule] * once)
        return np.where(x.pp > 1, x.virtual_stages * both, 0)

    def parts(self) -> TimeParts:
        """The float times behind the primitives, for each layout."""
        t = {k: v[self.share] for k, v in self.times.items()}
        again = (t.pop("recompute_tp1"), t.pop("recompute_tp2"))
        return TimeParts(**t, recompute_tp=again)


def primitive_table(task: Task, layouts: LayoutArray) -> PrimitiveTable:
    """Price the distinct combinations among layouts."""
    shared, share = _combinations(layouts, ("tp", "cp", "micro_batch", "sequence_parallel", "dp", "zero"), accumulate=True)
    block, spread = _combinations(shared, ("tp", "cp", "micro_batch", "sequence_parallel"))
    seconds = operators.layer_seconds(task, block)
    compute = _compute(task, shared, seconds, spread)
    traffic = _dp_traffic(task, shared, compute)
    states = _states(task, shared)
    acts = memory.activation_bytes(task, block)
    blocks = {
        "embedding": _ns(seconds.embedding), "head": _ns(seconds.head + seconds.head_tp),
        "recompute1": _ns(seconds.recompute[0] + seconds.tp_recompute[0]),
        "recompute2": _ns(seconds.recompute[1] + seconds.tp_recompute[1]),
        "act0": acts.layer[0], "act1": acts.layer[1], "act2": acts.layer[2],
    }  # fmt: skip
    columns = {k: v[spread] for k, v in blocks.items()} | _layer_ns(seconds, compute, traffic, spread) | traffic.ns | states
    columns["transient"] = acts.backward[spread] + columns.pop("unit")
    columns["head_transient"] = acts.head[spread] + columns.pop("head_unit")
    times = {
        "compute": compute[0] + compute[1],
        "tp": (seconds.tp_forward + seconds.tp_backward)[spread],
        "cp": (seconds.cp_forward + seconds.cp_backward)[spread],
        "zero": traffic.forward + traffic.backward,
        "head_tp": seconds.head_tp[spread],
        "recompute_tp1": seconds.tp_recompute[0][spread],
        "recompute_tp2": seconds.tp_recompute[1][spread],
    }
    boundary = acts.boundary[spread]
    hops = tuple(_ns(seconds) for seconds in neighbour_seconds(boundary.astype(float), task.hardware))
    return PrimitiveTable(
        task, layouts, share, columns, boundary, acts.waiting[spread], acts.output[spread], hops, times
    )  # fmt: skip


def even_step_cost(task: Task, layouts: LayoutArray, recompute: int) -> StepCost:
    """Time and memory of layouts with an even split and one recompute mode (0 none, 1 selective, 2 full) for all layers.

    Priced in pieces that stay inside the processor's caches.
    """
    table, piece = primitive_table(task, layouts), 4096
    done = []
    for start in range(0, len(layouts), piece):
        rows = slice(start, min(start + piece, len(layouts)))
        part = LayoutArray(**{f.name: getattr(layouts, f.name)[rows] for f in fields(LayoutArray)})
        done.append(step_cost(table.of(rows), part, even_runs(part, task.model.n_layers, recompute)))
    joined = [np.concatenate([getattr(d, f.name) for d in done]) for f in fields(StepCost)]
    return StepCost(*joined)


def _ns(seconds: Floats) -> Ints:
    return ceil(seconds * 1e9)


def _combinations(layouts: LayoutArray, names: tuple[str, ...], accumulate: bool = False) -> tuple[LayoutArray, Ints]:
    """Distinct combinations of some columns as layouts, and which of them each layout has."""
    key = np.zeros(len(layouts), dtype=np.int64)
    for name in names:
        column = getattr(layouts, name)
        key = key * (int(column.max(initial=0)) + 1) + column
    if accumulate:
        key = (key * 2 + (layouts.microbatches > 1)) * 2 + (layouts.pp == 1)
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    return layouts.take(first), inverse.ravel()


# ---- data-parallel traffic -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _DpTraffic:
    forward: Floats
    """Exposed seconds of a layer's per-micro-batch traffic under forward."""
    backward: Floats
    ns: dict[str, Ints]
    """Step-wise primitives."""


def _compute(task: Task, layouts: LayoutArray, seconds: operators.LayerSeconds, to_block: Ints) -> tuple[Floats, Floats]:
    """(forward, backward) compute of one layer with the host's floor, which grows where every micro-batch gathers."""
    a = task.accounting
    gathering = [z for z, rule in a.zero.items() if any(t.op == "all_gather" and t.per == "microbatch" for t in rule.traffic)]
    gathers = np.isin(layouts.zero, gathering)
    result = []
    for i, (device, host, tp, cp) in enumerate((
        (seconds.forward, seconds.host_forward, seconds.tp_forward, seconds.cp_forward),
        (seconds.backward, seconds.host_backward, seconds.tp_backward, seconds.cp_backward),
    )):  # fmt: skip
        more = np.where(gathers, a.kernels_gather[i] * task.hardware.device.launch.base, 0.0)
        result.append(operators.bound_by_host(task, device[to_block], (tp + cp)[to_block], host[to_block] + more))
    return result[0], result[1]


def _dp_traffic(task: Task, layouts: LayoutArray, compute: tuple[Floats, Floats]) -> _DpTraffic:
    """Traffic over the D ranks that share parameters: what each micro-batch exposes, and what a step does once."""
    a, slow = task.accounting, task.hardware.overlap_slowdown.base
    params = memory.rank_params(task, layouts)
    size = len(layouts)
    step = {place: np.zeros(size) for place in ("layer", "first", "last")}
    each = {"forward": np.zeros(size), "backward": np.zeros(size)}
    for zero, rule in a.zero.items():
        rows = np.nonzero(layouts.zero == zero)[0]
        for item in rule.traffic:
            n_bytes = a.size(item.size, task.job.compute_bytes)
            cost = {
                place: collective_seconds(
                    item.op,
                    layouts.shard[rows].astype(float),
                    layouts.tp[rows].astype(float),
                    n_bytes * count[rows],
                    task.hardware,
                )
                for place, count in _places(params).items()
            }
            if item.per == "microbatch":
                each[item.under][rows] += cost["layer"]
            else:
                for place in step:
                    step[place][rows] += cost[place]
    forward, backward = compute
    exposed = [overlapped(c, each[k], slow, a.dp_floor) for k, c in (("forward", forward), ("backward", backward))]
    own = {place: _places(params)[place] for place in step}
    update = {
        place: streaming_seconds(
            a.optimizer_bytes * count / np.where(layouts.zero > 0, layouts.shard, 1) + a.optimizer_whole_bytes * count,
            task.hardware.device,
        )
        for place, count in own.items()
    }
    suffix = {"layer": "", "first": "_first", "last": "_last"}
    ns = {f"comm{suffix[p]}": _ns(step[p]) for p in step}
    ns |= {f"floor{suffix[p]}": _ns(a.dp_floor * step[p]) for p in step}
    ns |= {f"update{suffix[p]}": _ns(update[p]) for p in step}
    ns["hide"] = np.floor(a.dp_window * (forward + backward) * 1e9).astype(np.int64)
    return _DpTraffic(exposed[0], exposed[1], ns)


def _places(params: dict[str, Floats]) -> dict[str, Floats]:
    """Parameters by place: of a layer, of the first rank's extras, of the last rank's."""
    return {"layer": params["layer"], "first": params["embedding"], "last": params["own_head"] + params["norm"]}


def _layer_ns(
    seconds: operators.LayerSeconds, compute: tuple[Floats, Floats], traffic: _DpTraffic, to_block: Ints
) -> dict[str, Ints]:
    forward = (seconds.tp_forward + seconds.cp_forward)[to_block]
    backward = (seconds.tp_backward + seconds.cp_backward)[to_block]
    return {
        "forward": _ns(compute[0] + forward + traffic.forward),
        "backward": _ns(compute[1] + backward + traffic.backward),
    }


# ---- states ------------------------------------------------------------------------------------------------------


def _states(task: Task, layouts: LayoutArray) -> dict[str, Ints]:
    """Bytes of parameters, gradients and optimizer states of a layer and of the first and last rank's extras."""
    a, params = task.accounting, memory.rank_params(task, layouts)
    per = memory.state_bytes(task, layouts.zero, layouts.shard, layouts.microbatches)
    backward = sum(per.backward.values(), np.zeros(len(layouts)))
    update = sum(per.update.values(), np.zeros(len(layouts)))
    place = _places(params)
    result = {}
    for name, suffix in (("layer", ""), ("first", "_first"), ("last", "_last")):
        result[f"state{suffix}"] = ceil(backward * place[name])
        result[f"updating{suffix}"] = ceil(update * place[name])
    beside_head = ceil(per.resident * params["head"])
    result["state_last"] += beside_head
    result["updating_last"] += beside_head
    rest = task.model.embedding_params - task.model.embedding_params / layouts.tp
    rest = rest if a.embedding_gradient_whole else np.zeros(len(layouts))
    result["state_first"] += ceil(per.whole_gradients * rest)
    return result | {
        "fixed": ceil(per.resident * params["layer"] + task.hardware.device.workspace.base),
        "unit": ceil(per.unit * params["layer"]),
        "reduction": ceil(per.unit_reduction * params["layer"]),
        "head_unit": ceil(per.head * params["head"]),
        "head_reduction": ceil(per.head_reduction * params["head"]),
        "last_reduction": ceil(per.last_reduction * params["layer"]),
        "last_layer": ceil(per.last_unit * params["layer"]),
        "last_embedding": ceil(per.last_unit * params["embedding"] + task.job.compute_bytes * rest),
        "carried": ceil(per.carried * params["layer"]),
        "carried_first": ceil(per.carried * params["embedding"]),
    }


# ---- stages ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageCost:
    """Time and memory of pipeline ranks; int64 arrays over the entries of a StageArray."""

    time: Ints
    """R, ns for one micro-batch."""
    once: Ints
    """d, ns once a step."""
    backward_bytes: Ints
    """Allocated while micro-batches run."""
    update_bytes: Ints
    """Allocated while the optimizer runs."""

    @property
    def allocated(self) -> Ints:
        """Peak allocated bytes."""
        return np.maximum(self.backward_bytes, self.update_bytes)


def stage_time(p: Primitives, first: Ints, last: Ints, layers: Ints, selective: Ints, full: Ints) -> Ints:
    """R of ranks, ns; every argument broadcasts against the fields of `p`.

    With chunks, ranks wait for each other chunk by chunk: R is v times the slowest chunk. The first chunks hold the extra
    layers, the first one of the first rank the embedding, the last one of the last rank the head.
    """
    whole = stage_linear_time(p, first, last, layers, selective, full)
    if not np.any(p.chunks > 1):
        return whole
    low = layers // p.chunks
    high = -(-layers // p.chunks)
    layer = p.forward + p.backward + np.where(selective > 0, p.recompute1, 0) + np.where(full > 0, p.recompute2, 0)
    chunk = np.maximum(high * layer + first * p.embedding, low * layer + last * p.head)
    return np.where(p.chunks > 1, p.chunks * chunk + p.p2p, whole)


def stage_linear_time(p: Primitives, first: Ints, last: Ints, layers: Ints, selective: Ints, full: Ints) -> Ints:
    """Time of all that a rank computes for one micro-batch, ns: R without chunks, a lower bound of it with them."""
    return (
        layers * (p.forward + p.backward) + selective * p.recompute1 + full * p.recompute2
        + first * p.embedding + last * p.head + p.p2p
    )  # fmt: skip


def stage_once(p: Primitives, first: Ints, last: Ints, layers: Ints) -> Ints:
    """d of ranks, ns: exposed step-wise traffic and the optimizer."""
    traffic = layers * (p.comm - p.hide) + first * p.comm_first + last * p.comm_last
    floor = layers * p.floor + first * p.floor_first + last * p.floor_last
    return np.maximum(traffic, floor) + layers * p.update + first * p.update_first + last * p.update_last


def stage_base_bytes(p: Primitives, first: Ints, last: Ints, flight: Ints) -> Ints:
    """Bytes of a rank that do not depend on its layers, while micro-batches run."""
    extras = first * p.state_first + last * p.state_last
    sends = np.where(p.chunks > 1, 1, 1 - last)  # with chunks the last rank passes on all but its last one
    return extras + sends * flight * p.boundary + receive_bytes(p, first, last) + p.fixed + last * p.waiting


def receive_bytes(p: Primitives, first: Ints, last: Ints) -> Ints:
    """Receive buffers of a rank: activations into all but the model's first stage, gradients into all but its last."""
    return (2 * p.chunks - first - last) * p.receive


def stage_transient(p: Primitives, first: Ints, last: Ints, mode: int) -> Ints:
    """Peak temporaries of a rank whose strongest recompute mode is `mode` (0 none, 1 selective, 2 full).

    The largest of: the first unit's backward (the head's on the last rank, a layer's elsewhere) beside what the micro-batch
    before left to be reduced; on the last rank a layer's beside the head's reduction; and a layer's beside the reduction of
    the one before, whose saved activations are gone.
    """
    act = (p.act0, p.act1, p.act2)[mode]
    layer = p.transient + p.act0 - act
    carried = np.where(first == 1, p.carried_first, p.carried)
    begins = np.where(last == 1, np.maximum(p.head_transient + carried, layer + p.head_reduction), layer + carried)
    return np.maximum(begins, layer + np.maximum(p.reduction - act, 0))


def stage_update_bytes(p: Primitives, first: Ints, last: Ints, layers: Ints) -> Ints:
    """Bytes of a rank when backward ends and while the optimizer runs."""
    transient = p.last_reduction + np.where(first == 1, p.last_embedding, p.last_layer)
    extras = first * p.updating_first + last * p.updating_last
    return layers * p.updating + extras + transient + receive_bytes(p, first, last) + p.fixed


def stage_cost(p: Primitives, layouts: LayoutArray, stages: StageArray) -> StageCost:
    """Time and memory of each rank; `p` and `layouts` are per layout, `stages` flattened."""
    q, x = p.take(stages.row), layouts.take(stages.row)
    first = (stages.index == 0).astype(np.int64)
    last = (stages.index + stages.count == x.pp).astype(np.int64)
    n, n1, n2 = stages.layers, stages.selective, stages.full
    place = (x.schedule, x.pp, x.virtual_stages, x.microbatches, stages.index)
    flight, weight = in_flight(*place), in_flight_layers(*place, n)
    # With chunks a rank is recomputed as a whole or not at all, so its saved layers weigh all or nothing.
    whole = x.virtual_stages > 1
    weight1 = np.where(whole, np.where(n1 > 0, weight, 0), flight * n1)
    weight2 = np.where(whole, np.where(n2 > 0, weight, 0), flight * n2)
    saved = weight * q.act0 - weight1 * (q.act0 - q.act1) - weight2 * (q.act0 - q.act2)
    transient = np.where(
        n2 > 0,
        stage_transient(q, first, last, 2),
        np.where(n1 > 0, stage_transient(q, first, last, 1), stage_transient(q, first, last, 0)),
    )
    return StageCost(
        stage_time(q, first, last, n, n1, n2),
        stage_once(q, first, last, n),
        n * q.state + stage_base_bytes(q, first, last, flight) + saved + transient,
        stage_update_bytes(q, first, last, n),
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


def combine(p: Primitives, layouts: LayoutArray, slowest: Ints, total: Ints, once: Ints) -> Ints:
    """T from max R, sum R and max d, ns."""
    v = layouts.virtual_stages
    pipeline = (v * layouts.microbatches - 1) * slowest + total
    return -(-(pipeline + v * once) // v) + p.constant


def step_cost(p: Primitives, layouts: LayoutArray, stages: StageArray) -> StepCost:
    """Time and peak memory of each layout. Every layout must have at least one stage entry."""
    cost = stage_cost(p, layouts, stages)
    size = len(layouts)
    order = np.argsort(stages.row, kind="stable") if np.any(np.diff(stages.row) < 0) else slice(None)
    row = stages.row[order]
    starts = np.searchsorted(row, np.arange(size))

    def worst(values: Ints) -> Ints:
        return np.maximum.reduceat(values[order], starts)

    total = np.add.reduceat((cost.time * stages.count)[order], starts)
    allocated = worst(cost.allocated)
    step = combine(p, layouts, worst(cost.time), total, worst(cost.once))
    return StepCost(step, allocated, allocated - p.capacity)
