"""The integers of the cost model: what one layer, the ends of the pipeline and the states cost, for each layout.

Every primitive is rounded up to whole nanoseconds and bytes; `step` puts them together. Nearly all depend on a few
columns only, so they are computed for the distinct combinations and spread over the layouts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

from planner.cost import memory, operators, p2p, risk, schedules
from planner.cost.rounding import ceil, nanoseconds
from planner.cost.states import held_bytes
from planner.cost.task import (
    GPIPE,
    INTERLEAVED,
    INTERLEAVED_ZB,
    Bools,
    Floats,
    Ints,
    LayoutArray,
    Task,
    picked,
    splits_backward,
)
from planner.cost.traffic import DpTraffic, dp_traffic, idle_seconds, layer_compute, recompute_seconds, split_compute


@dataclass(frozen=True)
class Primitives:
    """Integers of each layout: ns for one micro-batch, bytes for one rank. int64 arrays of equal length."""

    # time of one layer and micro-batch
    forward: Ints
    backward: Ints
    weight: Ints
    """The part of `backward` for weights, where a schedule runs it apart; else 0."""
    recompute1: Ints
    """Extra time of one selectively recomputed layer."""
    recompute2: Ints
    """Extra time of one fully recomputed layer."""
    # time of a rank
    embedding: Ints
    head: Ints
    p2p: Ints
    """Exposed send and receive of one micro-batch, forward and backward, all chunks."""
    credit: Ints
    """v-ths of ns that a split backward takes off (v m - 1) max R + sum R; see `step.pipeline_time`."""
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
    deferred: Ints
    """Output gradients of one layer and micro-batch that wait for their weight gradients."""
    transient: Ints
    """Temporaries of one layer's backward, gathered copies included."""
    reduction: Ints
    """Reduction buffers beside them, once the layer's own activations are gone."""
    finish0: Ints
    """The end of a layer's backward: its gradients and their reduction beyond its activations, which are gone, without
    recompute."""
    finish1: Ints
    """... with selective recompute."""
    finish2: Ints
    """... with full recompute."""
    head_transient: Ints
    head_reduction: Ints
    """Reduction buffers of the head's unit, beside the last layer's backward."""
    head_finish: Ints
    """The end of the head's backward: its gradient and reduction, the loss gone."""
    between: Ints
    """The embedding's gradient, reduction or next gather between two micro-batches (first rank)."""
    closing: Ints
    """Its reduction beside whole accumulated gradients when backward ends (first rank)."""
    waiting: Ints
    """Kept on a pipeline's last rank by losses that wait for their backward (GPipe), and as the stage's output."""
    boundary: Ints
    """Stage output kept for each chunk-micro-batch in flight."""
    receive: Ints
    """Receive buffers of one chunk and direction; under a split backward also what was sent (`schedules.kept_messages`)."""
    alike: Ints
    """1 where the first and the last rank have the receive buffers of a rank between them (`Accounting.symmetric_sends`)."""
    entering: Ints
    """Received input of a chunk's micro-batch in flight that is at once its first layer's saved input."""
    chunks: Ints
    """v."""
    grads: Ints
    """The part of `state` that the first backward of a step makes; 0 where it is there from the start (`unmade`)."""
    grads_first: Ints
    """The same of the embedding (first rank)."""
    headed: Ints
    """Micro-batches in flight of each of a last rank's first chunks when its head runs backward: where chunks may hold unequal
    numbers of layers it may hold more at other times (`peaks.beyond_head`); else -1."""
    round: Ints
    """Micro-batches of a step where all are under way on the first rank before its first backward, else 0."""
    fixed: Ints
    """Library workspaces, and buffers that an engine keeps for one layer."""
    capacity: Ints
    """What the allocator may hold: the limit less what lies outside, over the reserved ratio; less where the risk of running
    out of memory is limited."""
    outside: Ints
    """Driver context and communicators."""

    def take(self, rows: Ints | Bools) -> Primitives:
        """The primitives at `rows`."""
        return Primitives(**picked({name: getattr(self, name) for name in NAMES}, rows))

    def each(self, change: Callable[[Ints], Ints]) -> Primitives:
        """The primitives with every field changed alike."""
        return Primitives(**{name: change(getattr(self, name)) for name in NAMES})

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

    def finish_rest(self, mode: int) -> Ints:
        """The end of a layer's backward beyond the saved activations that it has freed."""
        return (self.finish0, self.finish1, self.finish2)[mode]


NAMES = tuple(f.name for f in fields(Primitives))
"""Of the fields of `Primitives`."""


@dataclass(frozen=True)
class Blend(Primitives):
    """Primitives of ranks that mix kinds of layers (`blending.blend`): means, and of what lives at a peak the largest."""

    remade_by_mode: tuple[Ints, Ints, Ints]
    rest_by_mode: tuple[Ints, Ints, Ints]

    def take(self, rows: Ints | Bools) -> Blend:
        """The primitives at `rows`."""
        whole = picked({name: getattr(self, name) for name in NAMES}, rows)
        names = ("remade_by_mode", "rest_by_mode")
        modes = {name: tuple(a.take(rows, axis=0) for a in getattr(self, name)) for name in names}
        return Blend(**whole, **modes)  # type: ignore[arg-type]

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
    embedding_tp: Floats
    head_tp: Floats
    embedding_zero: Floats
    """Exposed gathers and reductions of the embedding, every micro-batch."""
    head_zero: Floats
    recompute_tp: tuple[Floats, Floats]
    recompute_cp: tuple[Floats, Floats]


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

    Nearly all of them depend on (tp, cp and how it shares attention, micro_batch, sequence_parallel, dp, zero) only: a few
    thousand combinations at most, however many layouts there are.
    """

    task: Task
    layouts: LayoutArray
    share: Ints
    """Combination of each layout."""
    columns: dict[str, Ints]
    """Fields of `Primitives` by combination: all but those of `own`."""
    window: Ints
    """ns of step-wise traffic that one layer's compute hides without chunks."""
    waiting: Ints
    output: Ints
    head_gradients: Ints
    """Gradients of the head that last from one micro-batch to the next."""
    received: Ints
    """Bytes of the tensor between two stages, 0 without a pipeline."""
    hops: tuple[Ints, ...]
    """ns of one neighbour's send by network tier."""
    times: dict[str, Floats]

    def of(self, rows: slice) -> Primitives:
        """The primitives of some layouts."""
        return self.priced(self.layouts.between(rows), self.share[rows])

    def priced(self, x: LayoutArray, share: Ints) -> Primitives:
        """The primitives of layouts `x` with the combinations `share`."""
        shared = {k: v.take(share) for k, v in self.columns.items()}
        return Primitives(**shared, **self.own(x, share))

    def quiet(self, share: Ints) -> Primitives:
        """Primitives of combinations where nothing is passed on and nothing waits: without what layouts have of their `own`."""
        none = np.zeros(1, dtype=np.int64)
        own = dict.fromkeys(("p2p", "credit", "hide", "waiting", "receive", "alike", "round"), none) | {
            "chunks": none + 1,
            "headed": none - 1,
        }
        return Primitives(**{k: v.take(share) for k, v in self.columns.items()}, **own)

    def own(self, x: LayoutArray, share: Ints) -> dict[str, Ints]:
        """What depends on more than a combination: the fields of layouts `x` with the combinations `share`, by name."""
        a, none = self.task.accounting, np.zeros(len(x), dtype=np.int64)
        chunked, split = np.any(x.virtual_stages > 1), np.any(splits_backward(x.schedule))
        late = np.any((x.schedule == GPIPE) | (x.schedule == INTERLEAVED_ZB))
        window, output = self.window.take(share), self.output.take(share)
        sends = p2p.exposed(self.task, x, [hop.take(share) for hop in self.hops])
        buffers = x.microbatches if a.receive_all_microbatches else a.receive_count
        kept = schedules.kept_messages(x.schedule) if split else 2
        return {
            "p2p": sends,
            "credit": self._credit(x, share, sends) if split else none,
            "hide": self._hide(x, window) if chunked else window,
            "waiting": self._waiting(x, share) + output if late else output,
            "receive": self.received.take(share) * buffers * kept // 2,
            "alike": ((x.pp > 2) & self._symmetric).astype(np.int64),
            "chunks": x.virtual_stages,
            "headed": self._headed(x),
            "round": self._round(x),
        }

    def _headed(self, x: LayoutArray) -> Ints:
        """Micro-batches of each of the last rank's first chunks in flight at the head's backward."""
        there = (x.schedule == INTERLEAVED) & (x.virtual_stages > 1) & (not self.task.one_of_several)
        return np.where(there, np.minimum(x.pp, x.microbatches), -1)

    def _round(self, x: LayoutArray) -> Ints:
        """Micro-batches, where all of them are in flight before gradients are made that add up. What mixes kinds of layers is
        priced as if all gradients were there: a blend has no peak of its own for them."""
        m, known = x.microbatches, self.task.accounting.gradients_as_made and not self.task.one_of_several
        early = ((m <= x.pp) | (x.schedule == GPIPE)) & (m > 1) & (x.pp > 1) & ~splits_backward(x.schedule)
        return np.where(early & known, m, 0)

    @property
    def _symmetric(self) -> bool:
        """Whether the buffers of a pipeline are symmetric memory: on the GPUs of one node."""
        device = self.task.hardware
        return self.task.accounting.symmetric_sends and device.device.kind == "cuda" and self.task.gpus <= device.node_size

    def _waiting(self, x: LayoutArray, share: Ints) -> Ints:
        """What losses keep that wait for their backward."""
        one = self.waiting.take(share)
        late = np.where(x.schedule == GPIPE, x.microbatches - 1, np.where(x.schedule == INTERLEAVED_ZB, x.pp - 1, 0))
        # At GPipe's first backward no gradient is there yet, at the second one micro-batch fewer waits: never both.
        spared = np.where((x.schedule == GPIPE) & (x.microbatches > 1), np.minimum(one, self.head_gradients.take(share)), 0)
        return late * one - spared

    def _credit(self, x: LayoutArray, share: Ints, sends: Ints) -> Ints:
        """What a split backward saves: for each rank but one, its R less the bubble that it adds. Means over ranks.

        Of embedding, head and sends a third, a third and a half count as forward; a third of the head as weight gradients.
        """
        n = self.task.model.n_layers
        names = ("forward", "backward", "weight", "embedding", "head")
        ahead, back, weight, embedding, head = (self.columns[name].take(share) for name in names)
        total = n * (ahead + back) + embedding + head + x.pp * sends
        forward = n * ahead + (embedding + head) // 3 + x.pp * sends // 2
        weights = n * weight + head // 3
        added = schedules.bubble(x.schedule, forward, total - forward - weights, weights)
        saved = (x.pp - 1) * np.maximum(total - added, 0) // x.pp
        return np.where(splits_backward(x.schedule), saved, 0)

    def _hide(self, x: LayoutArray, window: Ints) -> Ints:
        """Step-wise traffic that one layer's compute hides, from the share of one micro-batch's compute.

        Gradients are reduced beside the last backward. With chunks a chunk's gradients are ready while pp micro-batches
        still pass back through each of the others.
        """
        v, others = x.virtual_stages, np.minimum(x.microbatches, x.pp)
        return np.where(v > 1, np.maximum(window, window * others * (v - 1) // v), window)

    def parts(self) -> TimeParts:
        """The float times behind the primitives, for each layout."""
        t = {k: v[self.share] for k, v in self.times.items()}
        tp, cp = ((t.pop(f"recompute_{axis}1"), t.pop(f"recompute_{axis}2")) for axis in ("tp", "cp"))
        return TimeParts(**t, recompute_tp=tp, recompute_cp=cp)


_BLOCK = ("tp", "cp", "ep", "etp", "micro_batch", "sequence_parallel", "context")
"""What a layer's operators depend on."""
_OUTER = (*_BLOCK, "dp", "zero", "offload", "apart", "sharded")
"""What everything but the pipeline's own terms depends on, with whether there are one, two or more micro-batches, there is a
pipeline, and its backward is split (`_combinations`)."""


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
        return nanoseconds(value * task.growth)

    compute = layer_compute(task, shared, seconds, spread)
    traffic = dp_traffic(task, shared, compute, idle_seconds(task, shared, seconds, spread))
    held = held_bytes(task, shared)
    acts = memory.activation_bytes(task, block)
    blocks = {
        "act0": acts.layer[0], "act1": acts.layer[1], "act2": acts.layer[2], "deferred": acts.deferred,
    }  # fmt: skip
    layer = _layer_ns(task, shared, seconds, (compute, traffic), spread)
    again = [seconds.again(i) for i in range(2)]
    repeated = {
        f"recompute{i + 1}": ns(recompute_seconds(task, shared, again[i][spread], compute[1], traffic)) for i in range(2)
    }
    columns = repeated | {k: v[spread] for k, v in blocks.items()} | layer | traffic.ns | held
    columns["embedding"] = ns((seconds.embedding + seconds.embedding_tp)[spread] + traffic.ends["first"])
    columns["head"] = ns((seconds.head + seconds.head_tp)[spread] + traffic.ends["last"])
    columns |= _finishes(task, columns)
    columns["transient"] = acts.backward[spread] + columns.pop("unit")
    columns["head_transient"] = acts.head[spread] + columns.pop("head_unit")
    _add_modules(task, columns, ns(operators.module_seconds(task, operators.shapes_of(task, block).tokens))[spread])
    times = {
        "compute": compute[0] + compute[1],
        "tp": (seconds.tp_forward + seconds.tp_backward)[spread],
        "cp": (seconds.cp_forward + seconds.cp_backward)[spread],
        "ep": (seconds.ep_forward + seconds.ep_backward)[spread],
        "zero": traffic.forward + traffic.backward,
        "embedding_tp": seconds.embedding_tp[spread],
        "head_tp": seconds.head_tp[spread],
        "embedding_zero": traffic.ends["first"],
        "head_zero": traffic.ends["last"],
        "recompute_tp1": seconds.tp_recompute[0][spread],
        "recompute_tp2": seconds.tp_recompute[1][spread],
        "recompute_cp1": seconds.cp_recompute[0][spread],
        "recompute_cp2": seconds.cp_recompute[1][spread],
    }
    times = {k: v * task.growth for k, v in times.items()}
    boundary = acts.boundary[spread]
    hops = tuple(ns(seconds) for seconds in p2p.hop_seconds(task, p2p.sent_bytes(task, shared, boundary)))
    columns |= _passed(task, shared, boundary) | _by_device(task, shared)
    # Where backward is split a table's gradient comes with the weight gradients.
    columns["between"] = np.where(splits_backward(shared.schedule), 0, columns["between"])
    many = shared.pp > 1
    return PrimitiveTable(
        task, layouts, share, columns, columns.pop("hide"), acts.waiting[spread], np.where(many, acts.output[spread], 0),
        columns.pop("head_gradients"), np.where(many, boundary, 0), hops, times,
    )  # fmt: skip


def _passed(task: Task, layouts: LayoutArray, boundary: Ints) -> dict[str, Ints]:
    """What a pipeline's ranks keep of the tensors of `boundary` bytes that they pass on."""
    a, many = task.accounting, layouts.pp > 1
    return {
        "boundary": np.where(many & a.keeps_stage_output, ceil(a.boundary_copies * boundary), 0),
        "entering": np.where(many & a.receive_all_microbatches, boundary, 0),
    }


def _by_device(task: Task, layouts: LayoutArray) -> dict[str, Ints]:
    """What a device may hold, what lies outside the allocator, and what a step takes besides."""
    a, d = task.accounting, task.hardware.device
    held = d.context.base + d.communicator.base * memory.communicators(layouts) + a.outside_bytes
    outside = ceil(task.constant("outside") * held)
    constant = np.full(len(layouts), int(a.step_seconds * task.growth * 1e9), dtype=np.int64)
    return {"outside": outside, "capacity": capacity(task, outside), "constant": constant}


def _finishes(task: Task, columns: dict[str, Ints]) -> dict[str, Ints]:
    """The end of a layer's backward beyond its activations, by recompute mode, of what `states` says of it.

    Of two micro-batches the first layer of a backward is spared most, the last one has no activations of others beside it.
    """
    finish, spared, late = (columns.pop(name) for name in ("finish", "spared", "spared_late"))
    found = {}
    for mode in range(3):
        saved = columns[f"act{mode}"]
        less = np.minimum(spared, late + (task.model.n_layers - 1) * saved)
        found[f"finish{mode}"] = np.maximum(finish - saved - less, 0)
    return found


def _add_modules(task: Task, columns: dict[str, Ints], projection: Ints) -> None:
    """Multi-token prediction modules on the last rank: a layer and the head once more for each, logits kept together."""
    n = task.model.mtp
    if not n:
        return
    columns["head"] = columns["head"] + n * (columns["head"] + columns["forward"] + columns["backward"] + projection)
    for name in ("comm", "floor", "update", "state", "updating"):
        columns[f"{name}_last"] = columns[f"{name}_last"] + n * columns[name]
    columns["head_transient"] = columns["head_transient"] * (1 + n) + n * columns["act0"]


def _combinations(layouts: LayoutArray, names: tuple[str, ...], accumulate: bool = False) -> tuple[LayoutArray, Ints]:
    """Distinct combinations of some columns as layouts, and which of them each layout has."""
    key = np.zeros(len(layouts), dtype=np.int64)
    for name in names:
        column = getattr(layouts, name)
        key = key * (int(column.max(initial=0)) + 1) + column
    if accumulate:
        key = (key * 3 + np.minimum(layouts.microbatches, 3) - 1) * 2 + (layouts.pp == 1)
        key = key * 2 + splits_backward(layouts.schedule)
    first, kind = distinct_keys(key)
    return layouts.take(first), kind


def distinct_keys(key: Ints) -> tuple[Ints, Ints]:
    """(the first row of each distinct key, which of them each row has), in the order of the keys, which are not negative."""
    size = int(key.max(initial=-1)) + 1
    if size > 8 * len(key):
        _, first, kind = np.unique(key, return_index=True, return_inverse=True)
        return first, kind.ravel()
    place = np.full(size, -1)  # a table of all keys takes less than sorting those that there are
    place[key[::-1]] = np.arange(len(key))[::-1]
    there = place >= 0
    return place[there], (np.cumsum(there) - 1)[key]


def _layer_ns(
    task: Task,
    layouts: LayoutArray,
    seconds: operators.LayerSeconds,
    priced: tuple[tuple[Floats, Floats], DpTraffic],
    to_block: Ints,
) -> dict[str, Ints]:
    compute, traffic = priced
    split, (_, weights) = splits_backward(layouts.schedule), split_compute(task, layouts, seconds, to_block)
    forward = (seconds.tp_forward + seconds.cp_forward + seconds.ep_forward)[to_block]
    backward = (seconds.tp_backward + seconds.cp_backward + seconds.ep_backward)[to_block]
    return {
        "forward": nanoseconds(task.growth * (compute[0] + forward + traffic.forward)),
        "weight": np.where(split, np.floor(1e9 * task.growth * weights).astype(np.int64), 0),
        "backward": nanoseconds(task.growth * (compute[1] + backward + traffic.backward)),
    }
