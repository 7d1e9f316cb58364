"""What would make it fit: single changes, each proved by a search of its own.

Cheapest first: changes of the restrictions, by the step time that they lead to; then another precision of states; then a
higher share of the memory; then more nodes; then devices with more memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from planner.cost.task import LayoutArray, Task
from planner.engines.base import Engine
from planner.engines.registry import engine_named
from planner.engines.traits import TRAITS
from planner.errors import InputError
from planner.planning.estimate import estimate_layout
from planner.planning.explain.answers import Change, ChangeKind
from planner.planning.explain.asked import Asked
from planner.search import stages
from planner.search.bounds import BIG
from planner.search.explain import any_fits, smallest_cluster
from planner.search.extra import least_extra_memory, with_memory
from planner.search.solve import group_of, layout_of, price, search
from planner.search.space import Space
from planner.specs.layout import RECOMPUTE_MODES, Layout
from planner.units import GIB, gib

SEARCH_SECONDS = 30.0
"""After this long a change that fits is reported with the best layout so far."""
STATES = {"megatron": ("bf16-grads", "bf16-optimizer")}
"""Recipes that keep gradients or states in another precision, by engine."""
_HIGHEST_FRACTION = 0.98
"""The highest share of the memory that is suggested."""


@dataclass(frozen=True)
class _Idea:
    """A change to try: the task, engine and restrictions with it."""

    kind: ChangeKind
    text: str
    task: Task
    engine: Engine
    asked: Asked
    details: dict[str, Any]
    pins: dict[str, Sequence[object]]
    """Values of the changed axis that count as this change; any when empty."""
    before: Sequence[object] = ()
    """Values that the axis was pinned to."""


def nearest_changes(
    task: Task, engine: Engine, asked: Asked, whole_nodes: bool = True, enough: int | None = None
) -> list[Change]:
    """Single changes that make some layout fit, cheapest first, each with the fastest layout that it allows.

    `whole_nodes`: clusters grow by nodes, not by devices. No dearer kinds of changes are tried once `enough` are found.
    Raises KeyboardInterrupt when stopped by a signal.
    """
    unit = task.hardware.node_size if whole_nodes else 1
    found: list[Change] = []
    for ideas in (_axes, _states, _fraction, partial(_nodes, unit=unit), _memory):
        if enough is not None and len(found) >= enough:
            break
        proved = [c for idea in ideas(task, engine, asked) if (c := _proved(idea)) is not None]
        found += sorted(proved, key=lambda c: c.step_time_s)
    return found


def _proved(idea: _Idea) -> Change | None:
    """The change with the layout that its search found; None when nothing fits with it."""
    try:
        space = idea.asked.also(idea.pins).space(idea.task, idea.engine)
    except InputError:  # nothing is left of an axis
        return None
    if not any_fits(idea.task, idea.engine, space):
        return None
    outcome = search(idea.task, idea.engine, space, 1, time_limit=SEARCH_SECONDS)
    if outcome.stopped_by == "signal":
        raise KeyboardInterrupt
    if not outcome.candidates:
        return None
    layout = outcome.candidates[0].layout
    estimate = estimate_layout(idea.task, layout)
    return Change.model_validate(
        {
            "kind": idea.kind, "text": _text(idea, layout), "layout": layout, "step_time_s": estimate.step_time_s,
            "peak_gib": estimate.memory.peak_gib, "status": outcome.status, **idea.details,
        }
    )  # fmt: skip


def resplit(task: Task, engine: Engine, layout: Layout, space: Space) -> list[Change]:
    """Other stages of a layout whose own do not fit, that do: other recompute of the same split, another split in `space`.

    `space` is the row of the layout and the recompute modes that it uses.
    """
    named: list[tuple[str, Layout]] = []
    recomputed = _recomputed(task, layout)
    if recomputed is not None:
        named.append((f"recompute: {recompute_words(recomputed)}", recomputed))
    if any_fits(task, engine, space):
        moved = search(task, engine, space, 1).candidates[0].layout
        modes = "" if all(s.recompute == "none" for s in moved.stages) else f", recompute: {recompute_words(moved)}"
        named.append((f"layers {', '.join(str(s.layers) for s in moved.stages)}{modes}", moved))
    found = []
    for text, other in named:
        e = estimate_layout(task, other)
        more = {"step_time_s": e.step_time_s, "peak_gib": e.memory.peak_gib, "status": "optimal"}
        found.append(Change.model_validate({"kind": "layers", "text": text, "layout": other, **more}))
    return sorted(found, key=lambda c: c.step_time_s)


def _recomputed(task: Task, layout: Layout) -> Layout | None:
    """The layout with its split and the cheapest recompute that fits on every rank; None when none does."""
    x = LayoutArray.of([layout], task.job)
    p, stack = price(task, x)
    g = group_of(task, tuple(range(len(RECOMPUTE_MODES))), x, p, stack, np.array([0]))
    t = stages.tables(g, task)
    split = [stage.layers for stage in layout.stages]
    if -(-max(split) // t.chunks) >= t.at.shape[1]:  # more layers than any rank can hold
        return None
    if any(t.time[s, entry] >= BIG for s, entry in enumerate(t.columns(split))):
        return None
    return layout_of(x, 0, t, split)


def _axes(task: Task, engine: Engine, asked: Asked) -> Iterator[_Idea]:
    for axis in asked.axes:
        yield _axis(task, engine, asked, axis)


def _axis(task: Task, engine: Engine, asked: Asked, axis: str) -> _Idea:
    """One axis free; of ZeRO only higher stages, of cp only higher degrees: what takes memory off a device."""
    pins: dict[str, Sequence[object]] = {}
    if axis in ("zero", "cp") and asked.pins.get(axis):
        now = max(int(str(v)) for v in asked.pins[axis])
        values = engine.zero_stages if axis == "zero" else asked.without(axis).space(task, engine).cp
        pins = {axis: [v for v in values if v > now] or [now]}
    if axis == "micro_batch":
        pins = {axis: [1]}
    return _Idea("axis", "", task, engine, asked.without(axis), {"axis": axis}, pins, asked.pins.get(axis, ()))


def _states(task: Task, engine: Engine, asked: Asked) -> Iterator[_Idea]:
    base, *traits = engine.name.split("+")
    for recipe in STATES.get(base, ()):
        if recipe not in traits:
            other = engine_named(f"{engine.name}+{recipe}")
            text = f"engine {other.name} ({TRAITS[recipe].what})"
            yield _Idea("states", text, replace(task, accounting=other.accounting), other, asked, {}, {})


def _memory(task: Task, engine: Engine, asked: Asked) -> Iterator[_Idea]:
    if extra := least_extra_memory(task, engine, asked.space(task, engine)):
        sizes = [h.device.memory.base for h in task.profiles]
        larger, before = (" and ".join(gib(size) for size in each) for each in ([s + extra for s in sizes], sizes))
        text = f"+{gib(extra)} a device ({larger} instead of {before})"
        yield _Idea("memory", text, with_memory(task, extra), engine, asked, {"extra_gib": extra / GIB}, {})


def _fraction(task: Task, engine: Engine, asked: Asked) -> Iterator[_Idea]:
    """The least share of the memory that is enough, in percent: the limit of the least extra memory or a little more."""
    if task.max_oom_probability is None and (extra := least_extra_memory(task, engine, asked.space(task, engine))):
        memory = min(h.device.memory.base for h in task.profiles)
        share = math.ceil(task.max_memory_fraction * (1 + extra / memory) * 100) / 100
        if share <= _HIGHEST_FRACTION:
            text = f"max_memory_fraction {share:g} instead of {task.max_memory_fraction:g}"
            yield _Idea("fraction", text, replace(task, max_memory_fraction=share), engine, asked, {}, {})


def _nodes(task: Task, engine: Engine, asked: Asked, unit: int) -> Iterator[_Idea]:
    """The smallest cluster, in whole units of devices; of one device type."""
    if task.types:
        return
    smallest = smallest_cluster(task, engine, lambda t: asked.space(t, engine), unit)
    if smallest is None:
        return
    nodes = -(-smallest // task.hardware.node_size)
    text = f"{smallest} device{'s' * (smallest > 1)}"
    if unit > 1:
        text = f"{nodes} node{'s' * (nodes > 1)} ({text})"
    text += ": " + ("fewer devices divide this job, " if smallest < task.gpus else "") + "the smallest count that works"
    yield _Idea("nodes", text, replace(task, gpus=smallest), engine, asked, {"nodes": nodes, "gpus": smallest}, {})


# ---- words ---------------------------------------------------------------------------------------------------------


def _text(idea: _Idea, layout: Layout) -> str:
    """What the change is: for an axis, its value in the layout that was found."""
    if idea.text:
        return idea.text
    axis, before = idea.details["axis"], ", ".join(str(v).lower() for v in idea.before)
    if axis == "recompute":
        return f"recompute: {recompute_words(layout)}"
    if axis in ("schedule", "virtual_stages"):
        chunks = f" with {layout.virtual_stages} virtual stages" if layout.virtual_stages > 1 else ""
        return f"schedule {layout.schedule}{chunks}"
    return f"{axis} {str(getattr(layout, axis)).lower()}" + (f" instead of {before}" if before else "")


def recompute_words(layout: Layout) -> str:
    """Which stages recompute what: "full on stages 0-3, selective:2 on stage 4"."""
    runs: list[tuple[str, int, int]] = []
    for s, stage in enumerate(layout.stages):
        if runs and runs[-1][0] == stage.recompute:
            runs[-1] = (stage.recompute, runs[-1][1], s)
        else:
            runs.append((stage.recompute, s, s))
    named = [(mode, f"stage {a}" if a == b else f"stages {a}-{b}") for mode, a, b in runs if mode != "none"]
    if len(layout.stages) == 1:
        return layout.stages[0].recompute
    return ", ".join(f"{mode} on {where}" for mode, where in named) or "none"
