"""What a pipeline rank holds at each of the moments at which its memory may peak: bytes, from the primitives of its layout.

While micro-batches run: at the backward of the head, of a layer, beside the reduction of the unit before, or at the end of
either (`moments`, over `stage_base_bytes`). When a backward has passed the last layer: at the embedding's gradient between
two micro-batches (`between_base`), at its reduction beside whole gradients, or in the optimizer's update (`endings`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from planner.cost import unmade
from planner.cost.primitives import Primitives
from planner.cost.task import Ints


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
    inner, headed = transients(p, first, mode)
    return np.where(last == 1, headed, inner)


def transients(p: Primitives, first: Ints, mode: int) -> tuple[Ints, Ints]:
    """Those at layers' backwards alone, and those of a rank with the head."""
    m = moments(p, first, mode)
    layers = np.maximum(m.reduction.bytes, m.finish.bytes)
    head = np.maximum(np.maximum(m.head.bytes, m.head_reduction.bytes), m.head_finish.bytes)
    return np.maximum(m.layer.bytes, layers), np.maximum(head, layers)


def head_excess(p: Primitives, first: Ints, mode: int) -> Ints:
    """How much more temporaries take on a last rank at its head's backward than at that of a layer; negative for less."""
    inner, headed = transients(p, first, mode)
    return headed - inner


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


def saved_limit(
    p: Primitives, first: Ints, last: Ints, flight: Ints, layers: Ints, mode: int, pairs: Ints | None = None
) -> Ints:
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
        inner, headed = transients(p, first, mode)
        room = base - np.where(last == 1, headed, inner)
        if np.any(beyond):
            room = room + spared_by_head(beyond, p.saved(mode), headed - inner)
        return np.minimum(unmade.most_saved(p, first, flight, layers, room), most)

    return [within(mode) for mode in modes]


def _between_limit(p: Primitives, first: Ints, last: Ints, flight: Ints, left: Ints) -> Ints:
    """The same for what the first rank holds between two micro-batches, of `left` bytes beside its layers' states."""
    room = left - between_base(p, first, last, flight)
    return np.where(first == 1, unmade.part_within(room, unmade.left_between(p, flight), flight), unmade.NO_LIMIT)
