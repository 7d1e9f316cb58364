"""Small planning tasks as hypothesis strategies, one for each schedule: they shrink to the least model, cluster and memory."""

from __future__ import annotations

from hypothesis import strategies as st
from machines import gpt, llama, profile, task

from planner.cost.task import Task
from planner.engines.base import Engine
from planner.engines.registry import engine_named
from planner.search.space import Space, declared_space

SCHEDULES = ("none", "gpipe", "1f1b", "interleaved")
ENGINES = {
    "none": ("bundled", "megatron", "torchtitan", "deepspeed"),
    "gpipe": ("bundled", "torchtitan"),
    "1f1b": ("bundled", "megatron", "torchtitan", "deepspeed"),
    "interleaved": ("bundled", "megatron", "torchtitan"),
}
_MODES = (["none", "selective", "full"], ["none", "full"], ["none", "selective"], ["none"], ["full"], ["selective", "full"])


@st.composite
def instances(draw: st.DrawFn, schedule: str) -> tuple[Task, Engine, Space]:
    """A task whose space under one schedule brute force exhausts in a tenth of a second."""
    pipelined, chunked = schedule != "none", schedule == "interleaved"
    layers = 2 * draw(st.integers(2, 4)) if chunked else draw(st.integers(2 if pipelined else 1, 4))
    hidden, heads = draw(st.sampled_from((512, 1024, 2048, 4096))), 8
    if draw(st.booleans()):
        kv_heads = draw(st.sampled_from((2, 8)))
        model = llama(layers, hidden, heads, kv_heads, width=3 * hidden, vocab=draw(st.sampled_from((8192, 131072))))
    else:
        model = gpt(layers, hidden, heads, vocab=8192, tied=draw(st.booleans()))
    gpus = draw(st.sampled_from((2, 4) if pipelined else (1, 2, 4)))
    # Around what the states need, so that about half of the rows fit.
    memory = (
        2.2
        + 18 * model.total_params / 2**30 / gpus * draw(st.integers(2, 40 if chunked else 20)) / 8
        + draw(st.integers(0, 16)) / 16
    )
    engine = engine_named(draw(st.sampled_from(ENGINES[schedule])))
    machine = profile(
        memory=f"{memory:.3f} GiB", node_size=draw(st.sampled_from((2, 4))), nic=draw(st.sampled_from(("5 GB/s", "50 GB/s")))
    )
    t = task(model, gpus, draw(st.sampled_from((512, 2048))), draw(st.sampled_from((4, 8, 12))), engine.name, machine)
    pins: dict[str, list[object]] = {
        "schedule": [schedule], "micro_batch": [draw(st.sampled_from((1, 2)))], "recompute": draw(st.sampled_from(_MODES)),
        "zero": [draw(st.sampled_from(engine.zero_stages))],
    }  # fmt: skip
    return t, engine, declared_space(t, engine, pins, [] if draw(st.booleans()) else ["cp"])
