"""Brute force: every outer row, every split, every recompute assignment, each priced as an explicit layout."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import reduce

import numpy as np

from planner.cost import primitives, step
from planner.cost.blending import Stack
from planner.cost.primitives import Blend, Primitives
from planner.cost.task import Ints, LayoutArray, StageArray, Task
from planner.engines.base import Engine
from planner.search.space import Space, enumerate_rows
from planner.specs.layout import SPLIT_BACKWARD, Stage


def splits(layers: int, stages: int, least: int) -> Iterator[tuple[int, ...]]:
    """All ordered splits of `layers` over `stages` with at least `least` each."""
    if stages == 1:
        if layers >= least:
            yield (layers,)
        return
    for n in range(least, layers - least * (stages - 1) + 1):
        for rest in splits(layers - n, stages - 1, least):
            yield (n, *rest)


def mixes(layers: int, modes: tuple[int, ...], uniform: bool) -> list[tuple[int, int]]:
    """All (selective, full) counts of a stage."""
    if uniform:
        return [(layers if m == 1 else 0, layers if m == 2 else 0) for m in modes]
    found = []
    for n1, n2 in itertools.product(range(layers + 1), repeat=2):
        n0 = layers - n1 - n2
        if n0 < 0 or (n0 and 0 not in modes) or (n1 and 1 not in modes) or (n2 and 2 not in modes):
            continue
        found.append((n1, n2))
    return found


def row_value(task: Task, x: LayoutArray, row: int, modes: tuple[int, ...], kinds: Sequence[Primitives]) -> int | None:
    """The least step time (ns) of an outer row over all its feasible layouts, None when none fits.

    Every combination of the ranks' recompute counts under every split; what a rank costs under each is priced once a split.
    """
    one = x.take(np.array([row]))
    own_kinds = [kind.take(np.array([row])) for kind in kinds]
    p = own_kinds[0 if task.model.homogeneous else task.model.text_kind]
    modes = (0,) if one.layout(0, [Stage(layers=1)]).schedule in SPLIT_BACKWARD else modes
    pp, v, n_layers = int(one.pp[0]), int(one.virtual_stages[0]), task.model.n_layers
    # Only the last rank's chunks may be unequal.
    held = [split for split in splits(n_layers, pp, v) if not any(n % v for n in split[:-1])]
    options = {n: np.array(mixes(n, modes, v > 1), dtype=np.int64).reshape(-1, 2) for n in {n for split in held for n in split}}
    ranks = [(s, n) for split in held for s, n in enumerate(split)]
    if not ranks:
        return None
    each = [len(options[n]) for _, n in ranks]
    index, layers = (np.repeat(np.array(ranks, dtype=np.int64)[:, k], each) for k in range(2))
    recomputed = np.concatenate([options[n] for _, n in ranks])
    zero = np.zeros(len(index), dtype=np.int64)
    stages = StageArray(zero, index, zero + 1, layers, recomputed[:, 0], recomputed[:, 1])
    mixed = blended(task, one, own_kinds, held)
    own = mixed if mixed is None else mixed.take(np.repeat(np.arange(len(ranks)), each))
    cost = step.stage_cost(p, one, stages, own)
    fits = cost.allocated <= (p if own is None else own).capacity
    begin = np.concatenate([[0], np.cumsum(each)])
    found: list[tuple[int, tuple[int, ...], list[Ints]]] = []
    for i, split in enumerate(held):
        places = [np.arange(begin[i * pp + s], begin[i * pp + s + 1]) for s in range(pp)]
        places = [place[fits[place]] for place in places]
        if not all(map(len, places)):
            continue
        grid = np.ix_(*places)
        slowest, total, once = (join([values[place] for place in grid]) for values, join in (
            (cost.time, _largest), (cost.time, sum), (cost.once, _largest),
        ))  # fmt: skip
        value = step.combine(p, one, slowest.ravel(), total.ravel(), once.ravel())
        best = int(np.argmin(value))
        chosen = [place[k] for place, k in zip(places, np.unravel_index(best, slowest.shape), strict=True)]
        found.append((int(value[best]), split, [recomputed[e] for e in chosen]))
    if not found:
        return None
    value, split, chosen = min(found, key=lambda f: f[0])
    assert value == layout_value(task, one, own_kinds, split, chosen)
    return value


def _largest(values: list[Ints]) -> Ints:
    return reduce(np.maximum, values)


def layout_value(
    task: Task, one: LayoutArray, kinds: Sequence[Primitives], split: tuple[int, ...], recomputed: list[Ints]
) -> int:
    """Step time (ns) of an explicit layout of a row, which fits: by the cost model's own function for whole layouts."""
    p = kinds[0 if task.model.homogeneous else task.model.text_kind]
    pp, zero = len(split), np.zeros(len(split), dtype=np.int64)
    selective, full = np.array(recomputed).T
    stages = StageArray(zero, np.arange(pp), zero + 1, np.array(split, dtype=np.int64), selective, full)
    cost = step.step_cost(p, one, stages, blended(task, one, kinds, [split]))
    assert cost.fits[0]
    return int(cost.step[0])


def blended(task: Task, one: LayoutArray, kinds: Sequence[Primitives], held: Sequence[tuple[int, ...]]) -> Blend | None:
    """Primitives of every rank of splits of a row, one after the other; None where the model's layers are of one kind."""
    if task.model.homogeneous:
        return None
    every = np.zeros(sum(map(len, held)), dtype=np.int64)
    ranks = [kind.take(every) for kind in kinds]
    layouts = [one.layout(0, [Stage(layers=n) for n in split]) for split in held]
    many = np.repeat(one.microbatches, len(layouts))
    return step.blended_ranks(task, Stack.of(ranks, task.model.text_kind), layouts, many)


def row_values(task: Task, x: LayoutArray, modes: tuple[int, ...]) -> list[int | None]:
    """The least step time (ns) of each row, None where nothing fits."""
    if not len(x):
        return []
    alone = [task] if task.model.homogeneous else [task.only(k) for k in range(len(task.model.kinds))]
    kinds = [primitives.price(t, x) for t in alone]
    return [row_value(task, x, row, modes, kinds) for row in range(len(x))]


def all_rows(task: Task, engine: Engine, space: Space) -> tuple[LayoutArray, list[int | None]]:
    """Every row of the space that obeys the rules, with its least step time."""
    x = enumerate_rows(task, engine, space).layouts
    return x, row_values(task, x, space.modes)
