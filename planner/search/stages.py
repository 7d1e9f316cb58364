"""The exact inner problem of one outer row: layers and recompute of every rank.

For a rank and a layer count, all recompute mixes share every term but recompute time and saved bytes, so the cheapest
mix that fits dominates. That turns memory into a table R[s, n] (exact, in bytes), and the rest into

    minimise  A max_s R[s, n_s] + sum_s R[s, n_s] + v max_s D[s, n_s]   subject to  sum_s n_s = L

which `best_split` solves by dynamic programming over bottleneck thresholds, and `cp_sat` by itself: both must agree.
Where the model mixes kinds of layers, R depends on which layers a rank holds, not only on how many: the entries are windows
of the sequence (`windows`), and the ranks' windows join end to end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from planner.cost import peaks, step
from planner.cost.primitives import Primitives
from planner.cost.task import Bools, Ints, Task
from planner.search import mixed
from planner.search.bounds import BIG, Group, most_layers
from planner.search.windows import Windows, positions, windows

DETERMINISTIC_TIME = 60.0
"""CP-SAT's own clock, the only limit that could stop a proof: the same on every machine."""

_TOO_SMALL = 50
"""Windows of a model that CP-SAT solves sooner as it is than it presolves it: up to five times where the split is tight."""


@dataclass(frozen=True)
class Tables:
    """One outer row: exact integers for rank s (first axis) and the entry of a window of layers (second axis)."""

    time: Ints
    """R, BIG when no recompute mix fits."""
    once: Ints
    """D."""
    selective: Ints
    full: Ints
    layers: Ints
    """Layers of each entry."""
    at: Ints
    """Entry of the window of n positions (second axis) that starts at position a (first axis); -1 where there is none. One
    row stands for all positions when layers are of one kind."""
    n_layers: int
    factor: int
    """A = v m - 1."""
    chunks: int
    """v: layers for each position of the sequence."""
    credit: int = 0
    """What a split backward takes off the pipeline's time (`step.pipeline_time`)."""

    @cached_property
    def positions(self) -> int:
        """Positions of the sequence that the ranks divide."""
        return positions(self.n_layers, self.chunks)

    @cached_property
    def least_bottleneck(self) -> int | None:
        """The least max R over all splits, None when none fits."""
        return _least_maximum(self, self.time, self.time < BIG)

    @cached_property
    def least_sums(self) -> tuple[Ints, Ints]:
        """The least sum of R before and from each (rank, position)."""
        return _potentials(self, np.add)

    @cached_property
    def least_peaks(self) -> tuple[Ints, Ints]:
        """The least max R before and from each (rank, position)."""
        return _potentials(self, np.maximum)

    @property
    def anywhere(self) -> bool:
        """Whether a window's entry depends on its length alone."""
        return len(self.at) == 1

    @cached_property
    def from_start(self) -> tuple[Ints, Ints]:
        """(entry, end) of every window by start and size, shape (positions + 1, sizes), sizes from 1 on.

        Windows that do not exist have the entry after the last, and end after the end.
        """
        length, longest = self.positions, self.at.shape[1] - 1
        end = np.arange(length + 1)[:, None] + np.arange(1, longest + 1)[None, :]
        entry = np.broadcast_to(self.at[:, 1:], end.shape)
        missing = (entry < 0) | (end > length)
        return np.where(missing, self.time.shape[1], entry), np.where(missing, length + 1, end)

    @cached_property
    def from_end(self) -> tuple[Ints, Ints]:
        """(entry, start) of every window by end and size, likewise."""
        length, longest = self.positions, self.at.shape[1] - 1
        start = np.arange(length + 1)[:, None] - np.arange(1, longest + 1)[None, :]
        entry = self.at[0 if self.anywhere else np.maximum(start, 0), np.arange(1, longest + 1)[None, :]]
        missing = (entry < 0) | (start < 0)
        return np.where(missing, self.time.shape[1], entry), np.where(missing, length + 1, start)

    def split(self, sizes: list[int]) -> list[int]:
        """Layers of each rank from its positions: what v rounds lack of whole ones is missing on the last rank."""
        whole = [n * self.chunks for n in sizes]
        return [*whole[:-1], whole[-1] - (self.positions * self.chunks - self.n_layers)]

    def columns(self, split: list[int]) -> list[int]:
        """The entry that each rank holds under a split into layers."""
        found, start = [], 0
        for n in split:
            size = -(-n // self.chunks)
            found.append(int(self.at[0 if self.anywhere else start, size]))
            start += size
        return found

    def value(self, split: list[int]) -> int:
        """The objective of a split, before division by v."""
        columns = self.columns(split)
        time = [int(self.time[s, c]) for s, c in enumerate(columns)]
        once = [int(self.once[s, c]) for s, c in enumerate(columns)]
        return self.objective(max(time), sum(time), max(once))

    def objective(self, slowest: int, total: int, once: int) -> int:
        """The objective from max R, sum R and max D; it falls with none of them."""
        pipeline = max(self.factor * slowest + total - self.credit, (self.factor + 1) * slowest)
        return pipeline + self.chunks * once


def tables(g: Group, task: Task, reach: int | None = None, only: Windows | None = None) -> Tables:
    """The exact tables of a group of one row, for up to `reach` layers a rank; where places matter of `only` these windows."""
    v = int(g.layouts.virtual_stages[0])
    top = (positions(g.n_layers, v) - (g.pp - 1)) * v
    top = max(v, min(top, reach if reach is not None else top))
    if g.stack is not None:
        return _window_tables(g, windows(task.model.kind_of_layer, v, top // v) if only is None else only)
    most = most_layers(g)[0]
    top = max(v, min(top, int(most.max())))
    sizes = np.arange(1, top // v + 1, dtype=np.int64)
    at = np.concatenate([[-1], sizes - 1])[None, :]
    return _priced(g, sizes * v, at, sizes * v <= most[:, None])


def _window_tables(g: Group, w: Windows) -> Tables:
    g = mixed.blended(g, w.counts[None, None])
    beside = peaks.stage_update_bytes(g.deep, g.first[:, :, None], g.last[:, :, None], w.layers) <= g.p.capacity[:, :, None]
    return _priced(g, w.layers, w.at, beside[0] & w.whole)


def _priced(g: Group, layers: Ints, at: Ints, allowed: Bools) -> Tables:
    """Tables of a row over windows of `layers` layers; `allowed` of shape (ranks, entries)."""
    v, p = int(g.layouts.virtual_stages[0]), g.deep.take(np.array([0]))
    one, columns = _flat(p), layers[None, :]
    fits, selective, full = _uniform(g, one, columns) if v > 1 else _mixed(g, one, columns)
    first, last = g.first[0][:, None], g.last[0][:, None]
    time = step.stage_time(one, first, last, columns, selective, full)
    time = np.where(fits & allowed, time, BIG)
    once = np.broadcast_to(step.stage_once(one, first, last, columns), time.shape)
    factor = v * int(g.layouts.microbatches[0]) - 1
    return Tables(time, once, selective, full, layers, at, g.n_layers, factor, v, int(g.p.credit[0, 0]))


def _flat(p: Primitives) -> Primitives:
    """Primitives of one row without its axis: shape (1, 1 or entries)."""
    return p.each(lambda column: column[0])


def _uniform(g: Group, p: Primitives, layers: Ints) -> tuple[Bools, Ints, Ints]:
    """(fits, selective, full) of the cheapest uniform mode that fits, shape (pp, n)."""
    shape = (g.pp, layers.shape[1])
    everywhere = np.broadcast_to(layers[None], (1, *shape))
    best = np.full(shape, BIG, dtype=np.int64)
    counts = [np.zeros(shape, dtype=np.int64) for _ in range(3)]
    for mode in g.modes:
        again = np.broadcast_to(layers * p.again(mode), shape)
        fits = g.kept(g.deep, everywhere, mode)[0] <= g.left(mode, layers)[0]
        better = fits & (again < best)
        best = np.where(better, again, best)
        for other in (1, 2):
            counts[other] = np.where(better, layers if other == mode else 0, counts[other])
    return best < BIG, counts[1], counts[2]


def _mixed(g: Group, p: Primitives, layers: Ints) -> tuple[Bools, Ints, Ints]:
    """(fits, selective, full) of the cheapest mix that fits, shape (pp, n): every number of fully recomputed layers."""
    shape = (g.pp, layers.shape[1])
    columns = (
        layers, g.flight[0][:, None], p.act0, p.act0 - p.act1, p.act0 - p.act2, p.recompute1, p.recompute2,
        *(g.left(mode, layers)[0] for mode in range(3)),
    )  # fmt: skip
    table = np.stack([np.broadcast_to(column, shape).ravel() for column in columns])
    best = np.full(table.shape[1], BIG, dtype=np.int64)
    best1, best2 = np.zeros_like(best), np.zeros_like(best)
    at = np.arange(len(best))
    for n2 in range(int(layers.max()) + 1) if 2 in g.modes else range(1):
        # More full layers cost more by themselves: they are of no use where they alone exceed the value found.
        left = (n2 <= table[0]) & (n2 * table[6] < best[at])
        table, at = table[:, left], at[left]
        if not len(at):
            break
        held, flight, act0, save1, save2, cost1, cost2, *rooms = table
        for strongest in (2,) if n2 else (0, 1):
            if strongest not in g.modes:
                continue
            short = flight * (held * act0 - n2 * save2) - rooms[strongest]
            n1 = _selective_needed(short, flight * save1, held, n2, strongest, g.modes)
            time = np.where((n1 >= 0) & (n1 + n2 <= held), n1 * cost1 + n2 * cost2, BIG)
            better = time < best[at]
            best[at[better]] = time[better]
            best1[at[better]], best2[at[better]] = n1[better], n2
    return (best < BIG).reshape(shape), best1.reshape(shape), best2.reshape(shape)


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
    allowed = t.time < BIG
    if not allowed.any(axis=1).all() or t.least_bottleneck is None:
        return None
    best, chosen, floor_time = below, None, t.least_bottleneck
    floor_once = _least_maximum(t, t.once, allowed) or 0
    least = _Least(t, allowed, floor_once)
    limit: int | None = floor_once
    while limit is not None:
        check()
        cap = least.cap(best, limit)
        # A plan not seen under a lower limit has a max D of at least this one.
        mask = allowed & (t.once <= limit) & (t.time <= cap)
        start = _least_maximum(t, t.time, mask) if cap >= floor_time else None
        for threshold in [] if start is None else np.unique(t.time[mask & (t.time >= start)]).tolist():
            if t.objective(threshold, least.sum, floor_once) >= best:
                break
            check()
            found = _least_sum(t, mask & (t.time <= threshold))
            if found is not None and (value := t.value(found[1])) < best:
                best, chosen = value, found[1]
        limit = least.next_limit(best, limit, floor_time)
    return None if chosen is None else (best, chosen)


class _Least:
    """The least sum of R over windows that a better plan could use; it grows as the best value falls."""

    def __init__(self, t: Tables, allowed: Bools, floor_once: int):
        self.t, self.allowed, self.floor_once = t, allowed, floor_once
        found = _least_sum(t, allowed)
        self.sum = found[0] if found else int(BIG)
        self.best: int | None = None

    def cap(self, best: int, limit: int) -> int:
        """The largest bottleneck of a plan under `best` whose max D is at least `limit`."""
        room = best - 1 - self.sum + self.t.credit - self.t.chunks * limit
        return room // self.t.factor if self.t.factor else (int(BIG) if room >= 0 else -1)

    def next_limit(self, best: int, limit: int, floor_time: int) -> int | None:
        """The next limit on D that a better plan could have, None when there is none."""
        if best != self.best:
            self.best = best
            found = _least_sum(self.t, self.allowed & (self.t.time <= self.cap(best, self.floor_once)))
            self.sum = found[0] if found else int(BIG)
        usable = self.allowed & (self.t.time <= self.cap(best, limit)) & (self.t.once > limit)
        following = int(self.t.once[usable].min(initial=int(BIG)))
        return following if following < BIG and self.cap(best, following) >= floor_time else None


def _least_maximum(t: Tables, values: Ints, mask: Bools) -> int | None:
    """The least max of `values` over splits of allowed entries, None without any."""
    (entry, start), best = _joins(t, mask), _nowhere(t)
    best[0] = 0
    for mine in _padded(np.where(mask, values, BIG)):
        best[:-1] = np.maximum(best[start], mine[entry]).min(axis=1, initial=BIG)
    return int(best[-2]) if best[-2] < BIG else None


def _joins(t: Tables, mask: Bools) -> tuple[Ints, Ints]:
    """(entry, start) of the windows by end and size, of sizes that some rank may hold."""
    entry, start = t.from_end
    allowed = np.append(mask.any(axis=0), False)
    sizes = np.nonzero(allowed[entry].any(axis=0))[0]
    return entry[:, sizes], start[:, sizes]


def _nowhere(t: Tables) -> Ints:
    """A value for each position, and one for where no window starts or ends: all infinite."""
    return np.full(t.positions + 2, BIG, dtype=np.int64)


def _padded(values: Ints) -> Ints:
    """`values` of entries, and an infinite one for windows that do not exist."""
    return np.concatenate([values, np.full((len(values), 1), BIG, dtype=np.int64)], axis=1)


def _least_sum(t: Tables, mask: np.ndarray) -> tuple[int, list[int]] | None:
    """The least sum of R over splits of allowed entries, and the split: of equal ones that of the shortest last windows."""
    (entry, start), best = _joins(t, mask), _nowhere(t)
    if not entry.shape[1]:
        return None
    best[0] = 0
    before, every = [], np.arange(t.positions + 1)
    for mine in _padded(np.where(mask, t.time, BIG)):
        reached = best[start] + mine[entry]
        chosen = reached.argmin(axis=1)
        best[:-1] = np.minimum(reached[every, chosen], BIG)
        before.append(start[every, chosen])
    if best[-2] >= BIG:
        return None
    sizes, at = [], t.positions
    for starts in reversed(before):
        sizes.append(at - int(starts[at]))
        at -= sizes[-1]
    return int(best[-2]), t.split(sizes[::-1])


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

    kept = _arcs(t, below)
    if any(not len(arcs) for arcs in kept):
        return Verdict("INFEASIBLE", None, None)
    model: Any = cp_model.CpModel()
    rows = [s for s, arcs in enumerate(kept) for _ in arcs]
    arcs = np.concatenate(kept)
    starts, sizes, entries = (arcs[:, i].tolist() for i in range(3))
    time = [int(t.time[s, e]) for s, e in zip(rows, entries, strict=True)]
    once = [int(t.once[s, e]) for s, e in zip(rows, entries, strict=True)]
    layers = [n * t.chunks for n in sizes]
    x = [model.new_bool_var("") for _ in rows]
    slowest = model.new_int_var(0, max(time), "max R")
    largest = model.new_int_var(0, max(once), "max D")
    for s in range(len(kept)):
        mine = [i for i, row in enumerate(rows) if row == s]
        model.add_exactly_one([x[i] for i in mine])
        model.add(slowest >= sum(time[i] * x[i] for i in mine))
        model.add(largest >= sum(once[i] * x[i] for i in mine))
    if t.anywhere:
        model.add(sum(n * b for n, b in zip(sizes, x, strict=True)) == t.positions)
    else:
        _join(model, x, rows, starts, sizes)
    total = t.factor * slowest + sum(c * b for c, b in zip(time, x, strict=True)) + t.chunks * largest
    if t.credit:  # the larger of two terms
        first, total = total - t.credit, model.new_int_var(0, max(below - 1, 0), "T")
        model.add(total >= first)
        model.add(total >= (t.factor + 1) * slowest + t.chunks * largest)
    model.add(total <= below - 1)
    if canonical:
        scale = len(kept) * t.n_layers + 1
        model.minimize(sum((n * n * scale - n * s) * b for n, s, b in zip(layers, rows, x, strict=True)))
    else:
        model.minimize(total)
    solver: Any = deterministic_solver()
    solver.parameters.cp_model_presolve = len(x) > _TOO_SMALL
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Verdict(solver.status_name(status), None, None)
    held = [0] * len(kept)
    for s, n, b in zip(rows, sizes, x, strict=True):
        if solver.value(b):
            held[s] = n
    split = t.split(held)
    return Verdict(solver.status_name(status), t.value(split), split)


def _join(model: Any, x: list[Any], rows: list[int], starts: list[int], sizes: list[int]) -> None:
    """Every rank's window starts where the one before ends. Windows outside the sequence's ends were dropped before."""
    ends: dict[tuple[int, int], list[Any]] = {}
    begins: dict[tuple[int, int], list[Any]] = {}
    for s, a, n, b in zip(rows, starts, sizes, x, strict=True):
        begins.setdefault((s, a), []).append(b)
        ends.setdefault((s + 1, a + n), []).append(b)
    for place in sorted(ends.keys() | begins.keys()):
        if 0 < place[0] <= rows[-1]:
            model.add(sum(ends.get(place, [])) == sum(begins.get(place, [])))


def deterministic_solver() -> Any:
    """A CP-SAT solver whose answer depends on nothing but the model."""
    from ortools.sat.python import cp_model

    solver: Any = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 1
    solver.parameters.max_deterministic_time = DETERMINISTIC_TIME
    solver.parameters.catch_sigint_signal = False  # Ctrl-C is ours: a model takes milliseconds, then Python raises
    return solver


def _arcs(t: Tables, below: int) -> list[Ints]:
    """(start, positions, entry) of each rank's windows that a split under `below` could use, rows of an array a rank.

    A window is dropped when the least sum and the least maximum through it, with the least D, are too long. Where windows do
    not differ by their place, one stands for those of its size.
    """
    fits = t.time < BIG
    if not fits.any(axis=1).all():
        return [np.zeros((0, 3), dtype=np.int64)] * len(fits)
    once = t.chunks * np.maximum(t.once, np.where(fits, t.once, BIG).min(axis=1).max())
    (sums, sums_after), (peaks, peaks_after) = t.least_sums, t.least_peaks
    entry, end = t.from_start
    own, later = _padded(np.where(fits, t.time, BIG)), _padded(once)
    keep = []
    for s in range(len(own)):
        time = own[s][entry]
        through = np.minimum(sums[s, :-1, None] + sums_after[s + 1][end], BIG) + time
        peak = np.maximum(np.maximum(peaks[s, :-1, None], peaks_after[s + 1][end]), time)
        reached = (through < BIG) & (peak < BIG)
        least = t.factor * np.where(reached, peak, 0) + later[s][entry] + through - t.credit
        usable = reached & (least < below)
        if t.anywhere:
            size = np.nonzero(usable.any(axis=0))[0]
            start = np.zeros_like(size)
        else:
            size, start = np.nonzero(usable.T)
        keep.append(np.stack([start, size + 1, entry[start, size]], axis=1))
    return keep


def _potentials(t: Tables, join: np.ufunc) -> tuple[Ints, Ints]:
    """The least sum (or maximum) of R over the ranks before each (rank, position), and from it to the end.

    The position after the last is where windows end that do not exist.
    """
    pp, time = t.time.shape[0], _padded(t.time)
    before, after = (np.full((pp + 1, t.positions + 2), BIG) for _ in range(2))
    before[0, 0], after[pp, t.positions] = 0, 0
    entry, start = t.from_end
    for s in range(pp):
        before[s + 1, :-1] = join(before[s][start], time[s][entry]).min(axis=1, initial=BIG)
    entry, end = t.from_start
    for s in reversed(range(pp)):
        after[s, :-1] = join(after[s + 1][end], time[s][entry]).min(axis=1, initial=BIG)
    return before, after
