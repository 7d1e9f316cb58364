"""One job on several cluster sizes: a proven plan for each, and the size that an objective picks.

Comes in: a request and counts of devices or nodes. Goes out: `Scaling`, one row a count. Every count is planned on its own,
never by bisection: the best step time is not monotone in the number of devices, because divisibility comes and goes. A count
is left out only where a bound settles it, and its row says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from planner import stopping
from planner.engines.base import job_problems
from planner.errors import InfeasibleError, InputError, Problem, input_error
from planner.planfile import CountChoice, Objective, Plan
from planner.planning import make
from planner.planning.choice import TIE
from planner.planning.economy import DAY, in_time
from planner.planning.request import Request, Setting, one_type, prepare
from planner.search.solve import Progress
from planner.search.space import declared_space
from planner.units import days, seconds, significant

if TYPE_CHECKING:
    import pandas as pd

Status = Literal["planned", "infeasible", "refused", "skipped", "open"]
"""planned; infeasible: proven that nothing fits; refused: no such cluster or job; skipped: a bound settles it; open: stopped
before it was planned."""


_STOPPED = "not planned: the scan was stopped"


@dataclass(frozen=True)
class Row:
    """One count."""

    gpus: int
    """Devices."""
    nodes: int
    status: Status
    plan: Plan | None = None
    """The proven best plan of a `planned` row; the best so far of the one that was being planned when the scan was stopped."""
    reason: str = ""
    """Why there is no plan, or what to know about the one there is."""


@dataclass(frozen=True)
class Scaling:
    """The plans of one job over cluster sizes, ascending."""

    rows: tuple[Row, ...]
    objective: Objective
    chosen: int | None
    """Index of the row that the objective picks; None when no row fits, or none meets the deadline."""
    reason: str
    """Why that one, or why none; one sentence."""

    @property
    def plans(self) -> dict[int, Plan]:
        """The plans by number of devices."""
        return {row.gpus: row.plan for row in self.rows if row.plan is not None}

    @property
    def plan(self) -> Plan | None:
        """The plan of the chosen row; it says which counts it was compared with."""
        return None if self.chosen is None else self.rows[self.chosen].plan

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row a count: see `planner.planning.scaletable`."""
        from planner.planning.scaletable import frame_of

        return frame_of(self)

    def to_data(self) -> dict[str, Any]:
        """Plain JSON data: the choice, and the rows of `frame`."""
        from planner.planning.scaletable import data_of

        return data_of(self)

    def require(self) -> Plan:
        """The chosen plan. Raises InfeasibleError when there is none."""
        if self.plan is None:
            late = any(row.plan is not None or row.status == "skipped" for row in self.rows)
            fix = "give more devices, or a later --deadline-days" if late else "give other counts, or loosen pins and limits"
            why = "" if late else next((row.reason for row in reversed(self.rows) if row.status == "infeasible"), "")
            raise InfeasibleError(Problem("PLN304" if late else "PLN303", self.reason, why, fix))
        return self.plan


def scale(
    request: Request,
    counts: Sequence[int],
    alternatives: int = 4,
    progress: Progress | None = None,
    time_limit: float | None = None,
) -> Scaling:
    """Plan `request` on each of `counts`: nodes where the request has `nodes`, devices otherwise (the value is replaced).

    `time_limit` (seconds) is for all counts together. It or a signal ends the scan: the count that was being planned has its
    best plan so far, with a gap, and later ones are `open`.
    Raises InputError when the request is wrong for every count.
    """
    one_type(request, "several sizes")
    if request.objective == "memory":
        why = "the lowest peak memory is found for one cluster"
        raise input_error(
            "PLN127", "--objective memory with several counts", why, "give one count, or choose another objective"
        )
    scan = _Scan(request, alternatives, progress)
    # Fast clusters first, where they can rule out slow ones; otherwise small ones first.
    with stopping.limit(time_limit):
        for count in sorted(counts, reverse=request.objective == "time"):
            scan.add(count)
    if not scan.rows:
        raise scan.refused[min(scan.refused)]
    return _chosen(tuple(sorted([*scan.rows, *scan.refused_rows()], key=lambda row: row.gpus)), request)


@dataclass
class _Scan:
    """The rows so far."""

    request: Request
    alternatives: int
    progress: Progress | None

    def __post_init__(self) -> None:
        self.ended = False
        self.rows: list[Row] = []
        self.refused: dict[int, InputError] = {}
        self.node_size = 1

    def add(self, count: int) -> None:
        """Plan one more count."""
        one = self.request
        request = replace(one, gpus=count) if self._unit == "gpus" else replace(one, nodes=count)
        try:
            setting = prepare(request)
            if problems := job_problems(setting.task, setting.engine):
                raise InputError(problems)
        except InputError as error:
            self.refused[count] = error
            return
        self.node_size = setting.cluster.node_size
        self.rows.append(self._row(request, setting))

    @property
    def _unit(self) -> str:
        """What the counts count."""
        return "gpus" if self.request.nodes is None else "nodes"

    def refused_rows(self) -> list[Row]:
        """The counts that no cluster or no job can have, with the first problem of each."""
        size, rows = self.node_size, []
        for count, error in self.refused.items():
            gpus, nodes = (count, -(-count // size)) if self._unit == "gpus" else (count * size, count)
            rows.append(Row(gpus, nodes, "refused", reason=error.problems[0].what))
        return rows

    def _row(self, request: Request, setting: Setting) -> Row:
        gpus, nodes = setting.cluster.gpus, setting.cluster.nodes
        if self.ended or stopping.due():
            return Row(gpus, nodes, "open", reason=_STOPPED)
        if why := _settled(setting, request.objective, self.rows):
            return Row(gpus, nodes, "skipped", reason=why)
        note = batch_note(gpus, setting.task.job.global_batch, setting.cluster.node_size)
        try:
            if why := _misfit(request, setting):
                return Row(gpus, nodes, "infeasible", reason="; ".join(filter(None, (why, note))))
            plan = make.make_plan(request, self.alternatives, self.progress)
        except (TimeoutError, KeyboardInterrupt):
            self.ended = True
            return Row(gpus, nodes, "open", reason=_STOPPED)
        proof = plan.certificate
        if proof is not None and proof.status == "interrupted":
            self.ended = True
            note = "; ".join(filter(None, (f"stopped with a gap of {proof.gap or 0:.2%}", note)))
        return Row(gpus, nodes, "planned", plan, note)


def _misfit(request: Request, setting: Setting) -> str:
    """Why nothing fits, "" when something does."""
    from planner.search.explain import any_fits

    space = declared_space(setting.task, setting.engine, request.pins, request.forbid)
    return "" if any_fits(setting.task, setting.engine, space) else make.why_nothing_fits(setting, space, "").what


def batch_note(gpus: int, global_batch: int, node_size: int) -> str:
    """What an awkward count does to the batch; "" where tensor parallelism inside a node takes up the rest.

    dp divides both the devices and the global batch, so it is at most their greatest common divisor.
    """
    most = math.gcd(gpus, global_batch)
    if node_size % (gpus // most) == 0:
        return ""
    return f"global batch {global_batch:,} is not divisible by {gpus:,}: at most {most:,} data-parallel ranks"


def _settled(setting: Setting, objective: Objective, rows: Sequence[Row]) -> str:
    """Why a count needs no plan: a bound on its step time, or a smaller count that does. "" when it needs one."""
    found = [row for row in rows if row.plan is not None and in_time(row.plan.economy)]
    if objective == "min-gpus" and found:
        return f"{found[0].gpus:,} devices are enough"
    least = least_step(setting)
    if setting.budget is not None and setting.budget.deadline_days is not None:
        steps = -(-setting.budget.tokens // setting.task.job.tokens_per_step)
        if steps * least / DAY > setting.budget.deadline_days:
            return f"{days(steps * least / DAY)} even at the peak rate: after the deadline"
    if objective == "time" and found:
        best = min(found, key=_step)
        if least > _step(best):
            return f"{seconds(least)} a step even at the peak rate, {best.gpus:,} devices need {seconds(_step(best))}"
    return ""


def least_step(setting: Setting) -> float:
    """Seconds that no layout can stay below: the model's FLOPs, causal attention, over the peak of all devices."""
    task = setting.task
    flops = task.model.flops_per_token(task.job.seq_len, "causal") * task.job.tokens_per_step
    return flops / (max(task.peak, task.linear_peak) * task.gpus)


def _step(row: Row) -> float:
    return math.inf if row.plan is None else row.plan.estimate.step_time_s


def _chosen(rows: tuple[Row, ...], request: Request) -> Scaling:
    """The rows with the one that the objective picks; equal ones are decided by fewer devices."""
    objective = request.objective
    usable = [i for i, row in enumerate(rows) if row.plan is not None and in_time(row.plan.economy)]
    if not usable:
        late = any(row.plan is not None or row.status == "skipped" for row in rows)
        return Scaling(rows, objective, None, f"no count of {len(rows)} {'meets the deadline' if late else 'fits'}")
    best = min(usable, key=lambda i: (_value(rows[i], objective), rows[i].gpus))
    plan = rows[best].plan
    assert plan is not None
    near = [rows[i] for i in usable if i != best and _value(rows[i], objective) <= (1 + TIE) * _value(rows[best], objective)]
    unplanned = sum(row.status == "open" for row in rows)
    reason = _reason(rows[best], plan, objective)
    if near and objective != "min-gpus":
        listed = " and ".join(f"{row.gpus:,}" for row in near)
        reason += f"; {listed} within {TIE:.0%}, which runs cannot tell apart"
    reason += f"; {unplanned} not planned" if unplanned else ""
    why = CountChoice(compared=[row.gpus for row in rows], reason=reason)
    row = replace(rows[best], plan=plan.model_copy(update={"count_choice": why}))
    return Scaling((*rows[:best], row, *rows[best + 1 :]), objective, best, reason)


def _value(row: Row, objective: Objective) -> float:
    """What an objective minimises: seconds of a step, device-seconds of a step, or devices."""
    if objective == "min-gpus":
        return row.gpus
    return _step(row) * (row.gpus if objective == "cost" else 1)


def _reason(row: Row, plan: Plan, objective: Objective) -> str:
    """Why a row was picked."""
    money, devices = plan.economy, f"{row.gpus:,} devices"
    step = f"{seconds(plan.estimate.step_time_s)} a step"
    if objective == "min-gpus":
        due = None if money is None else money.deadline_days
        text = f"{devices} are the fewest that fit" + ("" if due is None else f" and meet the deadline of {days(due)}")
    elif objective == "cost":
        hours = plan.estimate.step_time_s * row.gpus / 3600
        each = f"{significant(hours)} device-hours a step"
        if money is not None:
            each = f"{money.device_hours.value:,.0f} device-hours"
            each += f", {money.cost_usd.value:,.0f} USD" if money.cost_usd is not None else ""
        text = f"{devices} cost least: {each}"
    else:
        text = f"{devices} are fastest: {step}" + ("" if money is None else f", {days(money.days.value)}")
    if money is not None and money.deadline_days is not None and money.days.high > money.deadline_days:
        text += f"; the interval's end, {days(money.days.high)}, is after the deadline"
    return text
