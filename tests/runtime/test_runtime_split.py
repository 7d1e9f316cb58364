"""Why the engine refuses recompute and ZeRO 3 where torch splits the backward: what torch does there, run all the same.

A test of a refused plan that fails says that torch has changed: look at its rule again.
"""

from __future__ import annotations

from typing import Any

import cases
import numpy as np
import plans
import pytest
import torch
import worker
import worlds
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from planner.cost import memory
from planner.cost.task import LayoutArray, Task
from planner.engines.bundled import ACCOUNTING, BUNDLED
from planner.engines.registry import engine_named
from planner.planfile import refusals
from planner.runtime.meter import Meter
from planner.runtime.model import Block, Decoder, initialise

TOKENS = 256
REFUSALS = {"selective": "PLN584", "full": "PLN584", "zero3": "PLN583"}


def middle(recompute: str) -> Decoder:
    """Two layers of the middle of a model."""
    model, cpu = plans.llama(layers=2, hidden=64, width=96, qk_norm=False), torch.device("cpu")
    with torch.device("meta"):
        part = Decoder(model, range(2), first=False, last=False)
    part.to_empty(device=cpu)
    part.tie()
    initialise(part, np.arange(TOKENS), 0, cpu, torch.float32)
    for block in part.blocks():
        block.recompute = recompute
    return part


def halves(part: Decoder, meter: Meter | None = None) -> tuple[int, int]:
    """One micro-batch forward and in two halves backward: (bytes after forward, bytes between the halves)."""
    x = torch.randn(1, TOKENS, 64, requires_grad=True)
    out = part(x)
    forward, grad = (meter.current if meter else 0), torch.randn_like(out)
    before = meter.current if meter else 0
    _, groups = stage_backward_input([out], [grad], [x], part.parameters())
    between = meter.current if meter else 0
    stage_backward_weight(part.parameters(), groups)
    return forward, between - (before - forward)


def test_full_recompute_repeats_for_every_matrix_and_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    layer = Block._layer
    monkeypatch.setattr(Block, "_layer", lambda self, x: ran.append(1) or layer(self, x))
    part = middle("full")
    halves(part)
    names = {n.split(".", 2)[2] for n, _ in part.named_parameters()}
    assert len(names) == 9
    assert len(ran) == 2 * (1 + 1 + len(names)), "forward, once for inputs, once for each weight"


def test_selective_recompute_raises() -> None:
    with pytest.raises(RuntimeError, match="only allowed to backward once"):
        halves(middle("selective"))


def test_output_gradients_that_wait_are_the_accounting_s() -> None:
    """Between the halves everything saved stays, and the gradient of each matrix's and norm's output comes on top."""
    halves(middle("none"))  # gradients of parameters exist from now on
    part = middle("none")
    halves(part)
    with Meter() as meter:
        forward, between = halves(part, meter)
    made = plans.plan(part.model, micro_batch=1, global_batch=1, seq_len=TOKENS)
    task = Task(made.model, made.job, made.hardware, 1, ACCOUNTING)
    each = int(memory.activation_bytes(task, LayoutArray.of([made.layout], made.job)).deferred[0])
    # beside them: the gradients of the part's input, which the next stage waits for, and of its output
    boundary = TOKENS * 64 * 4
    assert between - forward - 2 * each in range(0, 2 * boundary + 1, boundary)


@pytest.mark.parametrize(("processes", "name"), [(n, name) for n, group in cases.REFUSED.items() for name in group])
def test_the_engine_refuses(processes: int, name: str) -> None:
    plan = cases.build(processes, name)
    assert engine_named(plan.engine).name == BUNDLED.name
    assert REFUSALS[name.rsplit("-", 1)[1]] in {p.code for p in refusals(plan)}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_zero_3_still_computes_wrong_gradients(jobs: Any) -> None:
    """Each schedule leaves parameters without gradient, or gradients whose norm is wrong by far more than rounding."""
    jobs.reference("deep")
    results = worlds.run(4, worker.compare_all, 4, list(cases.REFUSED[4]), jobs.directory)
    for name in cases.REFUSED[4]:
        for rank in results[name]:
            assert "error" in rank or rank["missing"] or rank["norm"] > 1e-3, name
