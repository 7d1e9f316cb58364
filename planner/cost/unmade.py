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
    part: Ints
    """Of `whole` parts of the activations of all micro-batches in flight, those that are there."""
    whole: Ints

    def there(self, saved: Ints) -> Ints:
        """Bytes of `saved` activations that are there."""
        return saved * self.part // self.whole


def spared(p: Unmade, first: Ints, flight: Ints, layers: Ints, saved: Ints) -> Ints:
    """Bytes of gradients and `saved` activations that never meet on a rank."""
    late = applies(p, flight)
    if not np.any(late):
        return np.zeros_like(saved)
    less = [moment.missing + saved - moment.there(saved) for moment in moments(p, first, flight, layers)]
    return np.where(late, np.minimum.reduce(less), 0)


def most_held(p: Unmade, first: Ints, flight: Ints, layers: Ints, saved: Ints) -> tuple[int, int]:
    """(bytes of gradients that do not exist, bytes of `saved` activations that are there) when one rank holds the most."""
    if not applies(p, flight)[0]:
        return 0, int(saved[0])
    found = moments(p, first, flight, layers)
    return max(((int(m.missing[0]), int(m.there(saved)[0])) for m in found), key=lambda held: held[1] - held[0])


def most_saved(p: Unmade, first: Ints, flight: Ints, layers: Ints, room: Ints) -> Ints:
    """Bytes of activations that fit into `room` beside all gradients, and what of those does not exist yet; negative for
    none."""
    late = applies(p, flight)
    if not np.any(late):
        return room
    each = [part_within(room + m.missing, m.part, m.whole) for m in moments(p, first, flight, layers)]
    return np.where(late, np.minimum.reduce(each), room)


def applies(p: Unmade, flight: Ints) -> Bools:
    """Whether some gradients are missing when a rank holds the most activations."""
    return np.asarray((p.round > 0) & ((p.chunks > 1) | (flight >= p.round)))


def moments(p: Unmade, first: Ints, flight: Ints, layers: Ints) -> tuple[Moment, Moment, Moment]:
    """Those of which one decides, where it `applies`. With unequal chunks activations are those at most: what is left of first
    chunks alone may be of a layer more than the mean."""
    several, all_in, chunk = p.chunks > 1, flight >= p.round * p.chunks, -(-layers // p.chunks)
    table = first * p.grads_first
    before = p.grads * (layers - np.where(all_in, 0, chunk)) + table
    made = chunk * np.where(all_in, 1, np.minimum(p.chunks, 2))
    after = p.grads * np.maximum(layers - made, 0) + np.where(several, table, 0)
    kept, left = np.where(all_in, flight - 1, (p.chunks - 1) * p.round - 1), left_between(p, flight)
    kept, left = np.where(all_in, flight - 1, (p.chunks - 1) * p.round - 1), left_between(p, flight)
    whole, longest = np.maximum(flight, 1), chunk * p.chunks
    if not np.any(uneven := longest != layers):
        return Moment(before, flight, whole), Moment(after, kept, whole), Moment(np.zeros_like(before), left, whole)
    longest, mean = np.where(uneven, longest, 1), np.where(uneven, layers, 1)
    whole = whole * mean
    return (
        Moment(before, flight * mean, whole),
        Moment(after, np.where(all_in, kept * mean, np.minimum(kept * longest, whole)), whole),
        Moment(np.zeros_like(before), np.minimum(left * longest, whole), whole),
    )


def left_between(p: Unmade, flight: Ints) -> Ints:
    """Of `flight`, those that are there when the first rank's chunk 0 has passed a micro-batch back."""
    return np.asarray(np.where((p.round > 0) & (p.chunks > 1), p.round, flight) - 1)


def part_within(room: Ints, part: Ints, whole: Ints) -> Ints:
    """The most bytes of which `part / whole`, rounded down, fit into `room`; negative for none."""
    alone = np.where(room < 0, -1, NO_LIMIT)
    return np.where(part > 0, ((room + 1) * whole - 1) // np.maximum(part, 1), alone)
