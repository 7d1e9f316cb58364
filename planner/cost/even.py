"""Even splits of many layouts: what most of a rank's cost depends on is few columns, and is worked out once for each case.

A layout is `still` in what its degrees, micro-batch and ZeRO stage decide, and moves in what its schedule, chunks, number of
micro-batches and rank order do. Many layouts of a space share the first part. Both parts are the functions of `step`: the
first one of primitives in which nothing is passed on, the second one added for every layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.cost import peaks, step, unmade
from planner.cost.primitives import Primitives, PrimitiveTable, distinct_keys, primitive_table
from planner.cost.schedules import flight_limits, layers_of, put_off
from planner.cost.step import StepCost
from planner.cost.task import Ints, LayoutArray, StageArray, Task, even_runs, splits_backward, v_shaped

_PIECE = 4096
"""Layouts that are worked on at once: their columns stay inside the processor's caches."""


@dataclass(frozen=True)
class _Still:
    """Even splits of some layouts, by run of equal neighbouring ranks; those of a layout follow each other."""

    start: Ints
    """First run of each layout."""
    runs: Ints
    """How many it has."""
    slowest: Ints
    """max R of each layout without sends, ns."""
    total: Ints
    """sum R of each layout without sends, ns."""
    capacity: Ints
    first: Ints
    """By run from here on: 1 where it holds the embedding."""
    last: Ints
    index: Ints
    """Its first rank."""
    deepest: Ints
    """Its last rank."""
    layers: Ints
    traffic: Ints
    """Step-wise traffic, ns."""
    floor: Ints
    """What of it stays exposed, ns."""
    update: Ints
    """The optimizer, ns."""
    backward: Ints
    """Bytes while micro-batches run, with nothing in flight."""
    between: Ints
    """Bytes between two micro-batches, likewise."""
    ending: Ints
    """Bytes when backward ends and while the optimizer runs, without receive buffers."""
    saved: Ints
    """Bytes of one layer and micro-batch in flight."""
    deferred: Ints
    boundary: Ints
    entering: Ints
    carried: Ints
    grads: Ints
    grads_first: Ints
    excess: Ints
    """Bytes of temporaries at the head's backward beyond those at a layer's, of last ranks."""


@dataclass(frozen=True)
class _Passing:
    """What runs keep of what they pass on (`peaks.Passing`)."""

    boundary: Ints
    entering: Ints
    carried: Ints
    chunks: Ints
    waiting: Ints
    receive: Ints
    alike: Ints


@dataclass(frozen=True)
class _Whole:
    """What counts once a step (`step.Whole`)."""

    credit: Ints
    constant: Ints


def even_step_cost(task: Task, layouts: LayoutArray, recompute: int) -> StepCost:
    """Time and memory of layouts (one at least) split evenly, with one recompute mode for all layers.

    `recompute`: 0 none, 1 selective, 2 full.
    """
    table = primitive_table(task, layouts)
    alike = table.share * (int(layouts.pp.max(initial=0)) + 1) + layouts.pp
    some, kind = distinct_keys(alike * 2 + v_shaped(layouts.schedule))
    still = _still(task, table, some, recompute)
    pieces = [slice(i, min(i + _PIECE, len(layouts))) for i in range(0, len(layouts), _PIECE)]
    done = [_moving(table, still, rows, kind[rows]) for rows in pieces]
    return StepCost(*(np.concatenate(column) for column in zip(*done, strict=True)))


def _still(task: Task, table: PrimitiveTable, rows: Ints, mode: int) -> _Still:
    """What layouts at `rows` cost before anything is passed on."""
    x, share = table.layouts.take(rows), table.share.take(rows)
    runs = even_runs(x, task.model.n_layers, mode)
    start = np.searchsorted(runs.row, np.arange(len(x)))
    columns: list[list[Ints]] = []
    for i in range(0, len(runs.row), 2 * _PIECE):
        part = runs.between(slice(i, i + 2 * _PIECE))
        columns.append(_still_runs(table.quiet(share.take(part.row)), x.take(part.row), part, mode))
    time, *others = (np.concatenate(column) for column in zip(*columns, strict=True))
    return _Still(
        start, np.diff(np.append(start, len(time))), np.maximum.reduceat(time, start),
        np.add.reduceat(time * runs.count, start), table.columns["capacity"].take(share), *others,
    )  # fmt: skip


def _still_runs(q: Primitives, x: LayoutArray, runs: StageArray, mode: int) -> list[Ints]:
    """R of runs, and the fields of `_Still` by run; `q` and `x` have an entry for each of `runs`."""
    n, none = runs.layers, np.zeros(1, dtype=np.int64)
    first, last = step.run_ends(x, runs)
    inner, headed = peaks.transients(q, first, mode)
    return [
        step.stage_time(q, first, last, n, runs.selective, runs.full),
        first, last, runs.index, runs.index + runs.count - 1, n,
        *step.stage_traffic(q, first, last, n), step.stage_update(q, first, last, n),
        n * q.state + peaks.stage_base_bytes(q, first, last, none) + np.where(last == 1, headed, inner),
        first * n * q.state + peaks.between_base(q, first, last, none),
        peaks.stage_update_bytes(q, first, last, n),
        q.saved(mode), q.deferred, q.boundary, q.entering, q.carried, q.grads, q.grads_first,
        last * (headed - inner),
    ]  # fmt: skip


def _moving(table: PrimitiveTable, still: _Still, rows: slice, kind: Ints) -> tuple[Ints, Ints, Ints]:
    """The columns of `StepCost` of a slice of layouts, of which `kind` are the ones in `still`."""
    x, share = table.layouts.between(rows), table.share[rows]
    own, runs = table.own(x, share), still.runs.take(kind)
    end = np.cumsum(runs)
    start = end - runs
    row = np.repeat(np.arange(len(x)), runs)
    run = np.arange(len(row)) + (still.start.take(kind) - start).take(row)
    once = _once(still, own["hide"].take(row), run)
    bytes_ = _bytes(still, x, own, row, run)
    slowest = still.slowest.take(kind) + own["p2p"]
    total = still.total.take(kind) + x.pp * own["p2p"]
    whole = _Whole(own["credit"], table.columns["constant"].take(share))
    allocated = np.maximum.reduceat(bytes_, start)
    return (
        step.combine(whole, x, slowest, total, np.maximum.reduceat(once, start)), allocated,
        allocated - still.capacity.take(kind),
    )  # fmt: skip


def _once(still: _Still, hide: Ints, run: Ints) -> Ints:
    """d of runs, ns."""
    traffic = still.traffic.take(run) - still.layers.take(run) * hide
    return np.maximum(traffic, still.floor.take(run)) + still.update.take(run)


def _bytes(still: _Still, x: LayoutArray, own: dict[str, Ints], row: Ints, run: Ints) -> Ints:
    """Peak allocated bytes of runs."""
    first, last, index, layers = (c.take(run) for c in (still.first, still.last, still.index, still.layers))
    most, top, fewer = (c.take(row) for c in flight_limits(x.schedule, x.pp, x.virtual_stages, x.microbatches))
    flight = np.minimum(most, top - fewer * index)
    chunked = bool(np.any(x.virtual_stages > 1))
    v = x.virtual_stages.take(row) if chunked else np.ones(1, dtype=np.int64)
    weight = layers_of(flight, x.pp.take(row), v, x.microbatches.take(row), layers) if chunked else flight * layers
    saved = weight * still.saved.take(run)
    if np.any(splits_backward(x.schedule)):
        waiting = put_off(x.schedule.take(row), x.pp.take(row), still.deepest.take(run)) * (layers // v)
        saved += waiting * still.deferred.take(run)
    passed = _Passing(
        still.boundary.take(run), still.entering.take(run), still.carried.take(run), v, own["waiting"].take(row),
        own["receive"].take(row), own["alike"].take(row),
    )  # fmt: skip
    late = unmade.Late(still.grads.take(run), still.grads_first.take(run), own["round"].take(row), v)
    never = unmade.spared(late, first, flight, layers, saved)
    if np.any(layers % v):
        headed = peaks.HeadedRank(own["headed"].take(row), v)
        beyond = peaks.beyond_head(headed, last, flight, layers, weight)
        never = never + peaks.spared_by_head(beyond, still.saved.take(run), still.excess.take(run))
    backward = still.backward.take(run) + peaks.passing_bytes(passed, first, last, flight) + saved - never
    left = saved * unmade.left_between(late, flight) // flight
    between = first * left + peaks.between_passing(passed, first, last, flight)
    ending = still.ending.take(run) + peaks.receive_bytes(passed, first, last)
    return np.maximum(np.maximum(backward, ending), still.between.take(run) + between)
