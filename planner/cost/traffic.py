"""Traffic over the ranks that share parameters: what every micro-batch exposes, what a step does once, what compute hides.

The optimizer's update is here too: the ranks that share parameters share it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from planner.cost import frozen, memory, operators
from planner.cost.accounting import BY_ENGINES, Accounting, Traffic
from planner.cost.collectives import collective_seconds
from planner.cost.compute import overlapped, streaming_seconds
from planner.cost.rounding import nanoseconds
from planner.cost.states import params_by_place
from planner.cost.task import Floats, Ints, LayoutArray, Task, splits_backward


@dataclass(frozen=True)
class DpTraffic:
    """Traffic over the ranks that share parameters; arrays over layouts."""

    forward: Floats
    """Exposed seconds of a layer's per-micro-batch traffic under forward."""
    backward: Floats
    behind: Floats
    """Seconds of a layer's per-micro-batch traffic beside backward, hidden or not."""
    idle: Floats
    """Seconds of backward in which other exchanges run and leave this traffic's network free."""
    ends: dict[str, Floats]
    """Exposed seconds of the embedding's (`first`) and the head's (`last`) per-micro-batch traffic."""
    ns: dict[str, Ints]
    """Step-wise primitives."""


def layer_compute(task: Task, layouts: LayoutArray, seconds: operators.LayerSeconds, to_block: Ints) -> tuple[Floats, Floats]:
    """(forward, backward) compute of one layer with the host's floor, which grows where every micro-batch gathers."""
    result = []
    for i, (device, host, tp, cp) in enumerate((
        (seconds.forward, seconds.host_forward, seconds.tp_forward, seconds.cp_forward),
        (seconds.backward, seconds.host_backward, seconds.tp_backward, seconds.cp_backward),
    )):  # fmt: skip
        more = gather_host(task, memory.rule_of(task, layouts), i)
        result.append(operators.bound_by_host(task, device[to_block], (tp + cp)[to_block], host[to_block] + more))
    split = splits_backward(layouts.schedule)
    return result[0], np.where(split, sum(split_compute(task, layouts, seconds, to_block)), result[1])


def split_compute(task: Task, layouts: LayoutArray, seconds: operators.LayerSeconds, to_block: Ints) -> tuple[Floats, Floats]:
    """(for inputs, for weights) compute of one layer's backward where they run apart, each with the host's floor.

    What the second half repeats and accumulates by itself is `Accounting.split_bytes` for each weight.
    """
    a, params = task.accounting, memory.rank_params(task, layouts)
    again = streaming_seconds(a.split_bytes * (params["layer"] + params["experts"]), task.hardware.device)
    beside = (seconds.tp_backward + seconds.cp_backward)[to_block]
    early = (seconds.backward - seconds.weight)[to_block]
    late = seconds.weight[to_block] + task.constant("elementwise") * again
    host = [each[to_block] for each in seconds.host_split]
    inputs = operators.bound_by_host(task, early, beside, host[0])
    return inputs, operators.bound_by_host(task, late, np.zeros_like(late), host[1])


def gather_host(task: Task, rules: Ints, direction: int) -> Floats:
    """Host time of one layer, forward (0) or backward (1), for the gathers of every micro-batch under rules, by their keys."""
    a = task.accounting
    gathering = [z for z, rule in a.zero.items() if any(t.op == "all_gather" and t.per == "microbatch" for t in rule.traffic)]
    seconds = a.kernels_gather[direction] * task.hardware.device.launch.base * task.constant("host")
    return np.where(np.isin(rules, gathering), seconds, 0.0)


def idle_seconds(task: Task, layouts: LayoutArray, seconds: operators.LayerSeconds, to_block: Ints) -> tuple[Floats, Floats]:
    """Seconds of one layer, (forward, backward), in which tokens are exchanged inside the innermost network's domain while
    parameters are shared beyond it: the outer network is free to gather and reduce."""
    domain = task.hardware.network[0].size or np.inf
    inside = (layouts.ep * layouts.etp <= domain) & (layouts.tp * layouts.shard > domain)
    return np.where(inside, seconds.ep_forward[to_block], 0.0), np.where(inside, seconds.ep_backward[to_block], 0.0)


def dp_traffic(task: Task, layouts: LayoutArray, compute: tuple[Floats, Floats], idle: tuple[Floats, Floats]) -> DpTraffic:
    """Traffic over the D ranks that share parameters: what each micro-batch exposes, and what a step does once.

    `idle`: of `idle_seconds`.
    """
    a, beside = task.accounting, besides(task, layouts)
    params = frozen.trained_params(task, layouts)
    size = len(layouts)
    step = {place: np.zeros(size) for place in ("layer", "first", "last")}
    bare = {place: np.zeros(size) for place in step}
    each = {"forward": np.zeros(size), "backward": np.zeros(size)}
    ends = {"first": np.zeros(size), "last": np.zeros(size)}
    for source in frozen.sources(task, layouts):
        for key, item, rows, cost in _traffic_seconds(source, layouts):
            if item.per == "microbatch":
                each[item.under][rows] += cost["layer"]
                for place in ends:
                    ends[place][rows] += cost[place] * end_share(a, key, item, place)
            else:
                for place in step:
                    (bare if item.under == "nothing" else step)[place][rows] += cost[place]
    forward, backward = compute
    exposed = [
        overlapped(c, each[k], beside.slowdown, beside.floor, free) for k, c, free in zip(each, compute, idle, strict=True)
    ]
    sharded = layouts.zero > 0

    def optimizer(count: Floats, shard: Ints) -> Floats:
        owned = count / np.where(sharded, shard, 1)
        whole = streaming_seconds(a.optimizer_whole_bytes * count, task.hardware.device)
        own = streaming_seconds(a.optimizer_bytes * owned, task.hardware.device)
        return whole + np.where(layouts.offload == 1, host_update_seconds(task, owned), own)

    update = {place: optimizer(count, layouts.shard) for place, count in params_by_place(params).items()}
    update["layer"] = update["layer"] + optimizer(params["experts"], layouts.expert_shard)
    copies = copy_seconds(task, layouts)
    update = {place: seconds + copies[place] for place, seconds in update.items()}
    suffix = {"layer": "", "first": "_first", "last": "_last"}
    grow = task.growth
    ns = {f"comm{suffix[p]}": nanoseconds(grow * (step[p] + bare[p])) for p in step}
    floors = {"layer": beside.step_floor, "first": beside.first_floor, "last": beside.step_floor}
    ns |= {f"floor{suffix[p]}": nanoseconds(grow * (floors[p] * step[p] + bare[p])) for p in step}
    ns |= {f"update{suffix[p]}": nanoseconds(grow * update[p]) for p in step}
    ns["hide"] = np.floor(grow * a.dp_window * (forward + backward) * 1e9).astype(np.int64)
    return DpTraffic(exposed[0], exposed[1], each["backward"], idle[1], ends, ns)


class Besides(NamedTuple):
    """How traffic runs beside compute; arrays over layouts."""

    slowdown: Floats
    """Of compute while both run."""
    floor: Floats
    """Share of every micro-batch's traffic that is exposed in any case."""
    step_floor: Floats
    """The same of step-wise traffic."""
    first_floor: Floats
    """The same of the embedding's: nothing is left to hide its reduction where no other is late."""


def besides(task: Task, layouts: LayoutArray) -> Besides:
    """Kernels take a share of the device from compute and are late by one of the engine's; copy engines do neither."""
    a, engines = task.accounting, memory.by_engines(task, layouts)
    step = np.where(engines, 0.0, max(a.dp_floor, a.step_floor))
    slow, floor = task.hardware.overlap_slowdown.base, a.dp_floor
    return Besides(np.where(engines, 1.0, slow), np.where(engines, 0.0, floor), step, np.where(engines, 1.0, step))


def copy_seconds(task: Task, layouts: LayoutArray) -> dict[str, Floats]:
    """Seconds of a step's copies between parameters as they are kept and the buffers that collectives send, by place.

    They take memory bandwidth from the products that they run beside, so that nothing hides them.
    """
    a, device = task.accounting, task.hardware.device
    moved = {place: np.zeros(len(layouts)) for place in ("layer", "first", "last")}
    if any(a.gather_copies) or any(a.reduce_copies):
        managed = (task.job.compute_bytes < 4) & ~memory.alone(task, layouts)
        for source in frozen.sources(task, layouts):
            inside, ends = (_copied_bytes(source.task, layouts, layouts.shard, managed, end) for end in (False, True))
            for place, count in params_by_place(source.counts).items():
                moved[place] += (inside if place == "layer" else ends) * count
            moved["layer"] += _copied_bytes(source.task, layouts, layouts.expert_shard, managed) * source.counts["experts"]
    return {place: task.constant("elementwise") * streaming_seconds(n, device) for place, n in moved.items()}


def _copied_bytes(task: Task, layouts: LayoutArray, shard: Ints, managed: np.ndarray, end: bool = False) -> Floats:
    """Bytes copied in a step for each parameter that `shard` ranks share, of a layer or of an end of the model; `managed`:
    whether one rank copies too."""
    a, m, result = task.accounting, layouts.microbatches.astype(float), np.zeros(len(layouts))
    keys = memory.rule_of(task, layouts)
    for zero, rule in a.zero.items():
        items = [t for t in rule.traffic if t.over == "shard" and (not end or exchanged_at_ends(t))]
        gathers, reductions = (
            sum((np.where(t.per == "step", 1.0, m) for t in items if (t.op == "all_gather") == wanted), np.zeros(len(m)))
            for wanted in (True, False)
        )
        if not any(t.op == "all_gather" for t in rule.traffic):
            gathers = gathers + 1.0  # every rank has all parameters, and copies them once in the compute type
        sharers, (own, whole) = shard if zero > 0 else np.ones_like(shard), a.gather_copies
        moved = gathers * (own / sharers + np.where(sharers > 1, whole, 0.0))
        if reductions.any():
            several, late = m > 1, np.all([t.per == "step" for t in items if t.op != "all_gather"])
            around = a.engine_copies[0] + a.engine_copies[1] / shard if zero > BY_ENGINES else a.reduce_copies[0]
            moved = moved + reductions * (around + np.where(several & ~late, a.reduce_copies[1] / shard, 0.0))
            moved = moved + np.where(several & late, a.whole_sums * m, 0.0)
        result += np.where((keys == zero) & ((shard > 1) | managed), moved, 0.0)
    return result + np.where((shard == 1) & ~managed & (m > 1), a.whole_sums * m, 0.0)


def end_share(a: Accounting, key: int, item: Traffic, place: str) -> float:
    """Share of an exchange of the embedding or the head that every micro-batch exposes, under the rule of a key.

    Both are gathered once, in forward: a lookup's backward does not read its table, the head's follows its forward. Nothing
    runs under the embedding's gather, layers run under the others. Where copy engines keep up with the layers, nothing else
    is left to do beside the embedding's reduction.
    """
    if not a.ends_exchanged or not exchanged_at_ends(item):
        return 0.0
    if key > BY_ENGINES:
        return 1.0 if place == "first" else 0.0
    return 1.0 if item.op == "all_gather" and place == "first" else a.dp_floor


def exchanged_at_ends(item: Traffic) -> bool:
    """Whether embedding and head have this exchange of every micro-batch."""
    return item.op != "all_gather" or item.under == "forward"


HOST_BANDWIDTH = 50e9
"""Bytes/s of host memory for each device: assumed, 65 % of two sockets of DDR5-4800 (614 GB/s) over eight devices."""


def host_update_seconds(task: Task, owned: Floats) -> Floats:
    """Time of an update in host memory: fp32 gradients down, Adam there, new parameters up; none of it overlapped.

    ZeRO-Offload (arXiv 2101.06840, section 4); Adam reads four and writes three fp32 values a parameter.
    """
    moved = (4.0 + task.job.compute_bytes) * owned
    return moved / task.hardware.device.host_link.base + 28.0 * owned / HOST_BANDWIDTH


def _traffic_seconds(source: frozen.Source, layouts: LayoutArray) -> Iterator[tuple[int, Traffic, Ints, dict[str, Floats]]]:
    """(key of the rule, collective, layouts that have it, its seconds by place) of the parameters under one rule, experts with
    their layer."""
    task = source.task
    keys = memory.rule_of(task, layouts)
    for key, rule in task.accounting.zero.items():
        rows = np.nonzero(keys == key)[0]
        x = layouts.take(rows)
        for item in rule.traffic if len(rows) else ():
            if item.over == "replicas" and not np.any(x.replicas > 1):
                continue
            n_bytes = task.accounting.size(item.size, task.job.compute_bytes)
            n, stride, part = sharing(x, item)
            groups = {place: (n, stride, count[rows] / part) for place, count in params_by_place(source.counts).items()}
            if item.over == "shard":  # routed experts are not sharded in copies (a rule)
                experts, together = source.counts["experts"][rows], memory.joined(task.accounting, x)
                groups["layer"] = (n, stride, groups["layer"][2] + np.where(together, experts, 0.0))
                routed = np.where(together, 0.0, experts)
                groups["experts"] = (np.where(together, 1, x.expert_shard), x.ep * x.etp * x.apart, routed)
            cost = {
                place: task.constant("dp")
                * collective_seconds(item.op, n.astype(float), stride.astype(float), n_bytes * count, task.hardware)
                for place, (n, stride, count) in groups.items()
            }
            cost["layer"] = cost["layer"] + cost.pop("experts", 0.0)
            yield key, item, rows, cost


def sharing(x: LayoutArray, item: Traffic) -> tuple[Ints, Ints, Ints]:
    """(ranks, distance of neighbours, divisor of the parameters) of a collective of the states."""
    stride = x.tp * x.apart
    if item.over == "replicas":
        return x.replicas, stride * x.shard, x.shard
    return x.shard, stride, np.ones_like(stride)


def recompute_seconds(task: Task, layouts: LayoutArray, again: Floats, backward: Floats, traffic: DpTraffic) -> Floats:
    """Seconds that recomputing a layer adds: what it takes, less the traffic that hides under it and would be exposed."""
    beside = besides(task, layouts)
    there = overlapped(backward + again, traffic.behind, beside.slowdown, beside.floor, traffic.idle)
    return again + there - traffic.backward
