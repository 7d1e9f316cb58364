"""What another layout loses against the plan, and where: the step by part, and the peak."""

from __future__ import annotations

from planner.planfile import Breakdown, Estimate
from planner.planning.explain.answers import Loss
from planner.planning.make import short
from planner.specs.layout import Layout
from planner.units import seconds

PARTS = {
    "compute": "compute", "recompute": "recompute", "tp_comm": "tensor traffic", "cp_comm": "context traffic",
    "ep_comm": "expert traffic", "zero_comm": "ZeRO traffic", "pp_comm": "pipeline traffic", "bubble": "bubble",
    "dp_comm": "data traffic", "optimizer": "optimizer", "other": "other",
}  # fmt: skip
"""Parts of a step in words."""

_NAMED = 0.08
"""Parts below this share of the largest difference are not named in the sentence."""


def loss_of(plan: Estimate, layout: Layout, estimate: Estimate) -> Loss:
    """A layout with its estimate against the plan's."""
    a, b = plan.breakdown, estimate.breakdown
    difference = Breakdown(**{name: getattr(b, name) - getattr(a, name) for name in PARTS})
    slower = estimate.step_time_s / plan.step_time_s - 1.0
    peak = estimate.memory.peak_gib - plan.memory.peak_gib
    return Loss(
        layout=layout,
        name=short(layout),
        step_time_s=estimate.step_time_s,
        slower=slower,
        difference=difference,
        peak_gib=estimate.memory.peak_gib,
        peak_difference_gib=peak,
        sentence=sentence(slower, difference, peak),
    )


def sentence(slower: float, difference: Breakdown, peak_gib: float) -> str:
    """The difference in one sentence, its largest parts first: "+1.9 %: bubble +0.9 s, tensor traffic -0.3 s"."""
    sizes = {name: getattr(difference, name) for name in PARTS}
    largest = max(abs(v) for v in sizes.values())
    named = [name for name, v in sizes.items() if abs(v) >= max(_NAMED * largest, 1e-6)]
    named.sort(key=lambda name: -abs(sizes[name]))
    parts = ", ".join(f"{PARTS[name]} {signed(sizes[name])}" for name in named) or "no part differs"
    return f"{slower:+.1%}: {parts}; peak {peak_gib:+.1f} GiB"


def signed(value: float) -> str:
    """Seconds with a sign."""
    return f"{'+' if value >= 0 else '-'}{seconds(abs(value))}"
