"""Ring attention: which tokens a rank holds, that their order matters, when the planner takes it, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import plans
import pytest
import worker
import worlds
from machines import llama, profile
from torch.distributed.tensor import experimental

from planner.engines.problems import layout_problems
from planner.engines.registry import engine_named
from planner.errors import InputError
from planner.planning.make import make_plan
from planner.planning.request import Request, prepare
from planner.runtime import context, ring
from planner.specs.job import Job


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("around", [False, True])
def test_each_token_is_held_once_and_a_ring_is_balanced(size: int, around: bool) -> None:
    length = 12 * size
    held = [[p for piece in context.pieces(length, size, rank, around) for p in piece] for rank in range(size)]
    assert sorted(p for positions in held for p in positions) == list(range(length))
    keys = {sum(p + 1 for p in positions) for positions in held}  # a query reads all keys up to its own
    assert (len(keys) == 1) == around


def _in_order(name: str, folder: Path) -> dict[str, Any]:
    """A case whose ranks hold neighbouring tokens, as without a ring."""
    own, context.pieces = context.pieces, lambda length, size, rank, _: own(length, size, rank, False)  # type: ignore[assignment]
    return worker.compare(2, name, folder)


@pytest.mark.timeout(300)
def test_the_order_of_tokens_matters(jobs: Any) -> None:
    """The comparison that the ring passes fails where tokens are held in another order than the ring takes them to be."""
    name = "cp2-ring-zero3-learned"
    folder = jobs.reference(cases.case(2, name)[0]).parent
    assert worlds.run(2, _in_order, name, folder, timeout_s=200)["gradient"] > 1e-2
    assert all(rank["gradient"] < 1e-5 for rank in jobs.get(2, name))


def _request(**pins: Any) -> Request:
    model = llama(4, kv_heads=2)
    return Request(model, profile(), Job(seq_len=8192, global_batch=8), gpus=8, pins={"tp": [1], "pp": [1], **pins}, forbid=[])


def test_the_planner_takes_a_ring_where_heads_do_not_suffice() -> None:
    assert make_plan(_request(cp=[4])).layout.context == "ring"


def test_the_faster_of_both_is_taken() -> None:
    both = [make_plan(_request(cp=[2], context=[name])) for name in ("default", "ring")]
    times = [p.estimate.step_time_s for p in both]
    free = make_plan(_request(cp=[2]))
    assert free.estimate.step_time_s == min(times)
    assert free.layout.context == both[times.index(min(times))].layout.context


def test_windows_are_refused() -> None:
    for model, expected in ((plans.gemma(), {"PLN567"}), (plans.gemma(window=16), set())):
        plan = plans.plan(model, cp=2, context="ring")
        request = Request(model, profile(), plan.job, gpus=2, pins={}, forbid=[])
        assert {p.code for p in layout_problems(prepare(request).task, engine_named("bundled"), plan.layout)} == expected


def test_a_torch_without_the_template_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ring.template()
    monkeypatch.delattr(module, "_templated_ring_attention")
    with pytest.raises(InputError, match="_templated_ring_attention") as error:
        ring.template()
    assert error.value.problems[0].code == "PLN571"
    assert "ring attention" in error.value.problems[0].why
    assert experimental.__name__ in error.value.problems[0].what


def test_blocks_are_sent_one_after_another() -> None:
    """Not gathered at once, which would keep the keys and values of the whole sequence."""
    module = ring.template()
    assert module._cp_options.rotate_method is module._RotateMethod.ALL_TO_ALL
