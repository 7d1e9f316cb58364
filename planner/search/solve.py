"""The search: raise a target until a plan is found below it, and account for every row.

At the end each enumerated row is excluded by a counted rule, proven not to fit, proven slower by its bound, or solved
exactly; `open` counts the rest, and is zero unless the search was interrupted.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from planner import stopping
from planner.cost import devicetypes, primitives, step
from planner.cost.blending import Stack
from planner.cost.primitives import Primitives
from planner.cost.task import Bools, Ints, LayoutArray, StageArray, Task
from planner.engines.base import Engine
from planner.search import bounds, hetero, incumbent, mixed, stages
from planner.search.alike import distinct
from planner.search.bounds import BIG, Group
from planner.search.space import Rows, Space, enumerate_rows
from planner.specs.layout import Layout, Stage, format_recompute

GROWTH = (1.02, 1.02, 1.03, 1.04, 1.05, 1.06, 1.08, 1.1, 1.15, 1.2, 1.3, 1.5, 2.0, 4.0, 16.0, 256.0)
"""Factors between targets; after the last the target is infinite."""
GUESS = 1.01
"""Factor on the first target, which is guessed from the bounds of a sample (`_first_target`)."""
_MASTER_ROWS = 100
Progress = Callable[[str, int, int], None]


class SearchError(RuntimeError):
    """Two exact methods disagree: a defect, never the user's fault."""


@dataclass(frozen=True)
class Candidate:
    """A row solved exactly."""

    row: int
    step_ns: int
    layout: Layout


@dataclass
class Counts:
    """How the rows of the space were settled."""

    enumerated: int
    by_rule: int
    by_memory: int = 0
    by_bound: int = 0
    exact: int = 0
    open: int = 0
    rules: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What the search proved. `candidates` holds the plan first, then the best of other (tp, cp, pp, ep)."""

    status: str
    """optimal, infeasible, or interrupted."""
    candidates: tuple[Candidate, ...]
    bound_ns: int | None
    counts: Counts
    seconds: float
    solver: str
    stopped_by: str = ""
    """signal or limit when the search ended early; the plan may be optimal all the same, the others unproven."""


@dataclass
class _State:
    """What is known of each row."""

    task: Task
    space: Space
    layouts: LayoutArray
    p: Primitives
    bound: Ints
    """Proven lower bound, BIG when the row does not fit."""
    fits: Bools
    examined: Bools
    """Solved exactly, perhaps only far enough to prove that nothing lies below a cutoff: `bound` says which."""
    known: Bools
    """The row's least value is known: it is its bound."""
    stack: Stack | None = None
    """Primitives by kind of layers, where the model mixes several."""
    values: dict[int, tuple[int, stages.Tables]] = field(default_factory=dict)
    """Row -> (step ns, tables that have its splits) for rows with a plan."""
    groups: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Rows with equal (tp, cp, pp, ep) share a number."""
    best: dict[int, int] = field(default_factory=dict)
    """Group -> least value found."""

    def group(self, rows: Ints) -> Group:
        """Rows with one pp as a `Group`."""
        return group_of(self.task, self.space.modes, self.layouts, self.p, self.stack, rows)

    def kth(self, k: int) -> int:
        """The k-th best value over distinct groups, BIG while there are fewer."""
        values = sorted(self.best.values())
        return values[k - 1] if len(values) >= k else int(BIG)

    @property
    def optimum(self) -> int:
        """The least value found, ns; BIG before any."""
        return min(self.best.values(), default=int(BIG))


def search(
    task: Task,
    engine: Engine,
    space: Space,
    k: int = 5,
    progress: Progress | None = None,
    time_limit: float | None = None,
) -> Outcome:
    """The proven optimum of `space`, and the best plans of the k - 1 next (tp, cp, pp, ep).

    `time_limit` (seconds) or a signal end it early with status `interrupted`, the best plans so far (of an even split where
    no row was solved: `incumbent`), and a bound that still holds. Raises TimeoutError or KeyboardInterrupt when that happens
    before the rows have bounds.
    """
    started = time.perf_counter()
    with stopping.limit(time_limit):
        rows = enumerate_rows(task, engine, space)
        state = _prepare(task, space, rows)
        return settle(state, rows, k, progress, started)


def settle(state: _State, rows: Rows, k: int, progress: Progress | None, started: float) -> Outcome:
    """The outcome of a search whose rows have first bounds; `started` by `time.perf_counter`."""
    report = progress or (lambda phase, done, total: None)
    counts = Counts(rows.enumerated, rows.by_rule, rules=rows.rejected)
    stopped_by = ""
    try:
        _raise_target(state, k, report)
    except (KeyboardInterrupt, TimeoutError) as reason:
        stopped_by = "limit" if isinstance(reason, TimeoutError) else "signal"
    # The memory test of mixed models forgives a few bytes: rows without a plan below the infinite target do not fit.
    none = state.fits & ~state.known & (state.bound >= bounds.INFINITE)
    state.fits[none], state.bound[none] = False, BIG
    counts.by_memory = int(np.count_nonzero(~state.fits))
    chosen = _choose(state, k, bool(stopped_by)) or (_even(state) if stopped_by else ())
    best = chosen[0].step_ns if chosen else int(BIG)
    left = state.fits & ~state.known & (state.bound <= best)
    counts.open = int(np.count_nonzero(left))
    counts.exact = int(np.count_nonzero(state.fits & state.examined & ~left))
    counts.by_bound = int(np.count_nonzero(state.fits & ~state.examined & ~left))
    status = "interrupted" if stopped_by and counts.open else "optimal" if chosen else "infeasible"
    lowest = int(state.bound[left].min(initial=best)) if counts.open else best
    bound = None if lowest >= BIG else lowest
    return Outcome(status, chosen, bound, counts, time.perf_counter() - started, solver_name(), stopped_by)


def solver_name() -> str:
    """Solver and version, for the certificate."""
    from importlib.metadata import version

    return f"DP and OR-Tools CP-SAT {version('ortools')}"


# ---- preparation ---------------------------------------------------------------------------------------------------


def _prepare(task: Task, space: Space, rows: Rows) -> _State:
    """Primitives, the exact memory test, and the first bound of every row."""
    x = rows.layouts
    p, stack = price(task, x)
    size = len(x)
    none = np.zeros(size, dtype=bool)
    state = _State(task, space, x, p, np.full(size, BIG), none.copy(), none.copy(), none.copy(), stack)
    for chunk in bounds.same_pipeline(x, np.arange(size), task.model):
        stopping.check()
        g = state.group(chunk)
        fits = memory_feasible(task, g)
        state.fits[chunk] = fits
        state.bound[chunk] = np.where(fits, _simple_bound(task, g), BIG)
    state.groups = distinct(np.stack([x.tp, x.cp, x.pp, x.ep]))[1]
    return state


def _simple_bound(task: Task, g: Group) -> Ints:
    """Lower bound on T without memory, ns, shape (rows,)."""
    if task.types:
        return hetero.simple_bound(task, g)
    return mixed.simple_bound(task, g) if g.stack else bounds.simple_bound(g)


def _target_bound(task: Task, g: Group, target: int) -> Ints:
    """Lower bound on T, valid below `target`, ns, shape (rows,)."""
    if task.types:
        return hetero.target_bound(task, g, target)
    return mixed.target_bound(task, g, target) if g.stack else bounds.target_bound(g, target)


def price(task: Task, x: LayoutArray) -> tuple[Primitives, Stack | None]:
    """(primitives of each row, those by kind of layers where the model mixes several and the first are its last kind's).

    With several device types their axis is the last one.
    """
    if task.types:
        return hetero.price(task, x)
    if task.model.homogeneous:
        return primitives.price(task, x), None
    kinds = [primitives.price(task.only(k), x) for k in range(len(task.model.kinds))]
    return kinds[task.model.text_kind], Stack.of(kinds, task.model.text_kind)


def with_limit(task: Task, p: Primitives, stack: Stack | None) -> tuple[Primitives, Stack | None]:
    """What was priced, under the memory limit of `task`: nothing else depends on it."""
    p = replace(p, capacity=primitives.capacity(task, p.outside))
    return p, None if stack is None else stack.with_capacity(p.capacity)


def group_of(task: Task, modes: tuple[int, ...], x: LayoutArray, p: Primitives, stack: Stack | None, rows: Ints) -> Group:
    """Rows with one pipeline degree (and one v, where places matter: `by_place`) as a `Group`."""
    if task.types:
        return hetero.group_of(task, modes, x, p, stack, rows)
    own = p.take(rows)
    g = bounds.group_of(own, x.take(rows), task.model.n_layers, modes)
    if not bounds.by_place(task.model, x.virtual_stages[rows[:1]])[0]:
        return g
    return replace(g, stack=Stack.of([own]) if stack is None else stack.take(rows))


def memory_feasible(task: Task, g: Group) -> Bools:
    """Which rows of a group have any split and recompute that fits."""
    return mixed.memory_feasible(task, g) if g.stack else bounds.memory_feasible(g)


# ---- the rising target ---------------------------------------------------------------------------------------------


def _raise_target(state: _State, k: int, report: Progress) -> None:
    """Settle rows below ever higher targets until k distinct plans are proven, or every row is settled."""
    if not state.fits.any():
        return
    target = _first_target(state, k)
    for growth in (1.0, *GROWTH, None):
        target = min(int(target * growth) + 1, int(bounds.INFINITE)) if growth is not None else int(bounds.INFINITE)
        _refine(state, target, k)
        todo = np.nonzero(state.fits & ~state.known & (state.bound < target))[0]
        todo = todo[np.lexsort((*_preferences(state.layouts, todo)[::-1], state.bound[todo]))]
        for done, row in enumerate(todo.tolist()):
            report("exact", done, len(todo))
            stopping.check()
            if state.bound[row] > max(state.kth(k), state.optimum):
                break
            if state.bound[row] < state.best.get(int(state.groups[row]), BIG) or state.bound[row] <= state.optimum:
                _solve(state, row, target, k)
        report("target", int(np.count_nonzero(state.bound >= min(target, state.optimum))), len(state.layouts))
        if state.kth(k) < target or not np.any(state.fits & ~state.known & (state.bound <= state.kth(k))):
            return


def _first_target(state: _State, k: int) -> int:
    """A little more than the k-th plan is likely to take: any target would do, but each one bounds all rows below it anew.

    Of each pipeline degree, with and without chunks, a few rows of the least first bounds are bounded as far as matters; the
    k-th least of these bounds over distinct groups is seldom more than a few percent off.
    """
    x, lowest, rows = state.layouts, int(state.bound[state.fits].min()), np.nonzero(state.fits)[0]
    rows = rows[np.lexsort((rows, state.bound[rows], x.virtual_stages[rows] > 1, x.pp[rows]))]
    family = 2 * x.pp[rows] + (x.virtual_stages[rows] > 1)
    first = np.searchsorted(family, family)  # of the same family
    sample = rows[np.arange(len(rows)) - first < 2 * (k + 1)].tolist()
    families = [list(some) for _, some in itertools.groupby(sample, lambda r: (x.pp[r], x.virtual_stages[r] > 1))]
    least, limit = np.full(int(state.groups.max()) + 1, BIG), min(2 * lowest, int(bounds.INFINITE))
    for members in sorted(families, key=lambda some: int(state.bound[some[0]])):
        some = np.array(members)
        some = some[state.bound[some] < limit]
        _bound_below(state, some, limit)
        close = some[state.bound[some] < limit]
        np.minimum.at(least, state.groups[close], state.bound[close])
        limit = min(limit, int(np.partition(least, min(k, len(least)) - 1)[min(k, len(least)) - 1]))
    found = np.sort(least[least < BIG], kind="stable")
    return max(int(found[min(k, len(found)) - 1] * GUESS), lowest) if len(found) else lowest


def _refine(state: _State, target: int, k: int) -> None:
    """Raise the bounds of rows below the target, where they could still matter."""
    rows = np.nonzero(state.fits & ~state.known & (state.bound < min(target, state.kth(k) + 1)))[0]
    _bound_below(state, rows, target)


def _bound_below(state: _State, rows: Ints, target: int) -> None:
    """Raise the bounds of rows, as far as the target."""
    for chunk in bounds.same_pipeline(state.layouts, rows, state.task.model):
        stopping.check()
        g = state.group(chunk)
        better = np.minimum(_target_bound(state.task, g, target), target)
        state.bound[chunk] = np.maximum(state.bound[chunk], better)


def _solve(state: _State, row: int, target: int, k: int) -> None:
    """Solve one row exactly below what still matters; both methods must agree."""
    own = state.best.get(int(state.groups[row]), int(BIG))
    cutoff = min(target, max(min(own, state.kth(k)), state.optimum) + 1)
    t = _tables_below(state, row, cutoff)
    v, constant = int(state.layouts.virtual_stages[row]), int(state.p.constant[row].max())
    found = None
    if t is not None:
        below = (cutoff - constant - 1) * v + 1
        found = stages.best_split(t, below, stopping.check)
        _agree(t, below, found)
    # Not before: an interruption while it is solved leaves the row open.
    state.examined[row], state.bound[row] = True, max(int(state.bound[row]), cutoff)
    if t is None or found is None:
        return
    value = -(-found[0] // v) + constant
    state.bound[row], state.known[row] = value, True
    state.values[row] = (value, t)
    group = int(state.groups[row])
    state.best[group] = min(state.best.get(group, int(BIG)), value)


def _tables_below(state: _State, row: int, cutoff: int) -> stages.Tables | None:
    """The exact tables of a row with all that a plan below `cutoff` can use; None when it cannot use anything."""
    task, g = state.task, state.group(np.array([row]))
    if task.types:
        reach = hetero.reach_below(task, g, cutoff)
    else:
        reach = mixed.reach_below(task, g, cutoff) if g.stack else bounds.reach_below(g, cutoff)
    if reach[0] < g.least[0, 0]:  # not even one layer a chunk
        return None
    only = mixed.useful(task, g, int(reach[0]), cutoff) if g.stack and not task.types else None
    return None if only is not None and not len(only.counts) else stages.tables(g, task, int(reach[0]), only)


def _agree(t: stages.Tables, below: int, found: tuple[int, list[int]] | None) -> None:
    """CP-SAT must reproduce the dynamic program's value and find nothing below it."""
    value = below if found is None else found[0]
    if found is not None:
        again = stages.cp_sat(t, value + 1)
        if again.status != "OPTIMAL" or again.value != value:
            raise SearchError(f"CP-SAT says {again.status} {again.value}, dynamic programming {value}")
    verdict = stages.cp_sat(t, value)
    if verdict.status != "INFEASIBLE":
        raise SearchError(f"CP-SAT says {verdict.status} {verdict.value} below {value}, dynamic programming nothing")


# ---- the choice ----------------------------------------------------------------------------------------------------


def _choose(state: _State, k: int, stopped: bool) -> tuple[Candidate, ...]:
    """The plan (by the master), then the best of the other groups; each with its canonical split."""
    if not state.values:
        return ()
    winner = _master(state, stopped)
    rows = [winner]
    seen = {int(state.groups[winner])}
    for row in sorted(state.values, key=lambda r: (state.values[r][0], _preference(state.layouts, r))):
        if int(state.groups[row]) not in seen and len(rows) < k:
            seen.add(int(state.groups[row]))
            rows.append(row)
    return tuple(_candidate(state, row) for row in rows)


_PREFERENCE = (
    "offload", "order", "context", "zero", "virtual_stages", "cp", "ep", "etp", "tp", "pp", "schedule", "sequence_parallel",
    "micro_batch", "type_order",
)  # fmt: skip
"""Ties between rows of equal time or bound go to the lower value, first name first. Documented in the README. No two rows of
a space are equal in all of them (dp follows), so the order in which rows were enumerated never matters."""


def _preferences(x: LayoutArray, rows: Ints) -> list[Ints]:
    """The columns of `_PREFERENCE` at `rows`."""
    return [getattr(x, name)[rows] for name in _PREFERENCE]


def _preference(x: LayoutArray, row: int) -> tuple[int, ...]:
    """Tie-break between rows of equal time: fewer moving parts first."""
    return tuple(int(getattr(x, name)[row]) for name in _PREFERENCE)


def _master(state: _State, stopped: bool) -> int:
    """CP-SAT chooses among the rows with the least proven bounds: degrees, micro-batch, ZeRO stage, schedule and T.

    The proven bounds are the objective column (logic-based Benders; every exact solve is a cut); ties go by rank.
    """
    from ortools.sat.python import cp_model

    rows = np.nonzero(state.fits)[0]
    rows = rows[np.lexsort((rows, state.bound[rows]))][:_MASTER_ROWS]
    rows = np.unique(np.concatenate([rows, np.array(sorted(state.values))]))
    x = state.layouts
    order = sorted(rows.tolist(), key=lambda r: (r not in state.values, _preference(x, r)))
    rank = {row: i for i, row in enumerate(order)}
    names = (
        "tp", "cp", "pp", "dp", "ep", "etp", "micro_batch", "zero", "schedule", "virtual_stages", "sequence_parallel",
        "offload", "order", "context",
    )  # fmt: skip
    levels = np.unique(state.bound[rows])  # ranks of the bounds instead of nanoseconds: small numbers
    level = {row: int(np.searchsorted(levels, state.bound[row])) for row in rows.tolist()}
    table = [(*(int(getattr(x, n)[r]) for n in names), rank[r], level[r]) for r in rows.tolist()]
    model: Any = cp_model.CpModel()
    columns = [
        model.new_int_var_from_domain(cp_model.Domain.from_values(sorted({t[i] for t in table})), n)
        for i, n in enumerate((*names, "rank", "T"))
    ]
    model.add_allowed_assignments(columns, table)
    model.minimize(columns[-1] * (len(order) + 1) + columns[-2])
    solver: Any = stages.deterministic_solver()
    found = solver.solve(model) == cp_model.OPTIMAL
    chosen = order[solver.value(columns[-2])] if found else -1
    if chosen in state.values and int(state.bound[chosen]) == state.optimum:
        return chosen
    if stopped or np.any(state.fits & ~state.known & (state.bound < state.optimum)):  # the best found so far
        return min(state.values, key=lambda r: (state.values[r][0], _preference(x, r)))
    raise SearchError(f"the master chose row {chosen}, the search found {state.optimum} ns")


def _candidate(state: _State, row: int) -> Candidate:
    """The canonical plan of a row; re-evaluated by the cost model, which must give the same integer."""
    value, t = state.values[row]
    v, constant = int(state.layouts.virtual_stages[row]), int(state.p.constant[row].max())
    verdict = stages.cp_sat(t, (value - constant) * v + 1, canonical=True)
    if verdict.status != "OPTIMAL" or verdict.split is None:
        raise SearchError(f"the tie-break of a plan is {verdict.status}")
    layout = layout_of(state.layouts, row, t, verdict.split)
    x = LayoutArray.of([layout], state.task.job)
    cost = _evaluate(state, row, layout, x)
    if int(cost.step[0]) != value or not bool(cost.fits[0]):
        raise SearchError(f"the plan evaluates to {int(cost.step[0])} ns (fits: {bool(cost.fits[0])}), the search says {value}")
    return Candidate(row, value, layout)


def _even(state: _State) -> tuple[Candidate, ...]:
    """The best even split, where no row was solved: a plan all the same, re-evaluated like any other."""
    order = np.nonzero(state.fits)[0]
    order = order[np.lexsort((*_preferences(state.layouts, order)[::-1], state.bound[order]))]
    modes, bound = state.space.modes, state.bound
    if state.task.types:
        found = incumbent.first_even(state.task, state.layouts, modes, order, bound)
    else:
        found = incumbent.best_even(state.task, state.layouts, (state.p, state.stack), modes, order, bound)
    if found is None:
        return ()
    cost = _evaluate(state, found.row, found.layout, LayoutArray.of([found.layout], state.task.job))
    if int(cost.step[0]) != found.step_ns or not bool(cost.fits[0]):
        raise SearchError(f"the even split evaluates to {int(cost.step[0])} ns, the scan says {found.step_ns}")
    return (Candidate(found.row, found.step_ns, found.layout),)


def _evaluate(state: _State, row: int, layout: Layout, x: LayoutArray) -> step.StepCost:
    """The cost model's own verdict on a layout of a row."""
    if state.task.types:
        return devicetypes.layout_cost(state.task, layout).total
    only, ranks = np.array([row]), StageArray.of([layout])
    blended = None
    if state.stack is not None:
        kinds = state.stack.take(only).take(ranks.row)
        blended = step.blended_ranks(state.task, kinds, [layout], x.microbatches)
    return step.step_cost(state.p.take(only), x, ranks, blended)


def layout_of(x: LayoutArray, row: int, t: stages.Tables, split: list[int]) -> Layout:
    """The spec layout of a row with a split and its tables' recompute counts."""
    listed = []
    for s, (n, entry) in enumerate(zip(split, t.columns(split), strict=True)):
        selective, full = int(t.selective[s, entry]), int(t.full[s, entry])
        listed.append(Stage(layers=n, recompute=format_recompute(n, selective, full)))
    return x.layout(row, listed)
