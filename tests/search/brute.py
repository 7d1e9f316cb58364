"""Brute force: every outer row, every split, every recompute assignment, each priced as an explicit layout."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from planner.cost import primitives, step
from planner.cost.blending import Stack
from planner.cost.primitives import Blend
from planner.cost.task import LayoutArray, StageArray, Task
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


def row_values(task: Task, x: LayoutArray, row: int, modes: tuple[int, ...]) -> int | None:
    """The least step time (ns) of an outer row over all its feasible layouts, None when none fits."""
    one = x.take(np.array([row]))
    p = primitives.price(task if task.model.homogeneous else task.only(task.model.text_kind), one)
    modes = (0,) if one.layout(0, [Stage(layers=1)]).schedule in SPLIT_BACKWARD else modes
    pp, v, n_layers = int(one.pp[0]), int(one.virtual_stages[0]), task.model.n_layers
    best: int | None = None
    for split in splits(n_layers, pp, v):
        if any(n % v for n in split[:-1]):  # only the last rank's chunks may be unequal
            continue
        options = [mixes(n, modes, v > 1) for n in split]
        combos = list(itertools.product(*options))
        size = len(combos)
        many, many_p = one.take(np.zeros(size, dtype=np.int64)), p.take(np.zeros(size, dtype=np.int64))
        table = np.array(combos, dtype=np.int64).reshape(size, pp, 2)
        stages = StageArray(
            row=np.repeat(np.arange(size), pp),
            index=np.tile(np.arange(pp), size),
            count=np.ones(size * pp, dtype=np.int64),
            layers=np.tile(np.array(split, dtype=np.int64), size),
            selective=table[:, :, 0].ravel(),
            full=table[:, :, 1].ravel(),
        )
        cost = step.step_cost(many_p, many, stages, blended(task, one, split, stages))
        if cost.fits.any():
            value = int(cost.step[cost.fits].min())
            best = value if best is None else min(best, value)
    return best


def blended(task: Task, one: LayoutArray, split: tuple[int, ...], stages: StageArray) -> Blend | None:
    """Primitives of every rank of a model that mixes kinds of layers, from the layers that each rank holds."""
    if task.model.homogeneous:
        return None
    every = np.zeros(len(split), dtype=np.int64)
    kinds = [primitives.price(task.only(k), one).take(every) for k in range(len(task.model.kinds))]
    layout = one.layout(0, [Stage(layers=n) for n in split])
    ranks = step.blended_ranks(task, Stack.of(kinds, task.model.text_kind), [layout], one.microbatches)
    return ranks.take(stages.index)


def all_rows(task: Task, engine: Engine, space: Space) -> tuple[LayoutArray, list[int | None]]:
    """Every row of the space that obeys the rules, with its least step time."""
    x = enumerate_rows(task, engine, space).layouts
    return x, [row_values(task, x, row, space.modes) for row in range(len(x))]
