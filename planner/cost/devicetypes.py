"""Clusters of two device types: which type each pipeline stage is on, and what ranks of different types cost.

Stages are whole: all tp cp dp ranks of one are devices of one type, so that tensor, context, data and expert parallel groups
never leave it. The stages of a type are neighbours: N_A / (tp cp dp) of type A, then N_B / (tp cp dp) of type B, or the
other way round (`type_order`). Each type prices a layout with its own profile as if all devices were of it, and a rank takes
the primitives of its type, with two exceptions:

* the link between the last stage of one type and the first of the other is the slower one of the two networks, at the tier
  that the whole pipeline spans, as every other link of a pipeline is priced;
* the fixed time of a step is the longer one.

What all ranks do together once a step waits for the slowest: max D runs over the ranks of both types.

Arrays that stand for both types have the types on their last axis; `by_rank` turns that axis into pipeline ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from planner.cost import primitives, states, step
from planner.cost.blending import Stack
from planner.cost.primitives import Primitives
from planner.cost.task import Bools, Ints, LayoutArray, StageArray, Task
from planner.specs.layout import TYPE_ORDERS, Layout


def stages_of(task: Task, layout: Layout) -> tuple[int, ...]:
    """The device type of each pipeline stage, as an index into `task.types` (or of zeros, with one type)."""
    if not task.types:
        return (0,) * layout.pp
    return tuple(type_of_stages(task, LayoutArray.of([layout], task.job))[0].tolist())


def type_of_stages(task: Task, x: LayoutArray) -> Ints:
    """The same of layouts with one pipeline degree, shape (layouts, pp). They must obey the rules."""
    of_first = np.array(task.type_sizes)[x.type_order] // (x.tp * x.cp * x.dp)
    later = (np.arange(int(x.pp[0]))[None, :] >= of_first[:, None]).astype(np.int64)
    return np.where(x.type_order[:, None] == 1, 1 - later, later)


def in_order(layout: Layout) -> tuple[int, ...]:
    """The device types by the pipeline stages that they hold, the first stages' type first."""
    return (1, 0) if layout.type_order == TYPE_ORDERS[1] else (0, 1)


# ---- pricing -------------------------------------------------------------------------------------------------------


def price(task: Task, x: LayoutArray) -> Primitives:
    """The integers of each layout on each type, shape (layouts, types). The fixed time of a step is common to both."""
    each = [primitives.price(task.on(i), x) for i in range(len(task.types))]
    both = Primitives(**{f.name: np.stack([getattr(p, f.name) for p in each], axis=-1) for f in fields(Primitives)})
    return replace(both, constant=np.broadcast_to(both.constant.max(axis=-1, keepdims=True), both.constant.shape))


def kinds_of(task: Task, x: LayoutArray) -> tuple[Primitives, ...]:
    """The same for each kind of layers that the model has."""
    if task.model.homogeneous:
        return (price(task, x),)
    return tuple(price(task.only(k), x) for k in range(len(task.model.kinds)))


def by_rank(task: Task, x: LayoutArray, p: Primitives) -> Primitives:
    """Primitives of each pipeline rank from those of each type, shape (layouts, pp); all layouts have one pp."""
    types = type_of_stages(task, x)
    ranks = {f.name: np.take_along_axis(getattr(p, f.name), types, axis=-1) for f in fields(Primitives)}
    ranks["p2p"] = _linked(types, ranks["p2p"], p.p2p)
    return Primitives(**ranks)


def stack_by_rank(task: Task, x: LayoutArray, stack: Stack) -> Stack:
    """The same for layers of several kinds: the stack's last axis becomes pipeline ranks."""
    types = type_of_stages(task, x)
    means = np.take_along_axis(stack.means, types[None, None], axis=-1)
    peaks = np.take_along_axis(stack.peaks, types[None, None], axis=-1)
    ranks = Stack(means, peaks, np.take_along_axis(stack.ends, types[None], axis=-1))
    return ranks.with_sends(_linked(types, ranks.sends, stack.sends))


def _linked(types: Ints, own: Ints, of_types: Ints) -> Ints:
    """Exposed sends of each rank: beside the other type, the slower one of both networks."""
    return np.where(_beside_other(types), of_types.max(axis=-1, keepdims=True), own)


def _beside_other(types: Ints) -> Bools:
    """Ranks whose neighbour is on the other type."""
    changes = types[:, 1:] != types[:, :-1]
    none = np.zeros((len(types), 1), dtype=bool)
    return np.asarray(np.concatenate([changes, none], axis=1) | np.concatenate([none, changes], axis=1))


# ---- one layout ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayoutCost:
    """One layout priced, on one type of devices or two."""

    p: Primitives
    """Of the layout as a whole: only the fixed time of a step holds for every rank."""
    ranks: Primitives
    """Of each pipeline rank, shape (pp,)."""
    kinds: tuple[Primitives, ...]
    """The same of each kind of layers."""
    stages: step.StageCost
    total: step.StepCost


def layout_cost(task: Task, layout: Layout) -> LayoutCost:
    """The cost model's verdict on a layout whose stages hold all layers."""
    x, held = LayoutArray.of([layout], task.job), StageArray.of([layout])
    return cost_of(task, layout, x, held, kinds_by_rank(task, x))


def kinds_by_rank(task: Task, x: LayoutArray) -> tuple[Primitives, ...]:
    """Primitives of each kind of layers on each pipeline rank of one layout, shape (pp,)."""
    one = np.zeros(int(x.pp[0]), dtype=np.int64)
    if task.types:
        each = [by_rank(task, x, p) for p in kinds_of(task, x)]
        return tuple(Primitives(**{f.name: getattr(p, f.name)[0] for f in fields(Primitives)}) for p in each)
    tasks = [task] if task.model.homogeneous else [task.only(k) for k in range(len(task.model.kinds))]
    return tuple(primitives.price(t, x).take(one) for t in tasks)


def cost_of(task: Task, layout: Layout, x: LayoutArray, held: StageArray, kinds: Sequence[Primitives]) -> LayoutCost:
    """The same from the primitives of each kind of layers on each rank."""
    text = task.model.text_kind if len(kinds) > 1 else 0
    ranks = kinds[0] if len(kinds) == 1 else step.blended_ranks(task, Stack.of(kinds, text), [layout], x.microbatches)
    p = kinds[text].take(np.array([0]))
    return LayoutCost(p, ranks, tuple(kinds), step.stage_cost(p, x, held, ranks), step.step_cost(p, x, held, ranks))


def pooled_bytes(task: Task, layout: Layout) -> Ints:
    """What the allocator's pools keep on each pipeline rank until its update (`states.pooled_bytes`), shape (pp,)."""
    x, stages, counts = LayoutArray.of([layout], task.job), StageArray.of([layout]), step.layers_by_kind(task, layout)
    ranks = x.take(stages.row)
    if not task.types:
        return states.pooled_bytes(task, ranks, stages.index, counts)
    each = [states.pooled_bytes(task.on(i), ranks, stages.index, counts) for i in range(len(task.types))]
    return np.asarray(np.stack(each)[list(stages_of(task, layout)), stages.index])
