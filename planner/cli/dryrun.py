"""`planner run --dry-run`: what the job would allocate and send, without devices."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from planner.cli import common
from planner.errors import input_error

if TYPE_CHECKING:
    from planner.planfile import Plan

PANEL = "Dry run"
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", rich_help_panel=PANEL, help="Start nothing: step the job as ranks of a fake group, count bytes."),
]
Rank = Annotated[
    str,
    typer.Option("--rank", rich_help_panel=PANEL, help="A rank, peak (of the predicted peak), or all (one of each stage)."),
]
ExactSteps = Annotated[
    bool, typer.Option("--exact-steps", rich_help_panel=PANEL, help="Step through every micro-batch, however many.")
]


def dry_run(plan: Plan, rank: str, exact: bool, output_format: str) -> None:
    """Step ranks of a plan on fake tensors and print what they hold and send."""
    _can_be_stepped(plan)
    from planner.report.dryrun import print_dry_run
    from planner.report.terminal import console
    from planner.runtime import dryrun

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # fake tensors compute nothing; every child would start threads
    try:
        ranks = dryrun.ranks_of(plan, rank)
    except ValueError:
        why = f"the plan has ranks 0 to {plan.layout.world_size - 1}"
        raise input_error("PLN630", f"--rank {rank} is not a rank of the plan", why, "give a rank, peak, or all") from None
    found = dryrun.to_json(plan, dryrun.dry_run(plan, ranks, exact))
    if output_format == "json":
        common.write_result(common.to_json(found))
    else:
        print_dry_run(found, console())


def _can_be_stepped(plan: Plan) -> None:
    """Raises MissingPartError without torch, InputError for what fake tensors cannot show."""
    common.needs_torch()
    reasons = {
        "compiled blocks": "compile" in plan.engine.split("+"),
        "an offloaded optimizer": plan.layout.offload != "none",
        "fp8 products": plan.job.linears != "same",
    }
    for what, there in reasons.items():
        if there:
            why = "a dry run follows tensors of the device through eager operations, and would count others"
            raise input_error("PLN631", f"--dry-run of a plan with {what}", why, "leave it out, or run the plan")
