"""Receive buffers in symmetric memory: on the GPUs of one node the ends of a pipeline have as many as the ranks between."""

from __future__ import annotations

import pytest

from planner.planning.make import make_estimate
from planner.planning.request import Request
from planner.specs.job import Job
from planner.specs.layout import Layout, even_stages
from planner.units import GIB

BATCH = 32
MESSAGE_GIB = 2 * 4096 * 4096 / GIB
"""bf16 of one sequence of 4,096 tokens in a model 4,096 wide."""


def receive_gib(pp: int, gpus: int) -> list[float]:
    """GiB of the first and the last rank's receive buffers for `BATCH` micro-batches: what as many more cost them."""
    layout = Layout(pp=pp, dp=gpus // pp, zero=0, micro_batch=1, schedule="1f1b", stages=even_stages(32, pp))
    found = []
    for batch in (BATCH, 2 * BATCH):
        job = Job(seq_len=4096, global_batch=batch * gpus // pp)
        estimate = make_estimate(Request("llama3-8b", "h200-sxm", job, gpus=gpus), layout).estimate
        found.append([stage.buffers for stage in estimate.memory.stages])
    return [found[1][rank] - found[0][rank] for rank in (0, -1)]


@pytest.mark.parametrize(
    ("pp", "gpus", "buffers"), [(4, 8, 2), (2, 8, 1), (4, 16, 1), (8, 8, 2)], ids=["node", "two ranks", "two nodes", "deep"]
)
def test_ends_have_the_buffers_of_the_others(pp: int, gpus: int, buffers: int) -> None:
    assert receive_gib(pp, gpus) == pytest.approx([buffers * BATCH * MESSAGE_GIB] * 2, rel=1e-6)
