"""Pipeline schedules: what is in flight, closed forms for the search, and the event simulator that they are tested against.

`actions` has the lists that the simulator runs; `specs.layout.stage_of` says which stage of the model a rank's chunk is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from planner.cost.actions import Action
from planner.cost.task import DUALPIPEV, GPIPE, INTERLEAVED, INTERLEAVED_ZB, ZBV, Ints, splits_backward, v_shaped
from planner.specs.layout import stage_of

Times = Sequence[Sequence[float]]
"""Of each chunk of each pipeline rank."""


def ends(schedule: Ints, pp: Ints | int, index: Ints) -> tuple[Ints, Ints]:
    """(first, last): 1 where pipeline rank `index` holds the embedding, and where it holds the head. All broadcast."""
    at_last = np.where(v_shaped(schedule), 0, np.asarray(pp) - 1)
    first = np.broadcast_to(index == 0, np.broadcast(index, at_last).shape)
    return first.astype(np.int64), (index == at_last).astype(np.int64)


# ---- closed forms ------------------------------------------------------------------------------------------------


def in_flight(schedule: Ints, pp: Ints, virtual_stages: Ints, microbatches: Ints, index: Ints) -> Ints:
    """Most chunk-micro-batches whose activations rank `index` holds at once.

    GPipe m; 1F1B min(m, pp - index) (Narayanan 2021, section 2.2); interleaved min(m v, (v - 1) pp + 2 (pp - 1 - index) + 1).
    Where the backward is split they are held until their weight gradients: v pp, ZB-V 2 pp, DualPipeV 2 pp + 1 on every rank.
    """
    most, first, fewer = flight_limits(schedule, pp, virtual_stages, microbatches)
    return np.minimum(most, first - fewer * index)


def flight_limits(schedule: Ints, pp: Ints, virtual_stages: Ints, microbatches: Ints) -> tuple[Ints, Ints, Ints]:
    """(most, first, fewer) so that rank `index` has min(most, first - fewer index) in flight: what ranks share of it."""
    m, v = microbatches, virtual_stages
    interleaved, split, gpipe = schedule == INTERLEAVED, splits_backward(schedule), schedule == GPIPE
    most = np.where(interleaved | split, m * v, m)
    first = np.where(gpipe, m, np.where(interleaved, (v + 1) * pp - 1, pp))
    if np.any(split):
        first = np.where(split, np.where(schedule == DUALPIPEV, 2 * pp + 1, v * pp), first)
    return most, first, np.where(interleaved, 2, np.where(gpipe | split, 0, 1))


def put_off(schedule: Ints, pp: Ints, index: Ints) -> Ints:
    """Chunk-micro-batches among those in flight whose weight gradients wait, so that rank `index` holds output gradients too.

    InterleavedZeroBubble index + 1 (rank r puts them off by r). DualPipeV: 0, whole backwards while the most are in flight;
    later waits weigh less as long as output gradients take no more than activations. ZB-V: 1, or pp + index in flight
    with 2 index + 1 waiting in the cool-down, counted as 2 pp with 3 index + 1 - pp under the same condition.
    """
    cooling = np.maximum(1, 3 * index + 1 - pp)
    waiting = np.where(schedule == INTERLEAVED_ZB, index + 1, np.where(schedule == ZBV, cooling, 0))
    return np.asarray(waiting, dtype=np.int64)


def kept_messages(schedule: Ints) -> Ints:
    """Halves of the receive buffers' bytes that a step's messages keep: 2 for the buffers alone.

    Under a split backward torch's pipeline runtime holds sent tensors, too, until the step ends: all of them in rounds of
    chunks, half of them by the peak of a V (storage meter on the bundled runtime, 8 micro-batches).
    """
    return np.where(schedule == INTERLEAVED_ZB, 4, np.where(splits_backward(schedule), 3, 2))


def bubble(schedule: Ints, forward: Ints, inputs: Ints, weights: Ints) -> Ints:
    """What one more pipeline rank adds to a step under a split backward, for the times of a rank (v chunks, one micro-batch).

    Makespans of equal ranks in the action lists; InterleavedZeroBubble F + I - W is that of ZB-H1 (arXiv 2401.10241, table 1).
    DualPipeV is that of its actions one after the other, as torch runs them.
    """
    least, most = forward + inputs - weights, np.maximum(forward, inputs)
    one = np.maximum(least, most)
    vee = np.maximum(np.maximum(2 * (most - weights), most), weights)
    dual = np.maximum(one, 2 * inputs - weights)
    return np.where(schedule == ZBV, vee, np.where(schedule == DUALPIPEV, dual, one))


def in_flight_layers(schedule: Ints, pp: Ints, virtual_stages: Ints, microbatches: Ints, index: Ints, layers: Ints) -> Ints:
    """Most (layer, micro-batch) pairs whose activations rank `index` with `layers` layers holds at once.

    Without virtual stages in_flight * layers. With them, chunks hold layers // v layers and the first r = layers % v
    chunks one more; the extra ones count as often as the first r chunks are in flight at the worst moment.
    """
    flight = in_flight(schedule, pp, virtual_stages, microbatches, index)
    return layers_of(flight, pp, virtual_stages, microbatches, layers)


def layers_of(flight: Ints, pp: Ints, virtual_stages: Ints, microbatches: Ints, layers: Ints) -> Ints:
    """The same of ranks with `flight` chunk-micro-batches in flight."""
    v = virtual_stages
    if not np.any(v > 1):
        return flight * layers
    base, extra = layers // v, layers % v
    result = flight * base
    uneven = np.nonzero(np.broadcast_to(extra > 0, result.shape))
    if len(uneven[0]):
        parts = (np.broadcast_to(a, result.shape)[uneven] for a in (pp, v, microbatches, flight, extra))
        result[uneven] += _first_chunks(*parts)
    return result


def _first_chunks(pp: Ints, v: Ints, m: Ints, flight: Ints, r: Ints) -> Ints:
    """Most micro-batches that the first r chunks of a rank hold together in the interleaved order.

    Forwards go pp micro-batches through chunk 0, then chunk 1, ...; backwards through the last chunk first. After i
    forwards there have been i - flight backwards. The count is largest after the warm-up or when a round of forwards
    has just passed the first r chunks.
    """
    period = pp * v

    def forwards(i: Ints) -> Ints:
        return i // period * (pp * r) + np.minimum(i % period, pp * r)

    def backwards(j: Ints) -> Ints:
        return j // period * (pp * r) + np.maximum(j % period - pp * (v - r), 0)

    after_warmup = forwards(flight)
    rounds = np.maximum(-(-(flight - pp * r) // period), 0)
    i = rounds * period + pp * r
    later = np.where(i <= m * v, forwards(i) - backwards(np.maximum(i - flight, 0)), 0)
    return np.maximum(after_warmup, later)


def chunk_moments(pp: int, virtual_stages: int, microbatches: Ints) -> Ints:
    """Micro-batches of each chunk in flight at the moments when the memory of a rank may peak, in the interleaved order.

    Shape (len(microbatches), pp, moments, v). Whatever the chunks weigh, the most that a rank holds is the largest of
    sum_c moments[..., c] weight_c. From three rounds of pp micro-batches on the moments repeat.
    """
    rounds, which = np.unique(np.clip(microbatches // pp, 1, 3), return_inverse=True)
    known = [_moments(pp, virtual_stages, int(r)) for r in rounds]
    width = max(table.shape[1] for table in known)
    return np.stack([np.pad(table, ((0, 0), (0, width - table.shape[1]), (0, 0))) for table in known])[which.ravel()]


@lru_cache(maxsize=512)
def _moments(pp: int, v: int, rounds: int) -> Ints:
    """The same for `rounds` pp micro-batches: shape (pp, moments, v), those that no other one exceeds in every chunk."""
    period, last, chunk = pp * v, rounds * pp * v, np.arange(v) * pp
    tables = []
    for index in range(pp):
        flight = min(last, (v - 1) * pp + 2 * (pp - 1 - index) + 1)
        i = np.arange(flight, min(last, flight + period) + 1)[:, None]
        i = i[(i[:, 0] % pp == 0) | ((i[:, 0] - flight) % pp == 0) | (i[:, 0] == last)]  # in between it changes evenly
        forwards = i // period * pp + np.clip(i % period - chunk, 0, pp)
        backwards = (i - flight) // period * pp + np.clip((i - flight) % period - chunk[::-1], 0, pp)
        held = np.unique(forwards - backwards, axis=0)
        exceeded = np.all(held[:, None] <= held[None], axis=2).sum(axis=1) > 1
        tables.append(held[~exceeded])
    width = max(len(table) for table in tables)
    return np.stack([np.pad(table, ((0, width - len(table)), (0, 0))) for table in tables])


# ---- event simulator ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Simulation:
    """What happened: the time when the last action ended, and the most layers in flight on each rank."""

    makespan: float
    peak_layers: tuple[int, ...]


@dataclass(frozen=True)
class Linked:
    """Action lists, the slots of all ranks in one row, with what waits for what: that does not depend on how long they take."""

    begins: Ints
    """The first slot of each rank, and the number of all."""
    waits: Ints
    """The two slots whose results a slot takes from other stages, shape (2, slots); the number of all slots for none."""
    slot: Ints
    """Of each action its slot, then its place among the times."""
    kind: Ints
    rank: Ints
    chunk: Ints


_KINDS = ("F", "B", "I", "W")
"""Kinds of actions, by the codes of `Linked.kind`."""


def simulate(
    order: list[list[Action]],
    forward: Times,
    backward: Times,
    layers: list[list[int]],
    p2p: float = 0.0,
    weights: Times | None = None,
    schedule: str = "interleaved",
) -> Simulation:
    """Run the action lists; `forward[rank][chunk]`, `backward` and the part of it for `weights` in any unit of time.

    `schedule` says where stages sit. Raises RuntimeError when the lists deadlock.
    """
    span = makespan(link(order, len(forward[0]), schedule), forward, backward, p2p, weights)
    return Simulation(span, tuple(_most_held(slots, held) for slots, held in zip(order, layers, strict=True)))


def _most_held(slots: list[Action], layers: list[int]) -> int:
    """The most layers whose activations a rank holds at once."""
    held = (layers[a.chunk] * {"F": 1, "I": 0}.get(a.kind, -1) for slot in slots for a in slot.parts)
    return max(itertools.accumulate(held), default=0)


def link(order: list[list[Action]], v: int, schedule: str = "interleaved") -> Linked:
    """The action lists of ranks with `v` chunks; `schedule` says where stages sit."""
    pp, every = len(order), [slot for slots in order for slot in slots]
    code = {kind: i for i, kind in enumerate(_KINDS)}
    rows = [(code[a.kind], a.chunk, a.microbatch) for each in every for a in each.parts]
    kind, chunk, microbatch = np.array(rows, dtype=np.int64).reshape(-1, 3).T.copy()
    slot = np.repeat(np.arange(len(every)), [1 if each.beside is None else 2 for each in every])
    rank = np.repeat(np.arange(pp), [len(slots) for slots in order])[slot]
    stage = np.array([[stage_of(schedule, pp, r, c) for c in range(v)] for r in range(pp)])[rank, chunk]
    begins = np.array([0, *itertools.accumulate(len(slots) for slots in order)])
    return Linked(begins, _waits(begins, pp * v, slot, kind, stage, microbatch), slot, kind, rank, chunk)


def _waits(begins: Ints, stages: int, slot: Ints, kind: Ints, stage: Ints, microbatch: Ints) -> Ints:
    """`Linked.waits` from a column an action. A slot waits for itself when an input is made nowhere, or too late by its rank.

    A forward takes the output of the stage before. A backward, or its half for inputs, takes the gradient from the stage after
    and what its own forward kept; weight gradients take what their own half for inputs kept.
    """
    forward, weights, slots = kind == 0, kind == 3, int(begins[-1])
    # The slot that made what is passed on, by forward or backward, stage from -1 to one after the last, and micro-batch.
    made = np.full((2, stages + 2, int(microbatch.max(initial=0)) + 1), -1)
    made[0, 0], made[1, -1] = slots, slots  # the model's ends wait for nobody
    made[(~forward[~weights]).astype(np.int64), stage[~weights] + 1, microbatch[~weights]] = slot[~weights]
    passed = np.where(weights, slots, np.where(forward, made[0, stage, microbatch], made[1, stage + 2, microbatch]))
    own = np.where(forward, slots, made[weights.astype(np.int64), stage + 1, microbatch])
    # A rank runs its slots in order: what it made in one of them before is there.
    first = begins[np.searchsorted(begins, slot, side="right") - 1]
    own, passed = (np.where((by >= first) & (by < slot), slots, by) for by in (own, passed))
    waits, late = np.full((2, slots), slots), slot[own < slots]
    waits[(np.diff(slot, prepend=-1) == 0).astype(np.int64), slot] = np.where(passed < 0, slot, passed)  # a pair's second apart
    waits[0, late] = late
    return waits


def makespan(linked: Linked, forward: Times, backward: Times, p2p: float = 0.0, weights: Times | None = None) -> float:
    """When the last action ends, by the times of `simulate`. Raises RuntimeError when the lists deadlock.

    A rank runs its slots in order, each as soon as its inputs have arrived (`p2p` after another rank finished); a slot of two
    takes as long as both.
    """
    whole = np.array(backward)
    late = np.zeros_like(whole) if weights is None else np.array(weights)
    time = np.stack([np.array(forward), whole, whole - late, late])
    took = np.bincount(linked.slot, time[linked.kind, linked.rank, linked.chunk]).tolist()
    begins, (first, second), never = linked.begins.tolist(), linked.waits.tolist(), -math.inf
    arrived = [never] * begins[-1] + [0.0]  # the last one stands for no input
    position, clock, moving = list(begins[:-1]), [0.0] * (len(begins) - 1), True
    while moving:
        moving = False
        for rank, end in enumerate(begins[1:]):
            start, now = position[rank], clock[rank]
            for at in range(start, end):
                one, other = arrived[first[at]], arrived[second[at]]
                if one == never or other == never:
                    end = at
                    break
                if one > now:
                    now = one
                if other > now:
                    now = other
                now += took[at]
                arrived[at] = now + p2p
            position[rank], clock[rank], moving = end, now, moving or end > start
    if any(at < end for at, end in zip(position, begins[1:], strict=True)):
        raise RuntimeError("the action lists deadlock")
    return max(clock)
