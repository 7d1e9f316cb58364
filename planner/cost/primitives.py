"""The integers of the cost model: what one layer, the ends of the pipeline and the states cost, for each layout.

Every primitive is rounded up to whole nanoseconds and bytes; `step` puts them together. Nearly all depend on a few
columns only, so they are computed for the distinct combinations and spread over the layouts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

from planner.cost import adapters, frozen, memory, operators, risk
from planner.cost.accounting import Traffic
from planner.cost.collectives import collective_seconds, neighbour_seconds
from planner.cost.compute import overlapped, streaming_seconds
from planner.cost.memory import ceil
from planner.cost.task import GPIPE, Bools, Floats, Ints, LayoutArray, Task
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
    """What the allocator may hold: the limit less what lies outside, over the reserved ratio; less where the risk of running
    out of memory is limited."""
    outside: Ints
    """Driver context and communicators."""

    def take(self, rows: Ints | Bools) -> Primitives:
        """The primitives at `rows`."""
        if rows.dtype == bool:
            rows = np.nonzero(rows)[0]
        return type(self)(**{f.name: getattr(self, f.name).take(rows, axis=0) for f in fields(self)})

    def saved(self, mode: int) -> Ints:
        """Saved activations of one layer and micro-batch under a recompute mode (0 none, 1 selective, 2 full)."""
        return (self.act0, self.act1, self.act2)[mode]

    def again(self, mode: int) -> Ints:
        """Extra time of one layer under a recompute mode."""
        return (np.zeros_like(self.recompute1), self.recompute1, self.recompute2)[mode]

    def remade(self, mode: int) -> Ints:
        """Activations that the backward of one layer makes again."""
        return self.act0 - self.saved(mode)

    def reduction_rest(self, mode: int) -> Ints:
        """Reduction buffers beyond the saved activations that their layer has freed."""
        return np.maximum(self.reduction - self.saved(mode), 0)


@dataclass(frozen=True)
class Blend(Primitives):
    """Primitives of ranks that mix kinds of layers (`blending.blend`): means, and of what lives at a peak the largest."""

    remade_by_mode: tuple[Ints, Ints, Ints]
    rest_by_mode: tuple[Ints, Ints, Ints]

    def take(self, rows: Ints | Bools) -> Blend:
        """The primitives at `rows`."""
        whole = {f.name: getattr(self, f.name).take(rows, axis=0) for f in fields(Primitives)}
        pick = [tuple(a.take(rows, axis=0) for a in group) for group in (self.remade_by_mode, self.rest_by_mode)]
        return Blend(**whole, remade_by_mode=pick[0], rest_by_mode=pick[1])  # type: ignore[arg-type]

    def remade(self, mode: int) -> Ints:
        """Activations that the backward of the layer of the largest kind makes again."""
        return self.remade_by_mode[mode]

    def reduction_rest(self, mode: int) -> Ints:
        """The same rest of the largest kind."""
        return self.rest_by_mode[mode]


@dataclass(frozen=True)
class TimeParts:
    """Float seconds behind `Primitives.forward` and its like, for the breakdown. Arrays over layouts."""

    compute: Floats
    tp: Floats
    cp: Floats
    ep: Floats
    zero: Floats
    """Exposed gathers and reductions of every micro-batch."""
    head_tp: Floats
    recompute_tp: tuple[Floats, Floats]


def price(task: Task, layouts: LayoutArray) -> Primitives:
    """The integers of each layout."""
    return primitive_table(task, layouts).of(slice(None))


def price_with_parts(task: Task, layouts: LayoutArray) -> tuple[Primitives, TimeParts]:
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
    window: Ints
    """ns of step-wise traffic that one layer's compute hides without chunks."""
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
        held = d.context.base + d.communicator.base * memory.communicators(x) + a.outside_bytes
        outside = ceil(self.task.constant("outside") * held)
        waiting = np.where(x.schedule == GPIPE, x.microbatches - 1, 0) * self.waiting.take(share)
        return Primitives(
            **{k: v.take(share) for k, v in self.columns.items()},
            p2p=self._p2p(x, share),
            hide=self._hide(x, share),
            constant=np.full(len(x), int(a.step_seconds * self.task.growth * 1e9), dtype=np.int64),
            waiting=waiting + np.where(many, self.output.take(share), 0),
            boundary=np.where(many & a.keeps_stage_output, ceil(a.boundary_copies * boundary), 0),
            receive=np.where(many, boundary * buffers, 0),
            chunks=x.virtual_stages,
            capacity=capacity(self.task, outside),
            outside=outside,
        )

    def _hide(self, x: LayoutArray, share: Ints) -> Ints:
        """Step-wise traffic that one layer's compute hides.

        A share of one micro-batch's compute: gradients are reduced beside the last backward. With chunks a chunk's
        gradients are ready while pp micro-batches still pass back through each of the others.
        """
        window = self.window.take(share)
        v, others = x.virtual_stages, np.minimum(x.microbatches, x.pp)
        return np.where(v > 1, np.maximum(window, window * others * (v - 1) // v), window)

    def _p2p(self, x: LayoutArray, share: Ints) -> Ints:
        """Exposed neighbour traffic of one micro-batch: both directions through each of the v chunks."""
        span = x.span
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


_BLOCK = ("tp", "cp", "ep", "etp", "micro_batch", "sequence_parallel")
"""What a layer's operators depend on."""
_OUTER = (*_BLOCK, "dp", "zero", "offload", "apart")
"""What everything but the pipeline's own terms depends on."""


def capacity(task: Task, outside: Ints) -> Ints:
    """Bytes that may be allocated beside `outside`: what both limits, of memory and of the risk to run out, leave.

    With several device types their axis is the last one.
    """
    if task.types:
        return np.stack([capacity(task.on(i), outside[..., i]) for i in range(len(task.types))], axis=-1)
    filled = np.floor((task.limit - outside) / task.reserved_ratio).astype(np.int64)
    allowed = risk.allocated_limit(task)
    return filled if allowed is None else np.minimum(filled, allowed)


def primitive_table(task: Task, layouts: LayoutArray) -> PrimitiveTable:
    """Price the distinct combinations among layouts. Raises TypeError for several device types: `devicetypes` prices each."""
    if task.types:
        raise TypeError("a layout on several device types has no primitives of its own: see cost.devicetypes")
    shared, share = _combinations(layouts, _OUTER, accumulate=True)
    block, spread = _combinations(shared, _BLOCK)
    seconds = operators.layer_seconds(task, block)

    def ns(value: Floats) -> Ints:
        return _ns(value * task.growth)

    compute = layer_compute(task, shared, seconds, spread)
    traffic = dp_traffic(task, shared, compute)
    states = _states(task, shared)
    acts = memory.activation_bytes(task, block)
    blocks = {
        "embedding": ns(seconds.embedding), "head": ns(seconds.head + seconds.head_tp),
        "act0": acts.layer[0], "act1": acts.layer[1], "act2": acts.layer[2],
    }  # fmt: skip
    layer = _layer_ns(task, seconds, compute, traffic, spread)
    again = [seconds.recompute[i] + seconds.tp_recompute[i] + seconds.ep_recompute[i] for i in range(2)]
    repeated = {f"recompute{i + 1}": ns(recompute_seconds(task, again[i][spread], compute[1], traffic)) for i in range(2)}
    columns = repeated | {k: v[spread] for k, v in blocks.items()} | layer | traffic.ns | states
    columns["transient"] = acts.backward[spread] + columns.pop("unit")
    columns["head_transient"] = acts.head[spread] + columns.pop("head_unit")
    _add_modules(task, columns, ns(operators.module_seconds(task, operators.shapes_of(task, block).tokens))[spread])
    times = {
        "compute": compute[0] + compute[1],
        "tp": (seconds.tp_forward + seconds.tp_backward)[spread],
        "cp": (seconds.cp_forward + seconds.cp_backward)[spread],
        "ep": (seconds.ep_forward + seconds.ep_backward)[spread],
        "zero": traffic.forward + traffic.backward,
        "head_tp": seconds.head_tp[spread],
        "recompute_tp1": seconds.tp_recompute[0][spread],
        "recompute_tp2": seconds.tp_recompute[1][spread],
    }
    times = {k: v * task.growth for k, v in times.items()}
    boundary = acts.boundary[spread]
    hops = tuple(ns(seconds) for seconds in hop_seconds(task, sent_bytes(task, shared, boundary)))
    return PrimitiveTable(
        task, layouts, share, columns, columns.pop("hide"), boundary, acts.waiting[spread], acts.output[spread], hops, times
    )  # fmt: skip


def _add_modules(task: Task, columns: dict[str, Ints], projection: Ints) -> None:
    """Multi-token prediction modules on the last rank: a layer and the head once more for each, logits kept together."""
    n = task.model.mtp
    if not n:
        return
    columns["head"] = columns["head"] + n * (columns["head"] + columns["forward"] + columns["backward"] + projection)
    for name in ("comm", "floor", "update", "state", "updating"):
        columns[f"{name}_last"] = columns[f"{name}_last"] + n * columns[name]
    columns["head_transient"] = columns["head_transient"] * (1 + n) + n * columns["act0"]


def sent_bytes(task: Task, layouts: LayoutArray, boundary: Ints) -> Floats:
    """What one device sends of the tensor of `boundary` bytes between two stages."""
    return np.where(task.accounting.pp_split & (layouts.sequence_parallel == 0), boundary / layouts.tp, boundary)


def hop_seconds(task: Task, sent: Floats) -> tuple[Floats, ...]:
    """Time of one send to the next stage over each tier, before the growth of the cluster."""
    return tuple(task.constant("pp") * (t + task.accounting.pp_slot) for t in neighbour_seconds(sent, task.hardware))


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
class DpTraffic:
    """Traffic over the ranks that share parameters; arrays over layouts."""

    forward: Floats
    """Exposed seconds of a layer's per-micro-batch traffic under forward."""
    backward: Floats
    behind: Floats
    """Seconds of a layer's per-micro-batch traffic beside backward, hidden or not."""
    ns: dict[str, Ints]
    """Step-wise primitives."""


def layer_compute(task: Task, layouts: LayoutArray, seconds: operators.LayerSeconds, to_block: Ints) -> tuple[Floats, Floats]:
    """(forward, backward) compute of one layer with the host's floor, which grows where every micro-batch gathers."""
    result = []
    for i, (device, host, tp, cp) in enumerate((
        (seconds.forward, seconds.host_forward, seconds.tp_forward, seconds.cp_forward),
        (seconds.backward, seconds.host_backward, seconds.tp_backward, seconds.cp_backward),
    )):  # fmt: skip
        more = gather_host(task, layouts.zero, i)
        result.append(operators.bound_by_host(task, device[to_block], (tp + cp)[to_block], host[to_block] + more))
    return result[0], result[1]


def gather_host(task: Task, zero: Ints, direction: int) -> Floats:
    """Host time of one layer, forward (0) or backward (1), for the gathers of every micro-batch at a ZeRO stage."""
    a = task.accounting
    gathering = [z for z, rule in a.zero.items() if any(t.op == "all_gather" and t.per == "microbatch" for t in rule.traffic)]
    seconds = a.kernels_gather[direction] * task.hardware.device.launch.base * task.constant("host")
    return np.where(np.isin(zero, gathering), seconds, 0.0)


def dp_traffic(task: Task, layouts: LayoutArray, compute: tuple[Floats, Floats]) -> DpTraffic:
    """Traffic over the D ranks that share parameters: what each micro-batch exposes, and what a step does once."""
    a, slow = task.accounting, task.hardware.overlap_slowdown.base
    params = frozen.trained_params(task, layouts)
    size = len(layouts)
    step = {place: np.zeros(size) for place in ("layer", "first", "last")}
    bare = {place: np.zeros(size) for place in step}
    each = {"forward": np.zeros(size), "backward": np.zeros(size)}
    for source in frozen.sources(task, layouts):
        for item, rows, cost in _traffic_seconds(source, layouts):
            if item.per == "microbatch":
                each[item.under][rows] += cost["layer"]
            else:
                for place in step:
                    (bare if item.under == "nothing" else step)[place][rows] += cost[place]
    forward, backward = compute
    exposed = [overlapped(c, each[k], slow, a.dp_floor) for k, c in (("forward", forward), ("backward", backward))]
    sharded = layouts.zero > 0

    def optimizer(count: Floats, shard: Ints) -> Floats:
        owned = count / np.where(sharded, shard, 1)
        whole = streaming_seconds(a.optimizer_whole_bytes * count, task.hardware.device)
        own = streaming_seconds(a.optimizer_bytes * owned, task.hardware.device)
        return whole + np.where(layouts.offload == 1, host_update_seconds(task, owned), own)

    update = {place: optimizer(count, layouts.shard) for place, count in params_by_place(params).items()}
    update["layer"] = update["layer"] + optimizer(params["experts"], layouts.expert_shard)
    suffix = {"layer": "", "first": "_first", "last": "_last"}
    grow = task.growth
    ns = {f"comm{suffix[p]}": _ns(grow * (step[p] + bare[p])) for p in step}
    ns |= {f"floor{suffix[p]}": _ns(grow * (a.dp_floor * step[p] + bare[p])) for p in step}
    ns |= {f"update{suffix[p]}": _ns(grow * update[p]) for p in step}
    ns["hide"] = np.floor(grow * a.dp_window * (forward + backward) * 1e9).astype(np.int64)
    return DpTraffic(exposed[0], exposed[1], each["backward"], ns)


HOST_BANDWIDTH = 50e9
"""Bytes/s of host memory for each device: assumed, 65 % of two sockets of DDR5-4800 (614 GB/s) over eight devices."""


def host_update_seconds(task: Task, owned: Floats) -> Floats:
    """Time of an update in host memory: fp32 gradients down, Adam there, new parameters up; none of it overlapped.

    ZeRO-Offload (arXiv 2101.06840, section 4); Adam reads four and writes three fp32 values a parameter.
    """
    moved = (4.0 + task.job.compute_bytes) * owned
    return moved / task.hardware.device.host_link.base + 28.0 * owned / HOST_BANDWIDTH


def _traffic_seconds(source: frozen.Source, layouts: LayoutArray) -> Iterator[tuple[Traffic, Ints, dict[str, Floats]]]:
    """(collective, layouts that have it, its seconds by place) of the parameters under one rule, experts with their layer."""
    task = source.task
    for zero, rule in task.accounting.zero.items():
        rows = np.nonzero(layouts.zero == zero)[0]
        x = layouts.take(rows)
        for item in rule.traffic if len(rows) else ():
            n_bytes = task.accounting.size(item.size, task.job.compute_bytes)
            groups = {place: (x.shard, x.tp * x.apart, count[rows]) for place, count in params_by_place(source.counts).items()}
            groups["experts"] = (x.expert_shard, x.ep * x.etp * x.apart, source.counts["experts"][rows])
            cost = {
                place: task.constant("dp")
                * collective_seconds(item.op, n.astype(float), stride.astype(float), n_bytes * count, task.hardware)
                for place, (n, stride, count) in groups.items()
            }
            cost["layer"] = cost["layer"] + cost.pop("experts")
            yield item, rows, cost


def params_by_place(params: dict[str, Floats]) -> dict[str, Floats]:
    """Parameters by place: of a layer, of the first rank's extras, of the last rank's."""
    return {
        "layer": params["layer"],
        "first": params["embedding"],
        "last": params["own_head"] + params["norm"] + params["modules"],
    }


def recompute_seconds(task: Task, again: Floats, backward: Floats, traffic: DpTraffic) -> Floats:
    """Seconds that recomputing a layer adds: what it takes, less the traffic that hides under it and would be exposed."""
    slow, floor = task.hardware.overlap_slowdown.base, task.accounting.dp_floor
    return again + overlapped(backward + again, traffic.behind, slow, floor) - traffic.backward


def _layer_ns(
    task: Task, seconds: operators.LayerSeconds, compute: tuple[Floats, Floats], traffic: DpTraffic, to_block: Ints
) -> dict[str, Ints]:
    forward = (seconds.tp_forward + seconds.cp_forward + seconds.ep_forward)[to_block]
    backward = (seconds.tp_backward + seconds.cp_backward + seconds.ep_backward)[to_block]
    return {
        "forward": _ns(task.growth * (compute[0] + forward + traffic.forward)),
        "backward": _ns(task.growth * (compute[1] + backward + traffic.backward)),
    }


# ---- states ------------------------------------------------------------------------------------------------------


def _states(task: Task, layouts: LayoutArray) -> dict[str, Ints]:
    """Bytes of parameters, gradients and optimizer states of a layer and of the first and last rank's extras."""
    params = frozen.trained_params(task, layouts)
    per = memory.state_bytes(task, layouts, layouts.shard)
    routed = memory.state_bytes(task, layouts, layouts.expert_shard)
    zeros = np.zeros(len(layouts))
    backward, update = sum(per.backward.values(), zeros), sum(per.update.values(), zeros)
    place, experts = params_by_place(params), params["experts"]
    more = {"state": sum(routed.backward.values(), zeros) * experts, "updating": sum(routed.update.values(), zeros) * experts}
    result = {}
    for name, suffix in (("layer", ""), ("first", "_first"), ("last", "_last")):
        result[f"state{suffix}"] = ceil(backward * place[name] + (0 if suffix else more["state"]))
        result[f"updating{suffix}"] = ceil(update * place[name] + (0 if suffix else more["updating"]))
    beside_head = ceil(per.resident * params["head"])
    result["state_last"] += beside_head
    result["updating_last"] += beside_head
    rest = embedding_rest(task, layouts)
    result["state_first"] += ceil(per.whole_gradients * rest)
    result |= {
        # Weight-gradient buffers exist once for each shape: one expert stands for all.
        "fixed": ceil(per.resident * (params["layer"] + params["expert"]) + task.hardware.device.workspace.base),
        "unit": ceil(per.unit * params["layer"] + routed.unit * experts),
        "reduction": ceil(per.unit_reduction * params["layer"] + routed.unit_reduction * experts),
        "head_unit": ceil(per.head * params["head"]),
        "head_reduction": ceil(per.head_reduction * params["head"]),
        "last_reduction": ceil(per.last_reduction * params["layer"] + routed.last_reduction * experts),
        "last_layer": ceil(per.last_unit * params["layer"] + routed.last_unit * experts),
        "last_embedding": ceil(per.last_unit * params["embedding"] + task.job.compute_bytes * rest),
        "carried": ceil(per.carried * params["layer"] + routed.carried * experts),
        "carried_first": ceil(per.carried * params["embedding"]),
    }
    for source in frozen.sources(task, layouts)[1:]:
        for name, n_bytes in _frozen_states(source, layouts).items():
            result[name] = result[name] + n_bytes
    return result


def _frozen_states(source: frozen.Source, layouts: LayoutArray) -> dict[str, Ints]:
    """Bytes of frozen weights, beside those of the trained ones: the same while micro-batches and while the optimizer run."""
    task, counts, place = source.task, source.counts, params_by_place(source.counts)
    per = memory.state_bytes(task, layouts, layouts.shard)
    routed = memory.state_bytes(task, layouts, layouts.expert_shard)
    held, held_routed = per.backward["params"], routed.backward["params"]
    layer, first, last = (
        ceil(held * place["layer"] + held_routed * counts["experts"]),
        held * place["first"],
        held * place["last"],
    )
    gathered = per.unit * counts["layer"] + routed.unit * counts["experts"]
    return {
        "state": layer, "updating": layer,
        "state_first": ceil(first), "updating_first": ceil(first),
        "state_last": ceil(last), "updating_last": ceil(last),
        "unit": ceil(gathered + adapters.dequantised_bytes(task, layouts)),
        "head_unit": ceil(per.head * counts["head"]),
    }  # fmt: skip


def embedding_rest(task: Task, layouts: LayoutArray) -> Floats:
    """Parameters of the embedding on other ranks of the tp group, where its gradient is made whole before it is split."""
    rest, adapter = task.model.embedding_params - task.model.embedding_params / layouts.tp, task.job.adapter
    whole = task.accounting.embedding_gradient_whole and (adapter is None or adapter.train_embeddings)
    return rest if whole else np.zeros(len(layouts))
