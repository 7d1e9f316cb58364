"""Gradients that do not exist yet while a pipeline's rank holds the most activations.

Where gradients are made by the first backward of a step, and all micro-batches of a rank are under way before that (m <= pp,
or GPipe), most activations and all gradients never meet. With n layers in v chunks, F of the rank's m v micro-batches (of a
chunk each) in flight, g bytes of gradients a layer and A bytes of activations, a rank holds besides the rest of its states,
and besides temporaries, at most the largest of

    A                       before the first backward, where F = m v; otherwise the last chunk's gradients are there already
    n/v g + (F - 1) / F A   after it
    n g + (m - 1) / F A     when the first micro-batch has passed back through all chunks

in place of n g + A: what is in flight falls by more with every chunk than its gradients take, or by less with every one.
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


def spared(p: Unmade, first: Ints, flight: Ints, layers: Ints, saved: Ints) -> Ints:
    """Bytes of gradients and `saved` activations that never meet on a rank."""
    missing, kept = most_held(p, first, flight, layers, saved)
    return missing + saved - saved * kept // np.maximum(flight, 1)


def most_held(p: Unmade, first: Ints, flight: Ints, layers: Ints, saved: Ints) -> tuple[Ints, Ints]:
    """(bytes of gradients that do not exist, how many of `flight` are there) when a rank holds the most."""
    if not np.any(p.round):
        return np.zeros_like(saved), flight
    each = moments(p, first, flight, layers)
    most = np.argmin([missing + saved - saved * kept // np.maximum(flight, 1) for missing, kept in each], axis=0)
    missing, kept = (np.choose(most, [moment[i] for moment in each]) for i in range(2))
    late = applies(p, flight)
    return np.where(late, missing, 0), np.where(late, kept, flight)


def most_saved(p: Unmade, first: Ints, flight: Ints, layers: Ints, room: Ints) -> Ints:
    """Bytes of activations that fit into `room` beside all gradients, and what of those does not exist yet; negative for
    none."""
    if not np.any(p.round):
        return room
    each = [part_within(room + missing, kept, flight) for missing, kept in moments(p, first, flight, layers)]
    return np.where(applies(p, flight), np.minimum.reduce(each), room)


def applies(p: Unmade, flight: Ints) -> Bools:
    """Whether some gradients are missing when a rank holds the most activations."""
    return np.asarray((p.round > 0) & ((p.chunks > 1) | (flight >= p.round)))


def moments(p: Unmade, first: Ints, flight: Ints, layers: Ints) -> tuple[tuple[Ints, Ints], ...]:
    """(bytes of gradients that do not exist, how many of `flight` are there) at each of the moments, where it `applies`."""
    several, whole, chunk = p.chunks > 1, flight >= p.round * p.chunks, -(-layers // p.chunks)
    table = first * p.grads_first
    before = p.grads * (layers - np.where(whole, 0, chunk)) + table
    after = np.where(whole, p.grads * (layers - chunk) + np.where(several, table, 0), before)
    return (before, flight), (after, flight - whole), (np.zeros_like(before), left_between(p, flight))


def left_between(p: Unmade, flight: Ints) -> Ints:
    """Of `flight`, those that are there when the first rank's chunk 0 has passed a micro-batch back."""
    return np.asarray(np.where((p.round > 0) & (p.chunks > 1), p.round, flight) - 1)


def part_within(room: Ints, part: Ints, whole: Ints) -> Ints:
    """The most bytes of which `part / whole`, rounded down, fit into `room`; negative for none."""
    alone = np.where(room < 0, -1, NO_LIMIT)
    return np.where(part > 0, ((room + 1) * whole - 1) // np.maximum(part, 1), alone)
