"""Which constraints cannot hold together: minimal sets, by CP-SAT assumptions and a deletion filter.

Comes in: rows of the grid with the rules they break, or the exact tables of one row that does not fit. Goes out: a set of
constraints that is unsatisfiable and loses that with any member. Presolve is off: with it a core may name literals that are
no assumptions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.cost.task import Bools, LayoutArray, Task
from planner.engines.base import Engine
from planner.engines.rule import Rule
from planner.search.bounds import BIG
from planner.search.solve import SearchError
from planner.search.stages import Tables, deterministic_solver

Constrain = Callable[[Any, Sequence[Any]], None]
"""Adds constraints to a model; the i-th literal enforces the i-th one."""


@dataclass(frozen=True)
class MemoryCore:
    """A minimal conflict of one row: these ranks cannot stay inside their memory, and hold all layers if `placed`."""

    stages: tuple[int, ...]
    placed: bool


def minimal_core(size: int, constrain: Constrain) -> tuple[int, ...] | None:
    """Which of `size` constraints conflict, as few as the deletion filter leaves; None when all hold together.

    Raises SearchError when CP-SAT does not decide.
    """
    from ortools.sat.python import cp_model

    model: Any = cp_model.CpModel()
    literals = [model.new_bool_var("") for _ in range(size)]
    constrain(model, literals)
    solver: Any = deterministic_solver()
    solver.parameters.cp_model_presolve = False
    place = {literal.index: i for i, literal in enumerate(literals)}

    def refuted(members: Sequence[int]) -> bool:
        model.clear_assumptions()
        model.add_assumptions([literals[i] for i in members])
        status = solver.solve(model)
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE, cp_model.INFEASIBLE):
            raise SearchError(f"CP-SAT says {solver.status_name(status)} about a conflict")
        return bool(status == cp_model.INFEASIBLE)

    if not refuted(range(size)):
        return None
    named = solver.sufficient_assumptions_for_infeasibility()
    core = sorted({place[i] for i in named if i in place})
    if len(core) < size and not refuted(core):
        core = list(range(size))
    for member in reversed(core.copy()):
        rest = [i for i in core if i != member]
        if refuted(rest):
            core = rest
    return tuple(core)


# ---- rules ---------------------------------------------------------------------------------------------------------


def broken(task: Task, engine: Engine, x: LayoutArray) -> Bools:
    """Which rows break which rule of the engine, shape (rows, rules)."""
    return np.stack([np.asarray(rule.violated(task, x)) for rule in engine.all_rules], axis=1)


def rule_core(engine: Engine, breaks: Bools) -> tuple[Rule, ...]:
    """Rules that no row obeys together, each needed for that; () when some row breaks none."""
    signatures = np.unique(breaks, axis=0)
    used = np.nonzero(signatures.any(axis=0))[0]
    # The filter tries to do without the last ones first: without the rule about all degrees, that says least.
    used = np.array(sorted(used.tolist(), key=lambda i: engine.all_rules[i].code == "PLN201"), dtype=np.int64)

    def constrain(model: Any, literals: Sequence[Any]) -> None:
        rows = [model.new_bool_var("") for _ in signatures]
        model.add_exactly_one(rows)
        for row, signature in zip(rows, signatures, strict=True):
            for i in np.nonzero(signature[used])[0].tolist():
                model.add_bool_or([~literals[i], ~row])

    core = minimal_core(len(used), constrain) or ()
    return tuple(engine.all_rules[int(used[i])] for i in core)


# ---- memory --------------------------------------------------------------------------------------------------------


def memory_core(t: Tables, fullest: int | None = None) -> MemoryCore | None:
    """The ranks of one row whose memory limits conflict, with "all layers are placed" where it takes part; None when it fits.

    A rank without its limit may hold any run of layers, at least one position of the sequence like every other. Where the
    rank `fullest` can hold nothing at all, it is the conflict, of the several that there may be.
    """
    pp, end = t.time.shape[0], t.positions
    fits = t.time < BIG
    if fullest is not None and not fits[fullest].any():
        return MemoryCore((fullest,), False)

    def constrain(model: Any, literals: Sequence[Any]) -> None:
        # ends[s][b]: the layers of rank s - 1 end, and those of rank s begin, at position b.
        ends = [[model.new_bool_var("") for _ in range(end + 1)] for _ in range(pp + 1)]
        for place in ends:
            model.add_exactly_one(place)
        model.add_bool_or([ends[0][0]])
        model.add_bool_or([~literals[pp], ends[pp][end]])
        for s in range(pp):
            for a in range(end + 1):
                model.add_bool_or([~ends[s][a], *ends[s + 1][a + 1 :]])
                model.add_bool_or([~literals[s], ~ends[s][a], *(ends[s + 1][a + n] for n in held(s, a))])

    def held(s: int, a: int) -> list[int]:
        """Sizes of the windows from position `a` that fit on rank s."""
        row = t.at[0 if t.anywhere else a]
        sizes = range(1, min(end - a, len(row) - 1) + 1)
        return [n for n in sizes if row[n] >= 0 and fits[s, row[n]]]

    core = minimal_core(pp + 1, constrain)
    if core is None:
        return None
    return MemoryCore(tuple(s for s in core if s < pp), pp in core)
