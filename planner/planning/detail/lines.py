"""Lines of the step time as they are found, and the formulas that they name."""

from __future__ import annotations

from dataclasses import dataclass, field

from planner.planning.detail.case import Case
from planner.planning.detail.source import growth_figures
from planner.planning.detail.tables import Inputs, Term

GEMM = "tiles and waves under a memory roofline (planner.cost.compute.gemm_seconds)"
STREAM = "bytes over reached memory bandwidth (planner.cost.compute.streaming_seconds)"
STREAMED = ("device.memory_efficiency", "device.memory_bandwidth")
"""The figures behind `STREAM`."""
_RING = "ring with measured efficiency (planner.cost.collectives.collective_seconds)"
_SPLIT = (
    "{}: ((v m - 1) max R + sum R - credit) / v, at least m max R, less the slowest rank's own m R; the credit is what other "
    "ranks add less than R (planner.cost.schedules.bubble, planner.cost.step.pipeline_time)"
)
FORMULAS = {
    "fused": "2 b q k h d FLOPs at the kernel's share of the peak, backward 2.5 times as many (Dao 2023; "
    "planner.cost.compute.fused_attention_seconds)",
    "unfused": "batched products and passes over the scores (planner.cost.compute.unfused_attention_seconds)",
    "host": "what launching takes beyond the device's time (planner.cost.operators.bound_by_host)",
    "recompute": "the engine's share of each operator of forward (planner.cost.operators.layer_seconds)",
    "tp_comm": _RING + "; exposed: 1 - overlap",
    "ep_comm": _RING + "; exposed: 1 - overlap",
    "cp_comm": _RING
    + "; a ring exposed beside attention (planner.cost.compute.overlapped; Liu 2023), all-to-all whole (Jacobs 2023)",
    "zero_comm": _RING + "; exposed beside a layer's compute (planner.cost.compute.overlapped)",
    "dp_comm": _RING + "; exposed: max(traffic - hidden, floor) (planner.cost.step.stage_once)",
    "pp_comm": "latency and bytes over bandwidth of the outermost tier (planner.cost.collectives.neighbour_seconds)",
    "gpipe": "GPipe: (m - 1) max R + sum R, less the slowest rank's own m R (planner.cost.step.combine)",
    "1f1b": "1F1B: (v m - 1) max R + sum R, less the slowest rank's own v m R (Narayanan 2021, 2.2; planner.cost.step.combine)",
    "interleaved": "interleaved: ((v m - 1) max R + sum R) / v, less the slowest rank's own m R (Narayanan 2021, 2.2; "
    "planner.cost.step.combine)",
    "interleaved-zb": _SPLIT.format("interleaved zero bubble: F + I - W (arXiv 2401.10241, table 1)"),
    "zbv": _SPLIT.format("ZB-V: max(2 (F - W), 2 (I - W), F, I, W)"),
    "dualpipev": _SPLIT.format("DualPipeV, its pairs one after the other: max(F + I - W, 2 I - W, F, I)"),
    "split": "two passes over the layer, each at least as long as the host launches it (planner.cost.traffic.split_compute)",
    "fixed": "fixed host time of a step (engine's accounting)",
    "rounding": "whole nanoseconds, rounded up (planner.cost.step)",
}


@dataclass
class Lines:
    """Terms as they are found."""

    c: Case
    found: list[Term] = field(default_factory=list)

    def add(
        self, part: str, name: str, seconds: float, times: float, formula: str, inputs: Inputs, figures: tuple[str, ...],
        bound: str = "",
    ) -> None:  # fmt: skip
        """One line; `seconds` without the growth of the cluster."""
        seconds *= self.c.task.growth
        names = figures + tuple(n for n in growth_figures(self.c.task) if n not in figures)
        self.put(part, name, seconds, times, formula, inputs, names, bound)

    def put(
        self, part: str, name: str, seconds: float, times: float, formula: str, inputs: Inputs, figures: tuple[str, ...],
        bound: str = "",
    ) -> None:  # fmt: skip
        """One line of final seconds."""
        total = seconds * times
        provenance, least = self.c.book.least(figures)
        share = total / self.c.plan.estimate.step_time_s
        self.found.append(Term(part, name, seconds, times, total, share, formula, inputs, bound, provenance, least, figures))
