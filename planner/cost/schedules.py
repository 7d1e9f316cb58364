"""Pipeline schedules: what is in flight, closed forms for the search, and the event simulator that they are tested against.

A schedule is a list of actions a pipeline rank: forward or backward of one micro-batch through one chunk. Chunk c of rank
s is stage c * pp + s of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from planner.cost.task import GPIPE, INTERLEAVED, Ints
from planner.specs.layout import SCHEDULES


@dataclass(frozen=True)
class Action:
    """`kind` is "F" or "B"."""

    kind: str
    chunk: int
    microbatch: int


# ---- closed forms ------------------------------------------------------------------------------------------------


def in_flight(schedule: Ints, pp: Ints, virtual_stages: Ints, microbatches: Ints, index: Ints) -> Ints:
    """Most chunk-micro-batches whose activations rank `index` holds at once.

    GPipe m; 1F1B min(m, pp - index) (Narayanan 2021, section 2.2); interleaved min(m v, (v - 1) pp + 2 (pp - 1 - index) + 1).
    """
    m, v = microbatches, virtual_stages
    interleaved = np.minimum(m * v, (v - 1) * pp + 2 * (pp - 1 - index) + 1)
    plain = np.where(schedule == GPIPE, m, np.minimum(m, pp - index))
    return np.where(schedule == INTERLEAVED, interleaved, plain)


def in_flight_layers(schedule: Ints, pp: Ints, virtual_stages: Ints, microbatches: Ints, index: Ints, layers: Ints) -> Ints:
    """Most (layer, micro-batch) pairs whose activations rank `index` with `layers` layers holds at once.

    Without virtual stages in_flight * layers. With them, chunks hold layers // v layers and the first r = layers % v
    chunks one more; the extra ones count as often as the first r chunks are in flight at the worst moment.
    """
    v = virtual_stages
    flight = in_flight(schedule, pp, v, microbatches, index)
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


# ---- action lists ------------------------------------------------------------------------------------------------


def actions(schedule: str, pp: int, microbatches: int, virtual_stages: int = 1) -> list[list[Action]]:
    """Each rank's actions in order. Raises ValueError for an unknown schedule."""
    m, v = microbatches, virtual_stages
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule}")
    if schedule == "interleaved":
        return [_interleaved(pp, m, v, rank) for rank in range(pp)]
    if schedule == "gpipe":
        once = [Action("F", 0, i) for i in range(m)] + [Action("B", 0, i) for i in range(m)]
        return [list(once) for _ in range(pp)]
    return [_warm_steady_cool([(0, i) for i in range(m)], [(0, i) for i in range(m)], min(m, pp - r)) for r in range(pp)]


def _interleaved(pp: int, m: int, v: int, rank: int) -> list[Action]:
    """Interleaved 1F1B (Narayanan 2021, section 2.2; Megatron's and torch's order); m is a multiple of pp."""
    order = [(k // pp % v, k // (pp * v) * pp + k % pp) for k in range(m * v)]
    backward = [(v - 1 - chunk, i) for chunk, i in order]
    return _warm_steady_cool(order, backward, min(m * v, (v - 1) * pp + 2 * (pp - 1 - rank) + 1))


def _warm_steady_cool(forward: list[tuple[int, int]], backward: list[tuple[int, int]], flight: int) -> list[Action]:
    """`flight` forwards, then one backward and one forward in turn, then the remaining backwards."""
    result = [Action("F", *f) for f in forward[:flight]]
    for i, b in enumerate(backward):
        result.append(Action("B", *b))
        if flight + i < len(forward):
            result.append(Action("F", *forward[flight + i]))
    return result


# ---- event simulator ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """One action with its time."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """What happened: the events, the time of the last one, and the most layers in flight on each rank."""

    events: tuple[Event, ...]
    makespan: float
    peak_layers: tuple[int, ...]


def simulate(
    order: list[list[Action]],
    forward: list[list[float]],
    backward: list[list[float]],
    layers: list[list[int]],
    p2p: float = 0.0,
) -> Simulation:
    """Run the action lists; `forward[rank][chunk]` and `backward[rank][chunk]` in any unit of time.

    A rank runs its actions in order, each as soon as its input has arrived (`p2p` after the neighbour finished).
    Raises RuntimeError when the lists deadlock.
    """
    pp = len(order)
    v = len(forward[0])
    last = pp * v - 1
    done: dict[tuple[str, int, int], float] = {}
    position, clock = [0] * pp, [0.0] * pp
    held, peak = [0] * pp, [0] * pp
    events: list[Event] = []
    moving = True
    while moving:
        moving = False
        for rank in range(pp):
            while position[rank] < len(order[rank]):
                action = order[rank][position[rank]]
                stage = action.chunk * pp + rank
                needs = _inputs(action, stage, last)
                if any(key not in done for key in needs):
                    break
                arrival = max((done[k] + (p2p if k[1] != stage else 0.0) for k in needs), default=0.0)
                start = max(clock[rank], arrival)
                cost = forward if action.kind == "F" else backward
                clock[rank] = start + cost[rank][action.chunk]
                done[(action.kind, stage, action.microbatch)] = clock[rank]
                events.append(Event(rank, action, start, clock[rank]))
                held[rank] += layers[rank][action.chunk] * (1 if action.kind == "F" else -1)
                peak[rank] = max(peak[rank], held[rank])
                position[rank] += 1
                moving = True
    if any(p < len(o) for p, o in zip(position, order, strict=True)):
        raise RuntimeError("the action lists deadlock")
    return Simulation(tuple(events), max(clock), tuple(peak))


def _inputs(action: Action, stage: int, last: int) -> list[tuple[str, int, int]]:
    """What an action waits for, as (kind, stage, micro-batch)."""
    if action.kind == "F":
        return [("F", stage - 1, action.microbatch)] if stage else []
    own = ("F", stage, action.microbatch)
    return [own, ("B", stage + 1, action.microbatch)] if stage < last else [own]
