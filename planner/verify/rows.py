"""Every outer row that fits settled again: no layout of it takes less than the plan says it could.

Three steps, each exact or on the safe side: a bound without memory, one on the exact table of every rank and run, and the
exact inner problem (`labels`) for the rows that those leave.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from planner.cost import step
from planner.cost.task import Ints
from planner.verify import chains, labels, tables
from planner.verify.report import Progress
from planner.verify.tables import NEVER, Priced, Ranks

# ---- time ----------------------------------------------------------------------------------------------------------


@dataclass
class Settled:
    """How many rows each step settled, and the rows that contradict the plan."""

    by_bound: int = 0
    by_table: int = 0
    by_labels: int = 0
    below: dict[int, int] = field(default_factory=dict)
    """Row -> step time (ns) that it reaches although it must not."""


def settle(rows: Priced, modes: tuple[int, ...], cutoff: Ints, progress: Progress, least: Ints | None = None) -> Settled:
    """Look in every row for a layout below its cutoff, ns. `least`: `least_steps` of the rows, where they are known."""
    found = Settled()
    left = np.nonzero((least_steps(rows, modes) if least is None else least) < cutoff)[0]
    found.by_bound = len(rows) - len(left)
    done = found.by_bound
    for batch in tables.batches(rows.layouts, left):
        reach = _longest(rows, batch, modes, cutoff)
        order = batch[np.argsort(reach, kind="stable")]
        longest = np.sort(reach, kind="stable")
        start = 0
        while start < len(order):
            # rows whose longest runs are alike share a table
            top = int(longest[start]) * 5 // 4 + 1
            same = order[start : int(np.searchsorted(longest, top, side="right"))]
            piece = tables.pieces(rows, same, modes, top)[0]
            _piece(rows, piece, modes, cutoff[piece], int(longest[start + len(piece) - 1]), found)
            start += len(piece)
            done += len(piece)
            progress("time of rows", done, len(rows))
    return found


def _limit(r: Ranks, cutoff: Ints) -> Ints:
    """The largest factor max R + sum R + v max D of a step below the cutoff: ceil(x / v) + constant < cutoff."""
    return (cutoff - 1 - r.constant) * r.chunks


def _factor(r: Ranks) -> Ints:
    return r.chunks * r.m - 1


def _least_work(rows: Priced, r: Ranks) -> tuple[Ints, Ints]:
    """(least sum of R, least max R) over all splits, memory aside, shape (rows,)."""
    counts = [n for _, n in rows.task.model.kinds] if len(rows.kinds) > 1 else [rows.task.model.n_layers]
    each = tables.least_layers(rows, r.modes)
    ends = np.broadcast_to(step.end_time(r.p, r.first, r.last)[:, :, 0], (len(rows), r.pp))
    total = ends.sum(axis=1) + sum((n * t for n, t in zip(counts, each, strict=True)), np.zeros(len(rows), dtype=np.int64))
    cheapest = np.minimum.reduce(each)
    lacking = r.runs.places * r.chunks - r.runs.n_layers
    fullest = (-(-r.runs.places // r.pp) * r.chunks - lacking) * cheapest + ends.min(axis=1)
    alone = (ends + r.chunks * cheapest[:, None]).max(axis=1)
    return total, np.maximum.reduce([-(-total // r.pp), fullest, alone])


def least_steps(rows: Priced, modes: tuple[int, ...]) -> Ints:
    """Lower bound on the step of each row without memory, ns: every layer is somewhere, and some rank holds its share."""
    least = np.zeros(len(rows), dtype=np.int64)
    for batch in tables.batches(rows.layouts, np.arange(len(rows))):
        part = rows.take(batch)
        r = tables.ranks_alone(part, modes)
        total, slowest = _least_work(part, r)
        least[batch] = -(-(_factor(r) * slowest + total - r.credit) // r.chunks) + r.constant
    return least


def _longest(rows: Priced, batch: Ints, modes: tuple[int, ...], cutoff: Ints) -> Ints:
    """Places of the longest run that a rank of each row can hold in a step below its cutoff, at least 1."""
    part = rows.take(batch)
    r = tables.ranks_alone(part, modes)
    total, _ = _least_work(part, r)
    slowest = (_limit(r, cutoff[batch]) - total + r.credit) // np.maximum(_factor(r), 1)
    layer = np.minimum.reduce(tables.least_layers(part, modes))
    most, lacking = r.runs.places - r.pp + 1, r.runs.places * r.chunks - r.runs.n_layers
    fitting = np.clip((slowest // np.maximum(layer, 1) + lacking) // r.chunks, 1, most)
    return np.where(_factor(r) > 0, fitting, most)


def _piece(rows: Priced, piece: Ints, modes: tuple[int, ...], cutoff: Ints, longest: int, found: Settled) -> None:
    """Settle rows that share a table of runs of up to `longest` places."""
    part = rows.take(piece)
    r = tables.ranks_of(part, modes, longest)
    limit, factor = _limit(r, cutoff), _factor(r)
    time = _times(part, r, limit, factor)
    once = np.where(time < NEVER, tables.once(r), NEVER)
    rests = [
        chains.to_the_end(values, r.runs, join) for values, join in ((time, np.maximum), (once, np.maximum), (time, np.add))
    ]
    slowest, step_wise, total = (rest[:, 0, 0] for rest in rests)
    possible = np.nonzero(total < NEVER)[0]
    bound = factor[possible] * slowest[possible] + total[possible] - r.credit[possible] + r.chunks * step_wise[possible]
    open_ = possible[bound <= limit[possible]]
    found.by_table += len(piece) - len(open_)
    for i in open_.tolist():
        value = labels.least_value(
            time[i], once[i], r.runs, (int(factor[i]), int(r.credit[i])), (rests[0][i], rests[1][i], rests[2][i]), int(limit[i])
        )  # fmt: skip
        if value is None:
            found.by_labels += 1
        else:
            found.below[int(piece[i])] = -(-value // r.chunks) + int(r.constant[i])


def _times(part: Priced, r: Ranks, limit: Ints, factor: Ints) -> Ints:
    """R of each rank and run, exact; NEVER where it does not fit or is too slow for the limit by itself."""
    total, _ = _least_work(part, r)
    slowest = np.where(factor > 0, (limit - total + r.credit) // np.maximum(factor, 1), NEVER)[:, None, None]
    work = tables.work(r)
    quick = work + r.layers * tables.least_again(r) <= slowest
    used = np.nonzero(quick.any(axis=(1, 2)))[0]
    time = np.full(r.shape(), NEVER)
    if len(used):
        sub = tables.ranks_of(part.take(used), r.modes, r.runs.longest)
        again = tables.recompute_time(sub)
        whole = np.where(again < NEVER, tables.work(sub) + np.minimum(again, NEVER - 1), NEVER)
        time[used] = np.where(quick[used] & (whole <= slowest[used]), whole, NEVER)
    return time
