"""What binds every pipeline rank: the limit that keeps it from one more layer or one step less recompute."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from planner.cost import devicetypes, step
from planner.cost.blending import Stack
from planner.cost.primitives import Primitives
from planner.cost.task import LayoutArray, StageArray, Task
from planner.planning.explain.answers import Binding, Bottleneck, LessRecompute, OneMore, Rank
from planner.search import mixed, solve, stages
from planner.search.bounds import BIG
from planner.search.windows import Windows, windows
from planner.specs.layout import Layout, format_recompute
from planner.units import GIB


@dataclass(frozen=True)
class _Cost:
    """One rank, held as it is or otherwise."""

    time: int
    backward: int
    update: int

    @property
    def moment(self) -> Literal["backward", "update"]:
        """When it needs most."""
        return "update" if self.update > self.backward else "backward"

    @property
    def most(self) -> int:
        """Bytes then."""
        return max(self.backward, self.update)


@dataclass(frozen=True)
class _Row:
    """A layout's outer row, priced."""

    task: Task
    layout: Layout
    modes: tuple[int, ...]
    x: LayoutArray
    p: Primitives
    stack: Stack | None

    @cached_property
    def kinds(self) -> tuple[Primitives, ...]:
        """Primitives of each kind of layers on every rank."""
        return devicetypes.kinds_by_rank(self.task, self.x)

    @cached_property
    def types(self) -> tuple[int, ...]:
        """The device type of every rank."""
        return devicetypes.stages_of(self.task, self.layout)

    @cached_property
    def windows(self) -> Windows:
        """What a rank can hold."""
        longest = max(self.size(s) for s in range(self.layout.pp)) + 1
        return windows(self.task.model.kind_of_layer, self.chunks, longest)

    @cached_property
    def tables(self) -> stages.Tables:
        """The cheapest recompute of every rank and window."""
        reach = self.windows.reach * self.chunks
        g = solve.group_of(self.task, self.modes, self.x, self.p, self.stack, np.array([0]))
        return stages.tables(g, self.task, reach)

    @property
    def chunks(self) -> int:
        """Chunks a rank: the least number of layers that can move."""
        return self.layout.virtual_stages

    def start(self, s: int) -> int:
        """Where the window of rank s begins, in positions."""
        return sum(stage.layers for stage in self.layout.stages[:s]) // self.chunks

    def size(self, s: int) -> int:
        """Positions of rank s's window."""
        return -(-self.layout.stages[s].layers // self.chunks)

    def cost(self, s: int, start: int, layers: int, selective: int, full: int) -> _Cost:
        """Rank s with the window of `layers` layers from `start`."""
        a = np.array
        held = StageArray(a([0]), a([s]), a([1]), a([layers]), a([selective]), a([full]))
        kinds = [k.take(a([s])) for k in self.kinds]
        p = kinds[0]
        if self.stack is not None:
            counts = self.windows.counts[[self.windows.at[start, -(-layers // self.chunks)]]]
            p = mixed.blend_rank(Stack.of(kinds, self.task.model.text_kind), self.x, s, counts)
        c = step.stage_cost(p, self.x, held, p)
        return _Cost(int(c.time[0]), int(c.backward_bytes[0]), int(c.after_bytes[0]))

    def over(self, s: int, bytes_needed: int) -> float:
        """GiB of rank s beyond its device's limit; the allocator keeps more than is allocated."""
        task = self.task.on(self.types[s]) if self.task.types else self.task
        return (bytes_needed - int(self.kinds[0].capacity[s])) * task.reserved_ratio / GIB

    def wider(self, s: int) -> int | None:
        """Start of rank s's window with one more position: after its last layer, before its first on the last rank.

        None where no other rank could give a layer up.
        """
        start, size = self.start(s), self.size(s)
        if size + self.layout.pp > self.windows.positions:
            return None
        if start + size < self.windows.positions:
            return start
        return start - 1 if start > 0 else None


def explain_ranks(task: Task, layout: Layout, modes: tuple[int, ...]) -> tuple[list[Rank], Bottleneck]:
    """What binds each rank of a layout, and which one is slowest. `modes` are the recompute modes that are allowed."""
    x = LayoutArray.of([layout], task.job)
    row = _Row(task, layout, modes, x, *solve.price(task, x))
    costs = [row.cost(s, row.start(s), stage.layers, *stage.counts) for s, stage in enumerate(layout.stages)]
    slowest = max(c.time for c in costs)
    return [_rank(row, s, cost, slowest) for s, cost in enumerate(costs)], _bottleneck(row, costs)


def _bottleneck(row: _Row, costs: list[_Cost]) -> Bottleneck:
    order = sorted(range(len(costs)), key=lambda s: (-costs[s].time, s))
    ahead = costs[order[0]].time - costs[order[1]].time if len(order) > 1 else 0
    m = int(row.x.microbatches[0])  # the step counts v m - 1 chunks of the slowest rank beside the sum of all, over v
    return Bottleneck(
        stage=order[0],
        time_s=costs[order[0]].time / 1e9,
        next_stage=order[1] if len(order) > 1 else None,
        ahead_s=ahead / 1e9,
        per_step_s=ahead * m / 1e9,
    )


def _rank(row: _Row, s: int, cost: _Cost, slowest: int) -> Rank:
    stage = row.layout.stages[s]
    more, less = _one_more(row, s), _less_recompute(row, s)
    binding, reason = _binding(row, s, cost, slowest, more, less)
    return Rank(
        stage=s, layers=stage.layers, recompute=stage.recompute, binding=binding, reason=reason,
        slack_gib=-row.over(s, cost.most),
        hardware=row.task.types[row.types[s]].hardware.name if row.task.types else None,
        time_s=cost.time / 1e9, share=cost.time / slowest, one_more=more, less_recompute=less,
    )  # fmt: skip


def _one_more(row: _Row, s: int) -> OneMore | None:
    """The next layer too, kept as the rank's recompute says; and the cheapest recompute with which it fits."""
    start, stage = row.wider(s), row.layout.stages[s]
    if start is None:
        return None
    size, (selective, full) = row.size(s) + 1, stage.counts
    layers = int(row.windows.layers[row.windows.at[start, size]])
    if selective == stage.layers or full == stage.layers:  # uniform: the new layer too
        selective, full = layers * (selective > 0), layers * (full > 0)
    cost, t = row.cost(s, start, layers, selective, full), row.tables
    recompute, time = None, None
    line = t.at[0 if t.anywhere else start]
    entry = int(line[size]) if size < len(line) else -1
    if entry >= 0 and t.time[s, entry] < BIG:
        recompute = format_recompute(layers, int(t.selective[s, entry]), int(t.full[s, entry]))
        time = int(t.time[s, entry]) / 1e9
    return OneMore(
        layers=layers,
        over_gib=row.over(s, cost.most),
        moment=cost.moment,
        plain_time_s=cost.time / 1e9,
        recompute=recompute,
        time_s=time,
    )


def _less_recompute(row: _Row, s: int) -> LessRecompute | None:
    """The least step towards less recompute: one layer less, or a weaker mode of one; the whole rank with chunks."""
    stage, start = row.layout.stages[s], row.start(s)
    n, (selective, full) = stage.layers, stage.counts
    if row.chunks > 1:
        options = [(n, 0)] * (full > 0) + [(0, 0)] * (selective + full > 0)
    else:
        options = [(selective - 1, full)] * (selective > 0) + [(selective + 1, full - 1), (selective, full - 1)] * (full > 0)
    now = row.cost(s, start, n, selective, full).time
    allowed = [o for o in options if _uses(n, *o) <= set(row.modes)]
    costs = [(row.cost(s, start, n, *o), o) for o in allowed]
    faster = [(c.most, o) for c, o in costs if c.time < now]
    if not faster:
        return None
    most, (n1, n2) = min(faster)
    return LessRecompute(recompute=format_recompute(n, n1, n2), over_gib=row.over(s, most))


def _uses(layers: int, selective: int, full: int) -> set[int]:
    """Recompute modes that a stage's counts use."""
    counts = (layers - selective - full, selective, full)
    return {mode for mode, count in enumerate(counts) if count}


def _binding(
    row: _Row, s: int, cost: _Cost, slowest: int, more: OneMore | None, less: LessRecompute | None
) -> tuple[Binding, str]:
    """What binds a rank, and why in one sentence."""
    moment: Binding = "memory in update" if cost.moment == "update" else "memory in backward"
    if (over := row.over(s, cost.most)) > 0:
        return moment, f"it needs {over:.1f} GiB more than a device may hold"
    if less is not None and less.over_gib > 0:
        return moment, f"it recomputes because with {less.recompute} it is {_gib(less.over_gib)} over the limit"
    if less is not None:
        return "nothing", f"memory would let it recompute less: {less.recompute}"
    if more is None and len(row.layout.stages) > 1:
        return "rule", "every chunk holds at least one layer: no other rank can give one up"
    if more is None:
        return "nothing", "it holds all layers, and memory is left"
    unit = "one more layer" if row.chunks == 1 else f"one more layer in each of its {row.chunks} chunks"
    tight: Binding = "memory in update" if more.moment == "update" else "memory in backward"
    if more.recompute is None or more.time_s is None:
        return tight, f"{unit} fits under no recompute: {_gib(more.over_gib)} over the limit as it recomputes now"
    if (longer := more.plain_time_s * 1e9 / slowest - 1) > 0:
        fits = f", and be {_gib(more.over_gib)} over the limit" if more.over_gib > 0 else ""
        return "time", f"{unit} would take {longer:.1%} longer than the slowest rank does{fits}"
    if (longer := more.time_s * 1e9 / slowest - 1) > 0:
        return tight, f"{unit} fits only with recompute {more.recompute}: {longer:.1%} longer than the slowest rank takes"
    if row.layout.stages[s].layers == row.chunks:
        return "rule", "every chunk holds at least one layer; it could hold more"
    return "nothing", f"{unit} would fit and be no slower than the slowest rank"


def _gib(value: float) -> str:
    return f"{value:.1f} GiB" if value >= 0.1 else f"{value * 1024:.0f} MiB"
