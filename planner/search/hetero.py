"""Rows on two device types: their groups and lower bounds.

What `solve` does is the same for one type and two: an exact table of every rank and window (`stages.tables`), split by
dynamic programming and by CP-SAT. A group of such rows has primitives by rank (`cost.devicetypes`), shape (rows, pp), where
a group on one type has one column; only what assumes that a layer costs the same on every rank is here, and the memory tests
do not.

Bounds, all by dropping constraints (rows may mix kinds of layers; with one kind the weights below are all equal):

* balance: let w_k be the least time of a layer of kind k on any rank and rho_s the least, over kinds, of its time on rank s
  over w_k. A rank with time R holds layers of total weight sum w_k <= (R - e_s) / rho_s, e_s being what it does besides, so
      max R >= (W + sum_s e_s / rho_s) / sum_s 1 / rho_s,        W the weight of all layers.
* sum R: every rank holds one layer, all others are on the type that is faster for them.
* below a target G: the least max R, sum R and max D over chains of windows, each exact on the table of every rank and window
  with recompute relaxed to fractions of layers.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from planner.cost import devicetypes, peaks
from planner.cost.blending import Stack
from planner.cost.primitives import Primitives
from planner.cost.task import Ints, LayoutArray, Task
from planner.search import bounds, mixed
from planner.search.bounds import Group
from planner.search.windows import Windows, windows


def price(task: Task, x: LayoutArray) -> tuple[Primitives, Stack | None]:
    """What `solve.price` gives, with the device types on the last axis."""
    kinds = devicetypes.kinds_of(task, x)
    text = 0 if len(kinds) == 1 else task.model.text_kind
    return kinds[text], None if len(kinds) == 1 else Stack.of(kinds, text)


def group_of(task: Task, modes: tuple[int, ...], x: LayoutArray, p: Primitives, stack: Stack | None, rows: Ints) -> Group:
    """Rows with one pipeline degree as a group with primitives by rank."""
    held = x.take(rows)
    g = bounds.group_by_rank(devicetypes.by_rank(task, held, p.take(rows)), held, task.model.n_layers, modes)
    return g if stack is None else replace(g, stack=devicetypes.stack_by_rank(task, held, stack.take(rows)))


# ---- memory --------------------------------------------------------------------------------------------------------


def excess(g: Group, layers: Ints, mode: int) -> Ints:
    """Bytes beyond what each row may hold when its ranks hold `layers` (pp,) layers of one kind, all under one mode."""
    backward = g.flight * layers * g.p.saved(mode) - peaks.saved_limit(g.p, g.first, g.last, g.flight, layers, mode)
    update = peaks.stage_update_bytes(g.p, g.first, g.last, layers) - g.p.capacity
    return np.asarray(np.maximum(backward, update).max(axis=1))


def _windows(task: Task, reach: int) -> Windows:
    return windows(task.model.kind_of_layer, 1, max(reach, 1))


# ---- time ----------------------------------------------------------------------------------------------------------


def _layers(g: Group) -> Ints:
    """Least time of one layer of each kind on each rank, shape (kinds, rows, pp)."""
    if g.stack is None:
        return np.broadcast_to(bounds.least_layer(g.p, g.modes), (1, len(g.layouts), g.pp))
    return g.stack.least_layers(g.modes)


def _counts(task: Task, g: Group) -> Ints:
    """Layers of each kind, shape (kinds, 1)."""
    counts = [g.n_layers] if g.stack is None else [count for _, count in task.model.kinds]
    return np.array(counts, dtype=np.int64)[:, None]


def _least_total(task: Task, g: Group) -> Ints:
    """Lower bound on the sum of R, ns, shape (rows,)."""
    layers, counts = _layers(g), _counts(task, g)
    anywhere = (counts * layers.min(axis=2)).sum(axis=0)
    each = layers.min(axis=0)  # the cheapest layer of every rank
    beyond = (each - each.min(axis=1, keepdims=True)).sum(axis=1) if g.stack is None else 0
    return np.asarray(g.extra_time().sum(axis=1) + anywhere + beyond)


def _least_slowest(task: Task, g: Group) -> Ints:
    """Lower bound on max R, ns, shape (rows,)."""
    layers, extra = _layers(g), g.extra_time()
    weight = layers.min(axis=2, keepdims=True)
    share = 1.0 / (layers / np.maximum(weight, 1)).min(axis=0)
    whole = (_counts(task, g) * weight[:, :, 0]).sum(axis=0)
    balanced = (whole + (extra * share).sum(axis=1)) / share.sum(axis=1)
    alone = (extra + layers.min(axis=0)).max(axis=1)
    return np.maximum(np.floor(balanced * (1.0 - 1e-12)).astype(np.int64), alone)


def _least_once(g: Group) -> Ints:
    """Lower bound on max d: what the ends have to do whatever layers they hold, ns, shape (rows,). pp is 2 or more."""
    first = (g.p.floor_first + g.p.update_first)[:, 0]
    last = (g.p.floor_last + g.p.update_last)[:, -1]
    return np.maximum(np.maximum(first, last), 0)


def simple_bound(task: Task, g: Group) -> Ints:
    """Lower bound on T without memory, ns, shape (rows,)."""
    return bounds.to_step(g, _least_slowest(task, g), _least_total(task, g), _least_once(g))


def _allowed(task: Task, g: Group, target: int) -> Ints:
    """The largest R that a plan below `target` can have, shape (rows,)."""
    return bounds.allowed_bottleneck(g, target, _least_once(g), _least_total(task, g))


def reach_below(task: Task, g: Group, target: int) -> Ints:
    """The most layers that one rank can hold in a plan below `target`, shape (rows,)."""
    room = _allowed(task, g, target)[:, None] - g.extra_time()
    by_time = np.where(room < 0, 0, room // np.maximum(_layers(g).min(axis=0), 1))
    return np.minimum(by_time.max(axis=1), g.n_layers - (g.pp - 1))


def target_bound(task: Task, g: Group, target: int) -> Ints:
    """Lower bound on T, valid below `target`: min(bound, target) for each row. ns, shape (rows,)."""
    result = np.full(len(g.layouts), target, dtype=np.int64)
    reach = reach_below(task, g, target)
    alive = np.nonzero(reach >= 1)[0]

    def width(most: int) -> int:
        return len(_windows(task, min(most, g.n_layers)).counts)

    for chunk in bounds.of_similar_reach(reach, alive, mixed.ENTRIES // g.pp, width):
        result[chunk] = _table_bound(task, _rows_of(g, chunk), target, int(reach[chunk].max()))
    return result


def _rows_of(g: Group, rows: Ints) -> Group:
    return bounds.rows_of(g, rows) if g.stack is None else mixed.rows_of(g, rows)


def _table_bound(task: Task, g: Group, target: int, reach: int) -> Ints:
    """`target_bound` for rows whose ranks hold at most `reach` layers."""
    w, allowed = _windows(task, reach), _allowed(task, g, target)
    return mixed.chain_bound(g, w, _layers(g), allowed, (_least_total(task, g), _least_once(g)), target)
