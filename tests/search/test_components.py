"""Every part of a bound, and every limit by which the exact solvers leave something out, perturbed by one unit: a test fails.

What is perturbed: the functions of `bounds`, `mixed`, `hetero` and `stages` that bound something from below (one nanosecond
more) or limit something from above (one nanosecond or layer less), one at a time, in the place where the search uses them.
`test_mutations` does so for the whole bounds and memory tests.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from planner.search import bounds, filling, hetero, mixed, stages
from planner.search.bounds import BIG
from planner.search.solve import SearchError, search
from search.grids import Grid, grid, on_two_types, tight, violations

TWO = (1, 3, 5, 7)
NONE = {"memory": 0, "simple": 0, "target": 0}


def grid_named(name: str) -> Grid:
    """`dense`, `mixed tight`, `two 3`."""
    kind, _, which = name.partition(" ")
    return on_two_types(int(which)) if kind == "two" else tight(kind) if which else grid(kind)


def off(real: Callable[..., Any], unit: int) -> Callable[..., Any]:
    """The function with finite results off by `unit`."""

    def perturbed(*args: Any) -> Any:
        found = real(*args)
        return np.where(found < BIG, found + unit, found)

    return perturbed


def answers(g: Grid) -> bool:
    """Whether the search gives the least exact value, and no method contradicts another."""
    try:
        outcome = search(g.task, g.engine, g.space, k=3)
    except SearchError:
        return False
    fitting = g.exact[g.exact >= 0]
    best = outcome.candidates[0].step_ns if outcome.candidates else None
    return best == (int(fitting.min()) if len(fitting) else None) and outcome.counts.by_memory == int((g.exact < 0).sum())


@pytest.mark.parametrize("name", ["dense", "mixed", "mixed tight", "dense tight", *(f"two {seed}" for seed in TWO)])
def test_nothing_is_found_where_nothing_is_perturbed(name):
    g = grid_named(name)
    assert violations(g) == NONE
    assert answers(g)


# ---- bounds --------------------------------------------------------------------------------------------------------

MORE = (
    *((bounds, name, "dense") for name in (
        "_base_total", "least_layer", "_least_once", "to_step", "least_recompute", "_relaxed", "_smallest_maximum",
        "_smallest_once", "_smallest_sum", "_table_bound", "simple_bound", "target_bound",
    )),
    *((mixed, name, "mixed") for name in (
        "_least_layers", "_work", "_base_total", "least_maximum", "least_sum", "_step_of", "chain_bound", "target_bound",
    )),
    *((hetero, name, "two 3") for name in ("_layers", "_least_total", "target_bound")),
    (mixed, "least_maximum", "two 3"), (mixed, "least_sum", "two 3"), (mixed, "chain_bound", "two 3"),
)  # fmt: skip
"""Lower bounds, and the grid on which each is exact somewhere."""
LESS = (
    (bounds, "allowed_bottleneck", "dense"), (bounds, "reach_below", "dense"), (bounds, "most_layers", "dense"),
    (mixed, "reach_below", "mixed"), (hetero, "reach_below", "two 3"),
)  # fmt: skip
"""Upper limits."""
LOOSE = (
    (mixed, "_least_once", "mixed", 1), (mixed, "simple_bound", "mixed", 1), (mixed, "_allowed_bottleneck", "mixed", -1),
    (hetero, "_least_once", "two 3", 1), (hetero, "simple_bound", "two 3", 1), (hetero, "_least_slowest", "two 3", 1),
    (hetero, "_allowed", "two 3", -1),
)  # fmt: skip
"""Bounds that leave out what layers do once a step, and what follows from them: never exact, one unit is within them."""


@pytest.mark.parametrize(("where", "name", "on"), MORE)
def test_a_part_that_is_one_nanosecond_too_high_is_caught(monkeypatch, where, name, on):
    monkeypatch.setattr(where, name, off(getattr(where, name), 1))
    assert violations(grid_named(on)) != NONE


@pytest.mark.parametrize(("where", "name", "on"), LESS)
def test_a_limit_that_is_one_too_low_is_caught(monkeypatch, where, name, on):
    monkeypatch.setattr(where, name, off(getattr(where, name), -1))
    assert violations(grid_named(on)) != NONE


def test_one_layer_too_many_is_caught(monkeypatch):
    monkeypatch.setattr(bounds, "most_layers", off(bounds.most_layers, 1))
    assert violations(grid("dense")) != NONE


@pytest.mark.parametrize(("where", "name", "on", "sign"), LOOSE)
def test_a_loose_part_is_caught_as_soon_as_it_is_wrong(monkeypatch, where, name, on, sign):
    """At a perturbation small beside a step, of powers of four."""
    g, real = grid_named(on), getattr(where, name)
    most = int(g.exact[g.exact >= 0].min())
    for unit in (4**i for i in range(most.bit_length() // 2)):
        monkeypatch.setattr(where, name, off(real, sign * unit))
        if violations(g) != NONE:
            break
    assert violations(g) != NONE
    assert unit < most / 4


def test_every_bound_is_perturbed():
    """A function that says of itself that it bounds something is in one of the lists."""
    tested = {(where, name) for where, name, *_ in (*MORE, *LESS, *LOOSE)}
    for where in (bounds, mixed, hetero):
        for name, function in inspect.getmembers(where, inspect.isfunction):
            said = (inspect.getdoc(function) or "").lower()
            claims = any(word in said for word in ("lower bound", "least", "largest r", "the most layers"))
            if function.__module__ == where.__name__ and claims:
                assert (where, name) in tested or name in ALSO, f"{where.__name__}.{name}"


ALSO = {
    "_least_layer": "`least_layer` for a group; of mixed models, the least of `_least_layers`",
    "_allowed_bottleneck": "`allowed_bottleneck` with the group's own bounds",
    "useful": "windows, not a bound: `test_windows_that_a_plan_could_have_are_kept`",
    "of_similar_reach": "chunks of rows",
    "_meetings": "where ranks can meet",
}
"""Functions of other kinds, and aliases of perturbed ones."""


# ---- what the exact solvers leave out ----------------------------------------------------------------------------------


def one_more(found: Any) -> Any:
    """The result of a recursion of `stages` with its value one higher."""
    if found is None:
        return None
    return (found[0] + 1, found[1]) if isinstance(found, tuple) else found + 1


def potentials_of(join: np.ufunc) -> Callable[..., Any]:
    """Sums or maxima before and after every place, one nanosecond too high."""
    real = stages._potentials

    def perturbed(t: Any, by: np.ufunc) -> Any:
        return tuple(np.where((found < BIG) & (by is join), found + 1, found) for found in real(t, by))

    return perturbed


SOLVERS: dict[str, tuple[object, str, Callable[[], Callable[..., Any]], str]] = {
    "least maximum": (stages, "_least_maximum", lambda: _then(stages._least_maximum, one_more), "dense"),
    "least sum": (stages, "_least_sum", lambda: _then(stages._least_sum, one_more), "two 7"),
    "largest bottleneck": (stages._Least, "cap", lambda: _then(stages._Least.cap, lambda n: n - 1), "two 7"),
    "next limit on D": (stages._Least, "next_limit", lambda: lambda *_: None, "two 5"),
    "sums through an arc": (stages, "_potentials", lambda: potentials_of(np.add), "dense"),
    "maxima through an arc": (stages, "_potentials", lambda: potentials_of(np.maximum), "two 3"),
    "cutoff of arcs": (stages, "_arcs", lambda: _below(stages._arcs), "dense"),
    "layers of a table": (stages, "most_layers", lambda: _then(stages.most_layers, lambda n: n - 1), "dense tight"),
    "reach of a table": (bounds, "reach_below", lambda: _then(bounds.reach_below, lambda n: n - 1), "dense tight"),
    "reach of windows": (mixed, "reach_below", lambda: _then(mixed.reach_below, lambda n: n - 1), "mixed tight"),
    "reach on two types": (hetero, "reach_below", lambda: _then(hetero.reach_below, lambda n: n - 1), "two 1"),
}


def _then(real: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda *args: change(real(*args))


def _below(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda t, below: real(t, below - 1)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_that_leaves_out_one_unit_too_much_is_caught(monkeypatch, name):
    """The other method finds what it has left out, or the plan is not the one of brute force."""
    where, function, perturbed, on = SOLVERS[name]
    g = grid_named(on)
    monkeypatch.setattr(where, function, perturbed())
    assert not answers(g)


def test_windows_that_a_plan_could_have_are_kept(monkeypatch):
    """Left out those that hold as much as any, the search finds a slower plan or none."""
    real = mixed.useful

    def fewer(*args: Any) -> Any:
        w = real(*args)
        return w.only(w.layers < w.layers.max(initial=0))

    monkeypatch.setattr(mixed, "useful", fewer)
    assert not answers(tight("mixed"))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2])
def test_the_weight_of_all_layers_excludes_no_row_that_fits(monkeypatch, share):
    """Without the chains that are tried first, the screen decides: right as it is, wrong where ranks have less room."""
    g, real = tight("mixed"), filling._shares
    monkeypatch.setattr(filling, "_holds", lambda ranks, rows, meetings: np.zeros(len(rows), dtype=bool))
    monkeypatch.setattr(filling, "_shares", lambda *args: (real(*args)[0], (1 - share) * real(*args)[1]))
    assert (violations(g) == NONE) == (share == 0)
