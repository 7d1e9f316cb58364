"""One layout's schedule run action by action, in integers: what the closed form of the step leaves out.

The closed form knows what each pipeline rank computes in all, and takes its chunks to be equal. They are not where a rank
mixes kinds of layers, or holds embedding or head: ranks that are at the same chunk wait for the longest one. Here every chunk
takes its own time, forward and backward apart: recompute with the backward, a third of embedding and head (products of equal
size: one forward, two backward) and half of the sends with the forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from planner.cost import devicetypes, step
from planner.cost.actions import actions, one_by_one
from planner.cost.devicetypes import LayoutCost
from planner.cost.schedules import Linked, link, makespan
from planner.cost.task import Ints, Task
from planner.specs.layout import SPLIT_BACKWARD, Layout

MOST_ACTIONS = 200_000
"""Actions that one simulation runs at most; longer steps are extrapolated."""
_QUICK = 60_000
"""The same for a plan's note on its step, all simulations together: a quarter of a second."""

Table = list[list[int]]
"""Of each chunk of each pipeline rank, v-ths of a ns for one micro-batch."""


@dataclass(frozen=True)
class Pieces:
    """What each chunk of each pipeline rank computes for one micro-batch."""

    forward: Table
    backward: Table
    weights: Table
    """The part of `backward` that a split backward runs apart."""


@dataclass(frozen=True)
class Run:
    """A simulated makespan, v-ths of a ns."""

    makespan: int
    simulated: tuple[int, ...]
    """Micro-batches that were simulated: the step's own, or those that the makespan was extrapolated from."""
    affine: bool
    """Whether an extrapolation is confirmed by its third point."""


def pieces(task: Task, layout: Layout, found: LayoutCost) -> Pieces:
    """What the chunks of a layout compute, by the shares that the module's text names. `found` is the layout's cost."""
    v, ranks, last = layout.virtual_stages, found.ranks, (layout.last_rank, layout.virtual_stages - 1)
    ahead, both = _layers(task, layout, found)
    late = np.array([stage.layers for stage in layout.stages]) * ranks.weight  # of equal chunks, by a rule
    forward, whole = (v * ahead).tolist(), (v * both).tolist()
    weights = [[int(n)] * v for n in late]
    for (s, place), end in (((0, 0), int(ranks.embedding[0])), (last, int(ranks.head[last[0]]))):
        forward[s][place] += v * (end // 3)
        whole[s][place] += v * end
    for s, send in enumerate(np.broadcast_to(ranks.p2p, (layout.pp,)).tolist()):
        forward[s] = [t + (send // 2 if layout.pp > 1 else 0) for t in forward[s]]
        whole[s] = [t + send for t in whole[s]]
    backward = [[w - f for w, f in zip(a, b, strict=True)] for a, b in zip(whole, forward, strict=True)]
    if splits(layout):
        weights[last[0]][last[1]] += v * (int(ranks.head[last[0]]) // 3)
        weights[0][0] = backward[0][0]  # torch runs the first stage's input gradients with its weight gradients
    return Pieces(forward, backward, weights)


def _layers(task: Task, layout: Layout, found: LayoutCost) -> tuple[Ints, Ints]:
    """(forward, forward and backward with recompute) of the layers in each chunk of each rank, ns, shape (pp, v)."""
    held = np.array([[stage.layers, *stage.counts] for stage in layout.stages])
    if layout.virtual_stages == 1:
        ends = step.end_time(found.ranks, *_ends(layout))
        return (held[:, 0] * found.ranks.forward)[:, None], (found.stages.time - ends)[:, None]
    kinds = found.kinds
    counts = step.chunks_by_kind(task, layout)
    counts = counts.sum(axis=2, keepdims=True) if len(kinds) == 1 else counts
    forward = np.zeros(counts.shape[:2], dtype=np.int64)
    both = np.zeros_like(forward)
    for k, p in enumerate(kinds):
        # With chunks a rank is recomputed as a whole or not at all.
        again = np.where(held[:, 2] > 0, p.again(2), np.where(held[:, 1] > 0, p.again(1), p.again(0)))
        forward += counts[..., k] * p.forward[:, None]
        both += counts[..., k] * (p.forward + p.backward + again)[:, None]
    return forward, both


def _ends(layout: Layout) -> tuple[Ints, Ints]:
    """(first, last): 1 on the ranks of embedding and head."""
    index = np.arange(layout.pp)
    return (index == 0).astype(np.int64), (index == layout.last_rank).astype(np.int64)


def splits(layout: Layout) -> bool:
    """Whether the schedule runs the two halves of the backward apart."""
    return layout.schedule in SPLIT_BACKWARD


def run(layout: Layout, m: int, forward: Table, backward: Table, weights: Table | None = None, most: int | None = None) -> Run:
    """The makespan of m micro-batches; beyond `most` actions the line through two smaller numbers of them.

    After the warm-up every further round of pp micro-batches takes the bottleneck as long again; a third point must lie on the
    same line.
    """
    pp, v, most = layout.pp, layout.virtual_stages, most or MOST_ACTIONS
    if 2 * m * pp * v <= most:
        return Run(_makespan(layout, m, forward, backward, weights), (m,), True)
    base = max(4 * pp, most // (6 * pp * v) // pp * pp) + m % pp
    points = [base, base + pp, base + 2 * pp]
    spans = [_makespan(layout, n, forward, backward, weights) for n in points]
    rounds = (m - base) // pp
    return Run(spans[0] + rounds * (spans[2] - spans[1]), tuple(points), spans[2] - spans[1] == spans[1] - spans[0])


def _makespan(layout: Layout, m: int, forward: Table, backward: Table, weights: Table | None) -> int:
    pp, v = layout.pp, layout.virtual_stages
    late = weights or [[0] * v for _ in range(pp)]
    times = [[[float(t) for t in row] for row in table] for table in (forward, backward, late)]
    return int(makespan(_linked(layout.schedule, pp, m, v), times[0], times[1], weights=times[2]))  # exact below 2^53


@lru_cache(maxsize=8)
def _linked(schedule: str, pp: int, m: int, v: int) -> Linked:
    """The action lists of a schedule, which several layouts share: the points of a front, a layout with other times."""
    # one rank accumulates gradients: 1F1B of a single stage is the same order of actions
    order = one_by_one(actions("1f1b" if schedule == "none" else schedule, pp, m, v))
    return link(order, v, schedule)


def step_of_chunks(task: Task, layout: Layout) -> int | None:
    """The step of a layout with several chunks a rank, every chunk at its own time, ns.

    None with one chunk a rank, where the closed form is a flow shop's, and where simulating would take long.
    """
    pp, v, m = layout.pp, layout.virtual_stages, layout.microbatches(task.job)
    rounds = 15 if m > 6 * pp else m / pp  # three runs of four to six rounds, or the step itself
    if v == 1 or 2 * rounds * pp * pp * v > _QUICK:
        return None
    found = devicetypes.layout_cost(task, layout)
    t = pieces(task, layout, found)
    done = run(layout, m, t.forward, t.backward, t.weights if splits(layout) else None, 12 * pp * pp * v)
    return -(-(done.makespan + v * int(found.stages.once.max())) // v) + int(found.p.constant[0])
