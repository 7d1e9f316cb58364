"""The exact inner problem of one outer row: layers and recompute of every rank.

For a rank and a layer count, all recompute mixes share every term but recompute time and saved bytes, so the cheapest
mix that fits dominates. That turns memory into a table R[s, n] (exact, in bytes), and the rest into

    minimise  A max_s R[s, n_s] + sum_s R[s, n_s] + v max_s D[s, n_s]   subject to  sum_s n_s = L

which `best_split` solves by dynamic programming over bottleneck thresholds, and `cp_sat` by itself: both must agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.cost import step
from planner.cost.task import Bools, Ints
from planner.search.bounds import BIG, Group, most_layers

DETERMINISTIC_TIME = 60.0
"""CP-SAT's own clock, the only limit that could stop a proof: the same on every machine."""


@dataclass(frozen=True)
class Tables:
    """One outer row: exact integers for rank s (first axis) and least + i layers (second axis)."""

    time: Ints
    """R, BIG when no recompute mix fits."""
    once: Ints
    """D."""
    selective: Ints
    full: Ints
    least: int
    n_layers: int
    factor: int
    """A = v m - 1."""
    chunks: int
    """v."""

    def value(self, split: list[int]) -> int:
        """The objective of a split, before division by v."""
        columns = [n - self.least for n in split]
        time = [int(self.time[s, c]) for s, c in enumerate(columns)]
        once = [int(self.once[s, c]) for s, c in enumerate(columns)]
        return self.factor * max(time) + sum(time) + self.chunks * max(once)


def tables(g: Group, reach: int | None = None) -> Tables:
    """The exact tables of a group of one row, for up to `reach` layers a rank."""
    x, p = g.layouts, g.p
    v = int(x.virtual_stages[0])
    most = most_layers(g)[0]
    top = g.n_layers - (g.pp - 1) * v
    top = max(v, min(top, int(most.max()), reach if reach is not None else top))
    layers = np.arange(v, top + 1, dtype=np.int64)[None, :]
    fits, selective, full = _uniform(g, layers) if v > 1 else _mixed(g, layers)
    first, last = g.first[0][:, None], g.last[0][:, None]
    time = step.stage_time(p, first, last, layers, selective, full)
    whole = layers % v == 0  # ranks of equal chunks: a rule
    time = np.where(fits & whole & (layers <= most[:, None]), time, BIG)
    once = np.broadcast_to(step.stage_once(p, first, last, layers), time.shape)
    factor = v * int(x.microbatches[0]) - 1
    return Tables(time, once, selective, full, v, g.n_layers, factor, v)


def _uniform(g: Group, layers: Ints) -> tuple[Bools, Ints, Ints]:
    """(fits, selective, full) of the cheapest uniform mode that fits, shape (pp, n)."""
    shape = (g.pp, layers.shape[1])
    weight = g.weight(np.broadcast_to(layers[None], (1, *shape)))[0]
    best = np.full(shape, BIG, dtype=np.int64)
    counts = [np.zeros(shape, dtype=np.int64) for _ in range(3)]
    for mode in g.modes:
        again = layers * (0, int(g.p.recompute1[0, 0]), int(g.p.recompute2[0, 0]))[mode]
        fits = layers * g.p.state + weight * g.act(mode) <= g.room(mode)[0][:, None]
        better = fits & (again < best)
        best = np.where(better, again, best)
        for other in (1, 2):
            counts[other] = np.where(better, layers if other == mode else 0, counts[other])
    return best < BIG, counts[1], counts[2]


def _mixed(g: Group, layers: Ints) -> tuple[Bools, Ints, Ints]:
    """(fits, selective, full) of the cheapest mix that fits, shape (pp, n): every number of fully recomputed layers."""
    shape = (g.pp, layers.shape[1])
    best = np.full(shape, BIG, dtype=np.int64)
    best1, best2 = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    flight = g.flight[0][:, None]
    save1, save2 = (int((g.p.act0 - g.act(m))[0, 0]) for m in (1, 2))
    cost1, cost2 = int(g.p.recompute1[0, 0]), int(g.p.recompute2[0, 0])
    full_counts = range(int(layers.max()) + 1) if 2 in g.modes else range(1)
    for n2 in full_counts:
        for strongest in (2,) if n2 else (0, 1):
            if strongest not in g.modes:
                continue
            short = layers * g.p.state + flight * (layers * int(g.p.act0[0, 0]) - n2 * save2) - g.room(strongest)[0][:, None]
            n1 = _selective_needed(short, flight * save1, layers, n2, strongest, g.modes)
            time = np.where(n1 + n2 <= layers, n1 * cost1 + n2 * cost2, BIG)
            time = np.where(n1 >= 0, time, BIG)
            better = time < best
            best = np.where(better, time, best)
            best1, best2 = np.where(better, n1, best1), np.where(better, n2, best2)
        # More full layers cost more by themselves: stop when they alone exceed every value found.
        if n2 and np.all((n2 + 1) * cost2 >= best):
            break
    return best < BIG, best1, best2


def _selective_needed(short: Ints, saved: Ints, layers: Ints, n2: int, strongest: int, modes: tuple[int, ...]) -> Ints:
    """Fewest selectively recomputed layers beside `n2` full ones that cover `short` bytes; -1 when impossible."""
    rest = layers - n2
    if 1 not in modes or strongest == 0:
        # Without mode 0 every layer must be recomputed; without mode 1 none may be selective.
        allowed = short <= 0 if 0 in modes else (short <= 0) & (rest == 0)
        return np.where(allowed, 0, -1)
    needed = np.where(short <= 0, 0, np.where(saved > 0, -(-short // np.maximum(saved, 1)), layers + 1))
    if 0 not in modes:
        return np.where((needed <= rest) & (rest >= 0), rest, -1)
    if strongest == 1:
        needed = np.maximum(needed, 1)
    return np.where(needed <= rest, needed, -1)


# ---- dynamic programming -------------------------------------------------------------------------------------------


def best_split(t: Tables, below: int, check: Callable[[], None] = lambda: None) -> tuple[int, list[int]] | None:
    """The least objective under `below` and its split, or None. Exact. `check` may raise to end the search early.

    For each limit on D and each bottleneck threshold, from the least possible one upwards, the least sum by a min-plus
    recursion; a threshold is worth trying only while it leaves room under the best value found.
    """
    pp = t.time.shape[0]
    allowed = t.time < BIG
    if not allowed.any(axis=1).all():
        return None
    best, chosen = below, None
    least_sum = _least_sum(t, allowed)
    if least_sum is None:
        return None
    floor_once = max(int(t.once[s][allowed[s]].min()) for s in range(pp))
    floor_time = _least_bottleneck(t, allowed) or 0
    for limit in _once_limits(t, allowed, floor_once):
        # A plan not seen under a lower limit has a max D of at least this one.
        if t.factor * floor_time + least_sum[0] + t.chunks * limit >= best:
            break
        check()
        mask = allowed & (t.once <= limit)
        start = _least_bottleneck(t, mask)
        if start is None:
            continue
        for threshold in np.unique(t.time[mask & (t.time >= start)]).tolist():
            if t.factor * threshold + least_sum[0] + t.chunks * floor_once >= best:
                break
            check()
            found = _least_sum(t, mask & (t.time <= threshold))
            if found is not None and (value := t.value(found[1])) < best:
                best, chosen = value, found[1]
    return None if chosen is None else (best, chosen)


def _once_limits(t: Tables, allowed: np.ndarray, floor_once: int) -> list[int]:
    """Limits on D worth trying, ascending: distinct values from the largest unavoidable one."""
    values = np.unique(t.once[allowed])
    return [int(v) for v in values[values >= floor_once]]


def _least_bottleneck(t: Tables, mask: np.ndarray) -> int | None:
    """The least threshold under which L layers fit, by bisection over the distinct values."""
    values = np.unique(t.time[mask])
    if not len(values) or not _reachable(t, mask):
        return None
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        if _reachable(t, mask & (t.time <= values[middle])):
            high = middle
        else:
            low = middle + 1
    return int(values[low])


def _reachable(t: Tables, mask: np.ndarray) -> bool:
    """Whether some split uses allowed entries only: sets of prefix lengths as bits of an integer."""
    reached, keep = 1, (1 << (t.n_layers + 1)) - 1
    for s in range(mask.shape[0]):
        following = 0
        for i in np.nonzero(mask[s])[0].tolist():
            following |= reached << (t.least + i)
        reached = following & keep
        if not reached:
            return False
    return bool(reached >> t.n_layers & 1)


def _least_sum(t: Tables, mask: np.ndarray) -> tuple[int, list[int]] | None:
    """The least sum of R over splits of allowed entries, and the split."""
    size = t.n_layers + 1
    best = np.full(size, BIG, dtype=np.int64)
    best[0] = 0
    choices = []
    for s in range(mask.shape[0]):
        following, choice = np.full(size, BIG, dtype=np.int64), np.zeros(size, dtype=np.int64)
        for i in np.nonzero(mask[s])[0].tolist():
            n = t.least + i
            if n >= size:
                break
            candidate = best[: size - n] + t.time[s, i]
            better = candidate < following[n:]
            following[n:][better], choice[n:][better] = candidate[better], n
        best = np.minimum(following, BIG)
        choices.append(choice)
    if best[-1] >= BIG:
        return None
    split, left = [], t.n_layers
    for choice in reversed(choices):
        split.append(int(choice[left]))
        left -= split[-1]
    return int(best[-1]), split[::-1]


# ---- CP-SAT --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What CP-SAT says: `status` is its own name for it."""

    status: str
    value: int | None
    split: list[int] | None


def cp_sat(t: Tables, below: int, canonical: bool = False) -> Verdict:
    """Solve the same tables with CP-SAT: the least objective under `below`, or, when `canonical`, the tie-break.

    The tie-break keeps the objective under `below` and minimises the sum of squares of the layers, then prefers heavier
    later ranks: the plan that seeds and workers cannot change.
    """
    from ortools.sat.python import cp_model

    model: Any = cp_model.CpModel()
    kept = _worth_trying(t, below)
    if any(not len(columns) for columns in kept):
        return Verdict("INFEASIBLE", None, None)
    rows = [s for s, columns in enumerate(kept) for _ in columns]
    columns_flat = [int(c) for columns in kept for c in columns]
    time = [int(t.time[s, c]) for s, c in zip(rows, columns_flat, strict=True)]
    once = [int(t.once[s, c]) for s, c in zip(rows, columns_flat, strict=True)]
    layers = [t.least + c for c in columns_flat]
    x = [model.new_bool_var("") for _ in rows]
    slowest = model.new_int_var(0, max(time), "max R")
    largest = model.new_int_var(0, max(once), "max D")
    for s in range(len(kept)):
        mine = [i for i, row in enumerate(rows) if row == s]
        model.add_exactly_one([x[i] for i in mine])
        model.add(slowest >= sum(time[i] * x[i] for i in mine))
        model.add(largest >= sum(once[i] * x[i] for i in mine))
    model.add(sum(n * b for n, b in zip(layers, x, strict=True)) == t.n_layers)
    total = t.factor * slowest + sum(c * b for c, b in zip(time, x, strict=True)) + t.chunks * largest
    model.add(total <= below - 1)
    if canonical:
        scale = len(kept) * t.n_layers + 1
        model.minimize(sum((n * n * scale - n * s) * b for n, s, b in zip(layers, rows, x, strict=True)))
    else:
        model.minimize(total)
    solver: Any = deterministic_solver()
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Verdict(solver.status_name(status), None, None)
    split = [0] * len(kept)
    for s, n, b in zip(rows, layers, x, strict=True):
        if solver.value(b):
            split[s] = n
    return Verdict(solver.status_name(status), t.value(split), split)


def deterministic_solver() -> Any:
    """A CP-SAT solver whose answer depends on nothing but the model."""
    from ortools.sat.python import cp_model

    solver: Any = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 1
    solver.parameters.max_deterministic_time = DETERMINISTIC_TIME
    solver.parameters.catch_sigint_signal = False  # Ctrl-C is ours: a model takes milliseconds, then Python raises
    return solver


def _worth_trying(t: Tables, below: int) -> list[Ints]:
    """Entries of each rank that a split under `below` could use: their own bottleneck, the least of everything else."""
    fits = t.time < BIG
    pp = t.time.shape[0]
    if not fits.any(axis=1).all():
        return [np.zeros(0, dtype=np.int64)] * pp
    layers = t.least + np.arange(t.time.shape[1], dtype=np.int64)
    # sum R = L * slope + sum of what exceeds the slope: a bound that does not depend on how the layers are split.
    slope = int(np.min((t.time[:, 1:] - t.time[:, :-1])[fits[:, 1:] & fits[:, :-1]], initial=np.iinfo(np.int64).max))
    slope = 0 if slope == np.iinfo(np.int64).max else slope
    over = np.where(fits, t.time - slope * layers, BIG)
    least = over.min(axis=1)
    rest = t.n_layers * slope + int(least.sum())
    floor_time = max(int(t.time[s][fits[s]].min()) for s in range(pp))
    floor_once = max(int(t.once[s][fits[s]].min()) for s in range(pp))
    keep = []
    for s in range(pp):
        bottleneck = np.maximum(np.where(fits[s], t.time[s], 0), floor_time)
        total = rest + np.where(fits[s], over[s] - least[s], 0)
        bound = t.factor * bottleneck + total + t.chunks * np.maximum(t.once[s], floor_once)
        keep.append(np.nonzero(fits[s] & (bound < below))[0])
    return keep
