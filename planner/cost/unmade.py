"""Gradients that do not exist yet while a pipeline's rank holds the most activations.

Where gradients are made by the first backward of a step, and all micro-batches of a rank are under way before that (m <= pp,
or GPipe), most activations and all gradients never meet. With n layers in v chunks, F of the rank's m v micro-batches (of a
chunk each) in flight, g bytes of gradients a layer and A bytes of activations, a rank holds besides the rest of its states,
and besides temporaries, at most the largest of

    A                                  before the first backward, or
        n/v g + A                      where F < m v: during the last chunk's, whose gradients are there by its second
    n/v g + (F - 1) / F A              after the first, or
        2 n/v g + ((v-1) m - 1) / F A  where F < m v: after that of the last chunk but one
    n g + (m - 1) / F A                when the first micro-batch has passed back through all chunks

in place of n g + A: from the second one to the third what is in flight falls by more with every chunk than its gradients take,
or by less with every one. Where F < m v part of the last chunk's micro-batches are still to come: it falls by less there.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from planner.cost.task import Bools, Ints

NO_LIMIT = np.int64(1) << 62
"""More bytes than any device has."""


class Unmade(Protocol):
    """The fields of `Primitives` that tell of them."""

    @property
    def grads(self) -> Ints: ...
    @property
    def grads_first(self) -> Ints: ...
    @property
    def round(self) -> Ints: ...
    @property
    def chunks(self) -> Ints: ...


class Late(NamedTuple):
    """They alone."""

    grads: Ints
    grads_first: Ints
    round: Ints
    chunks: Ints


class Moment(NamedTuple):
    """A moment at which a rank may hold the most."""

    missing: Ints
    """Bytes of gradients that do not exist."""
    kept: Ints
    """How many of the micro-batches (of a chunk each) in flight at most are there."""
    longer: Bools
    """Whether those are of first chunks alone, which have a layer more than others where chunks are unequal."""

    def share(self, flight: Ints, layers: Ints, chunks: Ints) -> tuple[Ints, Ints]:
        """(part, whole) of the activations that are there; at most, with unequal chunks."""
        most, whole = -(-layers // chunks) * chunks, np.maximum(flight, 1)
        uneven = self.longer & (most != layers)
        return (
            np.where(uneven, np.minimum(self.kept * most, whole * layers), self.kept), np.where(uneven, whole * layers, whole)
        )  # fmt: skip


def spared(p: Unmade, first: Ints, flight: Ints, layers: Ints, saved: Ints) -> Ints:
    """Bytes of gradients and `saved` activations that never meet on a rank."""
    if not np.any(p.round):
        return np.zeros_like(saved)
    missing, kept = most_held(p, first, flight, layers, saved)
    return missing + saved - kept


def most_held(p: Unmade, first: Ints, flight: Ints, layers: Ints, saved: Ints) -> tuple[Ints, Ints]:
    """(bytes of gradients that do not exist, bytes of `saved` activations that are there) when a rank holds the most."""
    late, missing, kept = applies(p, flight), np.zeros_like(saved), saved
    if not np.any(late):
        return missing, kept
    least = np.full_like(saved, NO_LIMIT)
    for moment in moments(p, first, flight, layers):
        part, whole = moment.share(flight, layers, p.chunks)
        there = saved * part // whole
        less = late & (moment.missing - there < least)
        missing, kept = np.where(less, moment.missing, missing), np.where(less, there, kept)
        least = np.where(less, moment.missing - there, least)
    return missing, kept


def most_saved(p: Unmade, first: Ints, flight: Ints, layers: Ints, room: Ints) -> Ints:
    """Bytes of activations that fit into `room` beside all gradients, and what of those does not exist yet; negative for
    none."""
    if not np.any(p.round):
        return room
    each = []
    for moment in moments(p, first, flight, layers):
        each.append(part_within(room + moment.missing, *moment.share(flight, layers, p.chunks)))
    return np.where(applies(p, flight), np.minimum.reduce(each), room)


def applies(p: Unmade, flight: Ints) -> Bools:
    """Whether some gradients are missing when a rank holds the most activations."""
    return np.asarray((p.round > 0) & ((p.chunks > 1) | (flight >= p.round)))


def moments(p: Unmade, first: Ints, flight: Ints, layers: Ints) -> tuple[Moment, Moment, Moment]:
    """Those of which one decides, where it `applies`."""
    several, whole, chunk = p.chunks > 1, flight >= p.round * p.chunks, -(-layers // p.chunks)
    table = first * p.grads_first
    before = p.grads * (layers - np.where(whole, 0, chunk)) + table
    made = chunk * np.where(whole, 1, np.minimum(p.chunks, 2))
    after = p.grads * np.maximum(layers - made, 0) + np.where(several, table, 0)
    kept = np.where(whole, flight - 1, (p.chunks - 1) * p.round - 1)
    return (
        Moment(before, flight, np.zeros_like(whole)),
        Moment(after, kept, ~whole),
        Moment(np.zeros_like(before), left_between(p, flight), np.ones_like(whole)),
    )


def left_between(p: Unmade, flight: Ints) -> Ints:
    """Of `flight`, those that are there when the first rank's chunk 0 has passed a micro-batch back."""
    return np.asarray(np.where((p.round > 0) & (p.chunks > 1), p.round, flight) - 1)


def part_within(room: Ints, part: Ints, whole: Ints) -> Ints:
    """The most bytes of which `part / whole`, rounded down, fit into `room`; negative for none."""
    alone = np.where(room < 0, -1, NO_LIMIT)
    return np.where(part > 0, ((room + 1) * whole - 1) // np.maximum(part, 1), alone)
