"""Every term of the step time: compute, collectives, waiting, and what is done once a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planner.cost import step
from planner.planning.detail.case import Case
from planner.planning.detail.compute import end_lines, layer_lines, recompute_lines
from planner.planning.detail.lines import FORMULAS, STREAM, STREAMED, Lines
from planner.planning.detail.source import growth_figures
from planner.planning.detail.tables import Collective, Inputs, Term


def terms_of(c: Case, collectives: Sequence[Collective]) -> tuple[Term, ...]:
    """Every line of the step time on the slowest rank; they add up to the estimate."""
    lines, s = Lines(c), c.slowest
    n = max(int(c.stages.layers[s]), 1)
    for i, kind in enumerate(c.kinds):
        count = float(c.counts[s, i])
        if not count:
            continue
        for direction in (0, 1):
            layer_lines(lines, kind, direction, c.m * count)
        for k, again in enumerate((c.stages.selective[s], c.stages.full[s])):
            if again:
                recompute_lines(lines, kind, k, c.m * float(again) * count / n)
    end_lines(lines)
    _collective_lines(lines, collectives)
    _pipeline_line(lines)
    _optimizer_lines(lines)
    fixed = c.task.accounting.step_seconds
    lines.add("other", "fixed time of a step", fixed, 1, FORMULAS["fixed"], {}, ("engine.step_seconds",))
    rest = c.plan.estimate.step_time_s - sum(t.total for t in lines.found)
    lines.put("rounding", "rounding", rest, 1, FORMULAS["rounding"], {}, ())
    return tuple(lines.found)


def _collective_lines(lines: Lines, collectives: Sequence[Collective]) -> None:
    """What each collective exposes."""
    for row in collectives:
        inputs: Inputs = {
            "bytes": row.bytes_per_call, "ranks": row.ranks, "stride": row.stride, "tiers": ", ".join(row.tiers),
            "busy s a call": row.seconds_per_call, "hides": row.hides,
        }  # fmt: skip
        name = f"{row.op} over {row.group}: {row.where}"
        lines.put(row.part, name, row.exposed / row.calls, row.calls, FORMULAS[row.part], inputs, row.figures)


def _pipeline_line(lines: Lines) -> None:
    """Waiting for the other ranks."""
    c, time = lines.c, lines.c.cost.time
    if c.layout.pp == 1:
        return
    v = c.layout.virtual_stages
    bubble = (
        (int(time.sum()) - int(time[c.slowest]) - step.credited(c.q.take(np.zeros(1, dtype=np.int64)), c.x, time)) / v / 1e9
    )
    inputs: Inputs = {
        "max R s": float(time.max()) / 1e9, "sum R s": float(time.sum()) / 1e9, "m": c.m, "v": v, "slowest rank": c.slowest,
    }  # fmt: skip
    behind = sorted({name for term in lines.found for name in term.figures if term.part != "dp_comm"})
    lines.put("bubble", "waiting for other ranks", bubble, 1, FORMULAS[c.layout.schedule], inputs, tuple(behind))


def _optimizer_lines(lines: Lines) -> None:
    """The optimizer on the rank that it holds up longest."""
    c, a, d = lines.c, lines.c.task.accounting, lines.c.updating
    around = "engine.engine_copies" if c.engines else "engine.reduce_copies"
    copies = ("engine.gather_copies", around, "engine.whole_sums") if any(a.gather_copies) else ()
    figures = (*STREAMED, "engine.optimizer_bytes", "engine.optimizer_whole_bytes", *copies, *growth_figures(c.task))
    first, last = c.ends(d)
    each: Inputs = {"rank": d, "bytes an owned parameter": a.optimizer_bytes, "bytes a parameter": a.optimizer_whole_bytes}
    layers = int(c.stages.layers[d])
    what = "optimizer, copies and sums of gradients" if copies else "optimizer"
    places = (("layers", "", layers), ("embedding", "_first", int(first)), ("head and final norm", "_last", int(last)))
    for name, suffix, times in places:
        seconds = c.ns(f"update{suffix}", d)
        if times and seconds:
            lines.put(
                "optimizer",
                f"{what}: {name}",
                seconds,
                times,
                STREAM,
                each,
                figures,
            )
