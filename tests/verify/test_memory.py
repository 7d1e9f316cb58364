"""Which rows fit: the quick arguments of the verifier are never wrong, and an error of theirs does not pass these tests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from search.grids import grid, tight
from search.instances import adapter_instance, instance, mixed_instance, mixture_instance
from search.test_chunks import KINDS
from search.test_chunks import instance as chunked
from search.test_hetero import instance as on_two_types

from planner.search.space import declared_space, enumerate_rows
from planner.verify import chains, memory, tables

GRIDS = ("dense", "experts", "mixed")
FORGIVEN = 4096
"""More bytes than rounded means of mixed layers leave between a limit under which something fits and one where not."""


def quiet(*_: object) -> None:
    """Tells nobody how far it is."""


def by_table(priced: tables.Priced, modes: tuple[int, ...]) -> np.ndarray:
    """Which rows fit, all of them on the table of every rank and run."""
    answer = np.zeros(len(priced), dtype=bool)
    for batch in tables.batches(priced.layouts, np.arange(len(priced))):
        r = tables.ranks_of(priced.take(batch), modes, priced.task.model.n_layers)
        answer[batch] = chains.exists(tables.fits(r), r.runs)
    return answer


def arguments(priced: tables.Priced, modes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(rows with enough room by weight, rows with a witness)."""
    enough, seen = (np.zeros(len(priced), dtype=bool) for _ in range(2))
    for batch in tables.batches(priced.layouts, np.arange(len(priced))):
        part = priced.take(batch)
        room = memory.room_of(part, modes)
        enough[batch], seen[batch] = room.enough, memory.witnessed(part, modes, room)
    return enough, seen


def check(t, x, modes) -> None:
    priced = tables.price(t, x)
    expected = by_table(priced, modes)
    enough, seen = arguments(priced, modes)
    assert not np.any(expected & ~enough)
    assert not np.any(seen & ~expected)
    assert np.array_equal(memory.fitting(priced, modes, quiet), expected)


@pytest.mark.parametrize("made", [instance, mixed_instance, mixture_instance, adapter_instance, on_two_types])
@pytest.mark.parametrize("seed", range(700, 712))
def test_arguments_agree_with_tables(made, seed):
    t, engine, declared = made(seed)
    for factor in (0.8, 1.0):
        x = enumerate_rows(t, engine, declared).layouts
        if len(x):
            check(replace(t, max_memory_fraction=factor * t.max_memory_fraction), x, declared.modes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_arguments_agree_with_tables_where_chunks_are_unequal(kind, seed):
    t, engine, pins = chunked(kind, seed)
    declared = declared_space(t, engine, pins, ["cp"])
    check(t, enumerate_rows(t, engine, declared).layouts, declared.modes)


@pytest.mark.parametrize("name", GRIDS)
def test_arguments_hold_on_full_grids(name):
    """Also on a job that fits to the byte."""
    for g in (grid(name), tight(name)):
        priced = tables.price(g.task, g.layouts)
        assert np.array_equal(memory.fitting(priced, g.space.modes, quiet), g.exact >= 0)
        enough, seen = arguments(priced, g.space.modes)
        assert np.all(enough[g.exact >= 0])
        assert not np.any(seen[g.exact < 0])


@pytest.mark.parametrize("name", GRIDS)
def test_quick_arguments_settle_most_rows(name):
    g = grid(name)
    enough, seen = arguments(tables.price(g.task, g.layouts), g.space.modes)
    assert np.mean(~enough | seen) > 0.6
    assert np.any(~enough)
    assert np.any(seen)


@pytest.mark.parametrize("name", GRIDS)
def test_layers_that_weigh_too_much_are_caught(monkeypatch, name):
    """Layers taken for a quarter heavier than they are exclude rows that fit."""
    g = tight(name)
    priced, real = tables.price(g.task, g.layouts), memory._layer_bytes
    monkeypatch.setattr(memory, "_layer_bytes", lambda *args: real(*args) * 5 // 4)
    found = memory.fitting(priced, g.space.modes, quiet)
    assert np.any((g.exact >= 0) & ~found)


@pytest.mark.parametrize("name", GRIDS)
def test_a_witness_that_is_one_byte_too_large_is_caught(monkeypatch, name):
    """A split that needs a byte more than there is, taken for one that fits."""
    g = tight(name)
    below = replace(g.task, max_memory_fraction=(g.task.limit - 0.5) / g.task.hardware.device.memory.base)
    assert below.limit == g.task.limit - 1
    priced = tables.price(below, g.layouts)
    fitting = memory.fitting(priced, g.space.modes, quiet)
    assert not fitting.any()
    real = tables.ranks_with

    def larger(*args):
        r = real(*args)
        return replace(r, p=replace(r.p, capacity=r.p.capacity + 1 + FORGIVEN * (name == "mixed")))

    monkeypatch.setattr(tables, "ranks_with", larger)
    assert memory.fitting(priced, g.space.modes, quiet).any()
