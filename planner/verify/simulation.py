"""The schedule run action by action: is the closed form of the step what the pipeline takes?

Two simulations, in integers, of what each rank does for one micro-batch (R, in v-ths of a ns where ranks hold v chunks):

whole: R in one action, the backward; the forward takes no time. Then the makespan is exactly the closed form's
    (v m - 1) max R + sum R
for `none`, GPipe and 1F1B whatever the ranks' times: m equal jobs through a flow shop take sum R + (m - 1) max R, and the limit
on what is in flight never binds (rank s waits for the job K = pp - s before, whose way through the ranks after it takes
at most K max R). With chunks it is exact where the ranks' times rise to one largest value and fall from it, or all but one are
equal: measured, none of 8,744 random pipelines differed, and demanded. Elsewhere a valley between two slow ranks can take
longer (73 of 2,296 random pipelines did, by up to 3.4 %): the gap is printed and nothing is demanded.

apart: forward and backward as the cost model has them, recompute with the backward, a third of embedding and head (products
of equal size: one forward, two backward) and half of the sends with the forward. Not checked, because the closed form is not
this makespan: its gap is printed. Where forward takes the same share on every rank, 1F1B takes the closed form exactly if the
last rank is a slowest one (or m = 1), and less otherwise: lighter ranks after the bottleneck make it wait less (0 of 3,000
random pipelines differed). GPipe takes sum R + (m - 1) (max forward + max backward), more where these are on different
ranks.

Under a split backward there is no whole: the two halves of the backward decide. `apart` has all three, and the first stage's
input gradients with its weight gradients, as torch runs them; its gap is printed. The closed form is exact for equal ranks
without ends, and on average 3 % above simulations of random pipelines.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.cost.actions import actions, one_by_one
from planner.cost.schedules import simulate
from planner.specs.layout import SPLIT_BACKWARD, Layout
from planner.verify.layouts import Evaluated

LARGEST = 2**53
"""Times beyond are not exact in the simulator's floats (104 days, by v): nothing is demanded of them."""
MOST_ACTIONS = 200_000
"""Actions that one simulation runs at most; longer steps are extrapolated."""


@dataclass(frozen=True)
class Run:
    """A simulated makespan, v-ths of a ns."""

    makespan: int
    simulated: tuple[int, ...]
    """Micro-batches that were simulated: the step's own, or those that the makespan was extrapolated from."""
    affine: bool
    """Whether an extrapolation is confirmed by its third point."""


Table = list[list[int]]


def pieces(e: Evaluated) -> tuple[Table, Table, Table]:
    """(forward, backward, the backward's part for weights) of each chunk of each rank, v-ths of a ns, by the shares that the
    module's text names."""
    v, last = e.layout.virtual_stages, (e.layout.last_rank, e.layout.virtual_stages - 1)
    forward = [[int(n)] * v for n in e.forward]  # n / v in each chunk, in v-ths
    weights = [[int(n)] * v for n in e.weights]
    whole = [[int(t - end)] * v for t, end in zip(e.time, _ends(e), strict=True)]
    for (s, place), end in (((0, 0), e.embedding_ns), (last, e.head_ns)):
        forward[s][place] += v * (end // 3)
        whole[s][place] += v * end
    if e.layout.pp > 1:
        forward = [[t + int(send) // 2 for t in row] for row, send in zip(forward, e.p2p_ns, strict=True)]
    backward = [[w - f for w, f in zip(a, b, strict=True)] for a, b in zip(whole, forward, strict=True)]
    if splits(e.layout):
        weights[last[0]][last[1]] += v * (e.head_ns // 3)
        weights[0][0] = backward[0][0]
    return forward, backward, weights


def splits(layout: Layout) -> bool:
    """Whether the schedule runs the two halves of the backward apart."""
    return layout.schedule in SPLIT_BACKWARD


def _ends(e: Evaluated) -> list[int]:
    ends = [0] * e.layout.pp
    ends[0] += e.embedding_ns
    ends[e.layout.last_rank] += e.head_ns
    return ends


def exact(layout: Layout, time: list[int]) -> bool:
    """Whether the makespan of whole ranks (`time`, ns) must be the closed form's."""
    if splits(layout):
        return False
    if layout.virtual_stages == 1:
        return True
    peak = int(np.argmax(time))
    rises, falls = time[: peak + 1], time[peak:]
    return (rises == sorted(rises) and falls == sorted(falls, reverse=True)) or _all_but_one_equal(time)


def _all_but_one_equal(time: list[int]) -> bool:
    return max(np.unique(time, return_counts=True)[1]) >= len(time) - 1


def run_whole(e: Evaluated) -> Run:
    """The step with a rank's whole R in its backward; the pieces apart under a split backward."""
    if splits(e.layout):
        return run_apart(e)
    v = e.layout.virtual_stages
    nothing = [[0] * v for _ in e.time]
    return run(e.layout, e.microbatches, nothing, [[int(t)] * v for t in e.time])


def run_apart(e: Evaluated) -> Run:
    """The step with forward and backward apart."""
    return run(e.layout, e.microbatches, *pieces(e))


def run(layout: Layout, m: int, forward: Table, backward: Table, weights: Table | None = None) -> Run:
    """The makespan of m micro-batches; beyond `MOST_ACTIONS` the line through two smaller numbers of them.

    After the warm-up every further round of pp micro-batches takes the bottleneck as long again; a third point must lie on the
    same line.
    """
    pp, v = layout.pp, layout.virtual_stages
    if 2 * m * pp * v <= MOST_ACTIONS:
        return Run(_makespan(layout, m, forward, backward, weights), (m,), True)
    base = max(4 * pp, MOST_ACTIONS // (6 * pp * v) // pp * pp) + m % pp
    points = [base, base + pp, base + 2 * pp]
    spans = [_makespan(layout, n, forward, backward, weights) for n in points]
    rounds = (m - base) // pp
    return Run(spans[0] + rounds * (spans[2] - spans[1]), tuple(points), spans[2] - spans[1] == spans[1] - spans[0])


def _makespan(layout: Layout, m: int, forward: Table, backward: Table, weights: Table | None) -> int:
    pp, v = layout.pp, layout.virtual_stages
    # one rank accumulates gradients: 1F1B of a single stage is the same order of actions
    order = one_by_one(actions("1f1b" if layout.schedule == "none" else layout.schedule, pp, m, v))
    late = weights or [[0] * v for _ in range(pp)]
    times = [[[float(t) for t in row] for row in table] for table in (forward, backward, late)]
    done = simulate(order, times[0], times[1], [[1] * v] * pp, weights=times[2], schedule=layout.schedule)
    return int(done.makespan)  # floats are exact below 2^53


def closed_form(e: Evaluated) -> int:
    """(v m - 1) max R + sum R, less what a split backward saves, v-ths of a ns."""
    rounds, slowest = e.layout.virtual_stages * e.microbatches, int(e.time.max())
    return max((rounds - 1) * slowest + int(e.time.sum()) - e.credit, rounds * slowest)
