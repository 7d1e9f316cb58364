"""Step time against something else: the plans that no other one beats in both.

Comes in: a request, and what the step time is weighed against. Goes out: `Front`, one proven plan a point. Against memory the
points are the optima under several memory limits (`search.front`); against devices or cost they are the plans of several
cluster sizes (`scale`): on one size both follow from the step time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from planner import stopping
from planner.engines.base import job_problems
from planner.errors import InfeasibleError, InputError, Problem, input_error
from planner.planfile import Plan
from planner.planning import make
from planner.planning.request import Request, one_type, prepare
from planner.planning.scale import scale
from planner.search.front import Settled, memory_front, nondominated
from planner.search.solve import Progress
from planner.search.space import Space, declared_space
from planner.units import GIB

if TYPE_CHECKING:
    import pandas as pd

    from planner.planning.request import Setting

Against = Literal["memory", "gpus", "cost"]
POINTS, MAX_POINTS = 16, 256
"""Memory limits that are tried: by default, and at most."""
FORMAT, VERSION = "planner.pareto", "1.0"
HOUR, BILLION = 3600.0, 1e9
MEASURES = (
    "limit_gib", "peak_gib", "step_time_s", "step_time_low_s", "step_time_high_s", "slower", "tokens_per_s_per_gpu", "mfu",
    "oom_probability", "device_hours_per_b_tokens", "usd_per_b_tokens",
)  # fmt: skip
COLUMNS = ("gpus", "nodes", "on_front", "proof", *MEASURES, "layout")
"""Sizes in GiB, times in seconds, device-hours and USD of a billion tokens; `slower` is the share above the fastest point."""


@dataclass(frozen=True)
class Point:
    """One plan."""

    plan: Plan
    limit_gib: float
    """The memory limit that it was proven the fastest under, GiB."""
    on_front: bool = True
    """Whether no other point is as good in both; points off the front are kept where they are rows of a table of sizes."""


@dataclass(frozen=True)
class Front:
    """The plans, by ascending step time against memory, by ascending devices otherwise."""

    against: Against
    points: tuple[Point, ...]
    notes: tuple[str, ...] = ()
    """What to know about it: sizes without a plan, an early end."""
    stopped: bool = False
    """Whether a time limit or a signal ended it before all points were found."""

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row a point: `COLUMNS`."""
        import pandas as pd

        fastest = min((p.plan.estimate.step_time_s for p in self.points), default=1.0)
        return pd.DataFrame([_cells(p, fastest) for p in self.points], columns=list(COLUMNS))

    def to_data(self) -> dict[str, Any]:
        """Plain JSON data: the rows of `frame`."""
        frame = self.frame.astype(object)
        rows = frame.where(frame.notna(), None).to_dict(orient="records")
        points = [{str(k): v for k, v in row.items()} for row in rows]
        head = {"format": FORMAT, "version": VERSION, "against": self.against, "stopped": self.stopped}
        return {**head, "notes": list(self.notes), "points": points}


def checked_against(name: str) -> Against:
    """What step time is weighed against. Raises InputError."""
    known = get_args(Against)
    if name not in known:
        raise input_error("PLN107", f"--pareto {name}: nothing to weigh against", f"one of {', '.join(known)}", "")
    return cast(Against, name)


def pareto(
    request: Request,
    against: Against,
    points: int = POINTS,
    counts: Sequence[int] = (),
    progress: Progress | None = None,
    time_limit: float | None = None,
) -> Front:
    """The front of a request. `points`: memory limits to try; `counts`: devices, or nodes where the request has `nodes`.

    Every point is a proven optimum: under its memory limit, or on its number of devices. `time_limit` (seconds) or a signal
    leave the points found so far. Raises InputError, InfeasibleError when nothing fits, TimeoutError or KeyboardInterrupt
    when stopped before the first point.
    """
    one_type(request, f"--pareto {against}")
    if not 1 <= points <= MAX_POINTS:
        raise input_error("PLN107", f"--points {points}: not between 1 and {MAX_POINTS}", "each is a proof", "")
    if against == "memory" and len(set(counts)) > 1:
        raise input_error("PLN129", "--pareto memory with several counts", "it is the front of one cluster", "give one count")
    with stopping.limit(time_limit):
        if against == "memory":
            return _memory(request, points, progress)
        return _counts(request, against, counts, progress)


def _memory(request: Request, points: int, progress: Progress | None) -> Front:
    setting = prepare(request)
    if problems := job_problems(setting.task, setting.engine):
        raise InputError(problems)
    space = declared_space(setting.task, setting.engine, request.pins, request.forbid)
    found: list[Settled] = []
    stopped = False
    try:
        for settled in memory_front(setting.task, setting.engine, space, points, progress):
            if not settled.outcome.candidates:
                if settled.outcome.status == "infeasible":
                    raise make.explain_infeasible(setting, space, request, make.certificate_of(settled.outcome, space, None))
                raise TimeoutError if settled.outcome.stopped_by == "limit" else KeyboardInterrupt
            found.append(settled)
            stopped = bool(settled.outcome.stopped_by)
    except (TimeoutError, KeyboardInterrupt):
        if not found:
            raise
        stopped = True
    made = [_point(setting, space, one) for one in found]
    times = [one.outcome.candidates[0].step_ns for one in found]
    kept = nondominated([p.plan.estimate.memory.peak_gib for p in made], times)
    return Front("memory", tuple(made[i] for i in kept.tolist()), _notes(stopped), stopped)


def _notes(stopped: bool) -> tuple[str, ...]:
    return ("stopped early: points are missing",) if stopped else ()


def _point(setting: Setting, space: Space, settled: Settled) -> Point:
    """The plan under a lower memory limit: its policy holds that limit, so that the plan file can be checked against it."""
    policy = setting.policy.model_copy(update={"max_memory_fraction": settled.task.max_memory_fraction})
    lower = replace(setting, task=settled.task, policy=policy)
    plan = make.assembled(lower, settled.outcome, make.certificate_of(settled.outcome, space, None))
    return Point(plan, settled.task.limit / GIB)


def _counts(request: Request, against: Against, counts: Sequence[int], progress: Progress | None) -> Front:
    if len(set(counts)) < 2:
        why = (
            f"on one cluster size {'there is one number of them' if against == 'gpus' else 'the fastest plan is the cheapest'}"
        )
        raise input_error(
            "PLN129", f"--pareto {against} with one cluster size", why, "give several: --nodes 8:64:8, or --pareto memory"
        )
    made = scale(replace(request, objective="throughput"), counts, 1, progress)
    planned = [row.plan for row in made.rows if row.plan is not None]
    stopped = any(row.status == "open" for row in made.rows) or any(
        p.certificate is not None and p.certificate.status == "interrupted" for p in planned
    )
    if not planned:
        if stopped:
            raise KeyboardInterrupt if stopping.received() else TimeoutError
        why = next((row.reason for row in reversed(made.rows) if row.reason), "")
        fix = "give other counts, or loosen pins and limits"
        raise InfeasibleError(Problem("PLN303", f"no count of {len(made.rows)} fits", why, fix))
    cost = [float(p.cluster.gpus) * (p.estimate.step_time_s if against == "cost" else 1.0) for p in planned]
    kept = set(nondominated(cost, [p.estimate.step_time_s for p in planned]).tolist())
    points = tuple(Point(p, p.estimate.memory.limit_gib, i in kept) for i, p in enumerate(planned))
    notes = tuple(f"{row.gpus:,} devices: {row.reason}" for row in made.rows if row.reason)
    return Front(against, points, notes + _notes(stopped), stopped)


def _cells(point: Point, fastest: float) -> dict[str, Any]:
    plan = point.plan
    e, proof = plan.estimate, plan.certificate
    hours = e.step_time_s * plan.cluster.gpus / HOUR * BILLION / plan.job.tokens_per_step
    rate = plan.economy.price_usd_per_device_hour if plan.economy is not None else None
    figure = plan.hardware.price
    price = rate.value if rate is not None else None if figure is None else figure.base
    cells: dict[str, Any] = {name: getattr(e, name) for name in ("step_time_s", "tokens_per_s_per_gpu", "mfu")}
    cells |= {"gpus": plan.cluster.gpus, "nodes": plan.cluster.nodes, "on_front": point.on_front}
    cells |= {"proof": "" if proof is None else proof.status, "limit_gib": point.limit_gib, "peak_gib": e.memory.peak_gib}
    cells |= {"step_time_low_s": e.interval.low_s, "step_time_high_s": e.interval.high_s}
    cells |= {"slower": e.step_time_s / fastest - 1.0, "oom_probability": e.memory.oom_probability}
    cells |= {"device_hours_per_b_tokens": hours, "usd_per_b_tokens": None if price is None else hours * price}
    return cells | {"layout": make.short(plan.layout)}
