"""A plan's tables, made from its priced layout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from planner.errors import input_error
from planner.planfile import Plan
from planner.planning.detail.case import case_of
from planner.planning.detail.comm import collectives_of
from planner.planning.detail.memory import folded, ranks_of
from planner.planning.detail.tables import KINDS, Bytes, Collective, Detail, Rank, Term
from planner.planning.detail.time import terms_of
from planner.planning.request import task_of_plan


def detail_of(plan: Plan, kinds: Iterable[str] = KINDS, engine: str | None = None) -> Detail:
    """The tables of a plan's estimate. `engine` names its accounting with traits where `plan.engine` leaves them out."""
    if plan.cluster.types:
        raise input_error("PLN154", "--detail with two device types", "its tables are of one profile", "leave out --detail")
    task, _ = task_of_plan(plan if engine is None else plan.model_copy(update={"engine": engine}))
    c, wanted = case_of(task, plan), set(kinds)
    collectives = collectives_of(c)
    terms = terms_of(c, collectives)
    ranks = ranks_of(c)
    return Detail(
        step_time_s=plan.estimate.step_time_s,
        slowest_rank=c.slowest,
        growth=task.growth,
        time=terms if "time" in wanted else None,
        memory=folded(ranks) if "memory" in wanted else None,
        comm=collectives if "comm" in wanted else None,
        source=c.book.used(_names(terms, ranks, collectives)) if "source" in wanted else None,
    )


def _names(terms: Sequence[Term], ranks: Sequence[Rank], collectives: Sequence[Collective]) -> set[str]:
    """The figures that the lines name."""
    lines: list[Term | Bytes | Collective] = [*terms, *collectives]
    for rank in ranks:
        lines += [*rank.parts, *rank.outside]
    return {name for line in lines for name in line.figures}
