"""The schedule run action by action: is the closed form of the step what the pipeline takes?

Two simulations, in integers, of what each rank does for one micro-batch (R, in v-ths of a ns where ranks hold v chunks):

whole: R in one action, the backward; the forward takes no time. Then the makespan is exactly the closed form's
    (v m - 1) max R + sum R
for `none`, GPipe and 1F1B whatever the ranks' times: m equal jobs through a flow shop take sum R + (m - 1) max R, and the limit
on what is in flight never binds (rank s waits for the job K = pp - s before, whose way through the ranks after it takes
at most K max R). With chunks it is exact where the ranks' times rise to one largest value and fall from it, or all but one are
equal: measured, none of 8,744 random pipelines differed, and demanded. Elsewhere a valley between two slow ranks can take
longer (73 of 2,296 random pipelines did, by up to 3.4 %): the gap is printed and nothing is demanded.

apart: forward and backward as the cost model has them, every chunk at its own time (`cost.simulated`). Not checked, because
the closed form is not this makespan: its gap is printed. Where forward takes the same share on every rank, 1F1B takes the
closed form exactly if the last rank is a slowest one (or m = 1), and less otherwise: lighter ranks after the bottleneck make it
wait less (0 of 3,000 random pipelines differed). GPipe takes sum R + (m - 1) (max forward + max backward), more where these are
on different ranks.

Under a split backward there is no whole: the two halves of the backward decide. `apart` has all three, and the first stage's
input gradients with its weight gradients, as torch runs them; its gap is printed. The closed form is exact for equal ranks
without ends, and on average 3 % above simulations of random pipelines.
"""

from __future__ import annotations

import numpy as np

from planner.cost.simulated import Run, run, splits
from planner.specs.layout import Layout
from planner.verify.layouts import Evaluated

LARGEST = 2**53
"""Times beyond are not exact in the simulator's floats (104 days, by v): nothing is demanded of them."""


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
    p = e.pieces
    return run(e.layout, e.microbatches, p.forward, p.backward, p.weights if splits(e.layout) else None)


def closed_form(e: Evaluated) -> int:
    """(v m - 1) max R + sum R, less what a split backward saves, v-ths of a ns."""
    rounds, slowest = e.layout.virtual_stages * e.microbatches, int(e.time.max())
    return max((rounds - 1) * slowest + int(e.time.sum()) - e.credit, rounds * slowest)
