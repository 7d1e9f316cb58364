"""Which of the proven layouts becomes the plan: the fastest, or a near tie that is simpler or leaves more memory.

Comes in: the search's candidates, best first, each with its estimate. Goes out: the index of the plan and the sentence that
says why. The proof is untouched: its optimum stays among the alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planner.planfile import Estimate
from planner.specs.layout import Layout
from planner.units import GIB, MIB, gib, seconds

TIE = 0.01
"""Step times this near cannot be told apart: repeats of one configuration on one cluster differ by 1.3 to 1.6 % in published
runs."""

MORE_HEADROOM = 0.02
"""Headroom counts as better when it grows by this share of the memory limit."""


@dataclass(frozen=True)
class Proven:
    """A candidate of the search with its estimate."""

    layout: Layout
    estimate: Estimate

    @property
    def headroom(self) -> float:
        """GiB that the fullest rank leaves below the limit."""
        return min(stage.headroom for stage in self.estimate.memory.stages)


def choose(found: Sequence[Proven]) -> int:
    """Index of the plan in `found`, whose first entry is the proven optimum and whose order is the search's.

    A near tie may replace the optimum only where it has no less headroom and no more moving parts, and one of them is
    strictly better. Among several: fewest parts, most headroom, fastest, then the search's order.
    """
    ties = [i for i in range(1, len(found)) if _replaces(found[i], found[0])]

    def order(i: int) -> tuple[int, float, float, int]:
        return moving_parts(found[i].layout), -found[i].headroom, found[i].estimate.step_time_s, i

    return min(ties, key=order, default=0)


def _replaces(other: Proven, fastest: Proven) -> bool:
    if other.estimate.step_time_s > (1.0 + TIE) * fastest.estimate.step_time_s:
        return False
    fewer = moving_parts(fastest.layout) - moving_parts(other.layout)
    more = other.headroom - fastest.headroom
    return fewer >= 0 and more >= 0 and (fewer > 0 or more >= MORE_HEADROOM * fastest.estimate.memory.limit_gib)


def moving_parts(layout: Layout) -> int:
    """How much there is to set up and to go wrong: one for each mechanism in use, and the ZeRO stage."""
    layers = {stage.layers for stage in layout.stages}
    selective, full = (sum(counts) for counts in zip(*(stage.counts for stage in layout.stages), strict=True))
    untouched = sum(stage.layers for stage in layout.stages) - selective - full
    return layout.zero + sum(
        (
            layout.tp > 1,
            layout.cp > 1,
            layout.pp > 1,
            layout.ep > 1,
            layout.etp > 1,
            layout.virtual_stages > 1,
            layout.schedule not in ("none", "1f1b"),
            len(layers) > 1,
            selective + full > 0,
            sum(count > 0 for count in (selective, full, untouched)) > 1,
            layout.offload != "none",
            layout.order != "tp-cp-dp-pp",
            layout.context != "default",
        )
    )


def reason(found: Sequence[Proven], chosen: int, name: str) -> str:
    """Why `chosen` is the plan, in one sentence; `name` is the optimum in one line."""
    if chosen == 0:
        return "the fastest layout that was found"
    plan, fastest = found[chosen], found[0]
    slower = plan.estimate.step_time_s / fastest.estimate.step_time_s - 1.0
    parts, most = moving_parts(plan.layout), moving_parts(fastest.layout)
    more = (plan.headroom - fastest.headroom) * GIB
    simpler = f"{parts} moving part{'s' * (parts != 1)} {f'instead of {most}' if parts < most else 'too'}"
    emptier = f"{gib(more)} more headroom" if more >= MIB else "the same headroom"
    time = seconds(fastest.estimate.step_time_s)
    return (
        f"preferred to the proven fastest ({name}; {time} a step): {slower:.2%} slower, which runs cannot tell apart, "
        f"with {simpler} and {emptier}"
    )


def inside_interval(plan: Estimate, others: Sequence[float]) -> int:
    """How many step times of `others` (ascending) a measurement could find as fast as the plan: up to its interval's end."""
    return sum(other <= plan.interval.high_s for other in others)
