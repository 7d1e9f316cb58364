"""The exact inner problem of one outer row by Pareto labels: (max R, max D, sum R) of the ranks so far.

A label is dropped when another one at the same rank and place is no worse in all three, or when even the least that the
rest of the chain must add takes it beyond the limit. What is left at the end is the optimum under the limit.
"""

from __future__ import annotations

import numpy as np

from planner.cost.task import Ints
from planner.verify.tables import NEVER
from planner.verify.windows import Runs


def least_value(
    time: Ints, once: Ints, w: Runs, pipeline: tuple[int, int], rests: tuple[Ints, Ints, Ints], limit: int
) -> int | None:
    """The least `factor` max R + sum R + v max D up to `limit` over chains, None when there is none. Exact.

    `pipeline`: the factor, and the credit of a split backward, which is taken off as far as (factor + 1) max R + v max D.

    `time` and `once` of shape (ranks, runs); `rests` are the least max R, max D and sum R from each rank and place to the
    end (`chains.to_the_end`), shape (ranks + 1, places + 1).
    """
    pp, v, (factor, credit) = len(time), w.chunks, pipeline
    here: dict[int, Ints] = {0: np.zeros((1, 3), dtype=np.int64)}
    for s in range(pp):
        following: dict[int, list[Ints]] = {}
        for place, labels in here.items():
            for length in range(1, min(w.longest, w.places - place) + 1):
                entry = w.number[place, length]
                end = place + length
                if time[s, entry] >= NEVER or rests[2][s + 1, end] >= NEVER:
                    continue
                longer = np.stack([
                    np.maximum(labels[:, 0], time[s, entry]), np.maximum(labels[:, 1], once[s, entry]),
                    labels[:, 2] + time[s, entry],
                ], axis=1)  # fmt: skip
                least = factor * np.maximum(longer[:, 0], rests[0][s + 1, end]) + longer[:, 2] + rests[2][s + 1, end]
                least += v * np.maximum(longer[:, 1], rests[1][s + 1, end]) - credit
                if np.any(kept := least <= limit):
                    following.setdefault(end, []).append(longer[kept])
        here = {place: pareto(np.concatenate(labels)) for place, labels in following.items()}
    ends = here.get(w.places)
    if ends is None:
        return None
    values = np.maximum(factor * ends[:, 0] + ends[:, 2] - credit, (factor + 1) * ends[:, 0]) + v * ends[:, 1]
    return int(values.min()) if values.min() <= limit else None


def pareto(labels: Ints) -> Ints:
    """The labels that no other one is at least as good as in every part."""
    labels = np.unique(labels, axis=0)
    kept: list[Ints] = []
    front = np.zeros((0, 3), dtype=np.int64)
    for label in labels:  # sorted by the first part: a later label never dominates an earlier one
        if not np.any((front[:, 1] <= label[1]) & (front[:, 2] <= label[2])):
            kept.append(label)
            front = np.array(kept)
    return front
