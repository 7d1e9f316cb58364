"""Stages of a pipeline in one line."""

from __future__ import annotations

from planner.specs.layout import Stage


def stages_text(stages: list[Stage]) -> str:
    """Stages in one line, runs of equal ones folded: "2 x 9 (selective:4), 10 (none)"."""
    runs: list[tuple[int, Stage]] = []
    for stage in stages:
        if runs and runs[-1][1] == stage:
            runs[-1] = (runs[-1][0] + 1, stage)
        else:
            runs.append((1, stage))
    return ", ".join(f"{f'{k} x ' if k > 1 else ''}{s.layers} ({s.recompute})" for k, s in runs)
