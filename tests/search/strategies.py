"""Small planning tasks as hypothesis strategies, one for each schedule: they shrink to the least model, cluster and memory."""

from __future__ import annotations

from hypothesis import strategies as st
from machines import gpt, llama, profile, task

from planner.cost.task import Task
from planner.engines.base import Engine
from planner.engines.registry import engine_named
from planner.search.space import Space, declared_space
from planner.specs.layout import SCHEDULES, SPLIT_BACKWARD, V_SHAPED

ENGINES = {
    "none": ("bundled", "megatron", "torchtitan", "deepspeed"),
    "gpipe": ("bundled", "torchtitan"),
    "1f1b": ("bundled", "megatron", "torchtitan", "deepspeed"),
    "interleaved": ("bundled", "megatron", "torchtitan"),
} | dict.fromkeys(SPLIT_BACKWARD, ("bundled", "torchtitan+eager"))
assert set(ENGINES) == set(SCHEDULES)
_MODES = (["none", "selective", "full"], ["none", "full"], ["none", "selective"], ["none"], ["full"], ["selective", "full"])


@st.composite
def instances(draw: st.DrawFn, schedule: str) -> tuple[Task, Engine, Space]:
    """A task whose space under one schedule brute force exhausts in a tenth of a second."""
    pipelined, split = schedule != "none", schedule in SPLIT_BACKWARD
    chunked = split or schedule == "interleaved"
    engine = engine_named(draw(st.sampled_from(ENGINES[schedule])))
    if chunked:  # recomputed as a whole or not at all: brute force has little besides splits
        odd = () if schedule in V_SHAPED else (9,)
        layers = draw(st.sampled_from((8, 12, *odd) if engine.name == "megatron" else (4, 6, 8, 12, 16, *odd)))
    else:
        layers = draw(st.integers(2 if pipelined else 1, 4))
    hidden, heads = draw(st.sampled_from((512, 1024, 2048, 4096))), 8
    if draw(st.booleans()):
        kv_heads = draw(st.sampled_from((2, 8)))
        model = llama(layers, hidden, heads, kv_heads, width=3 * hidden, vocab=draw(st.sampled_from((8192, 131072))))
    else:
        ties = not pipelined or engine.name in ("megatron", "deepspeed")  # the others refuse to with stages apart
        model = gpt(layers, hidden, heads, vocab=8192, tied=ties and draw(st.booleans()))
    # An engine that always shards needs replicas beside the stages; Megatron interleaves over three ranks or more.
    gpus = draw(st.sampled_from((2, 4) if pipelined or min(engine.zero_stages) else (1, 2, 4)))
    gpus *= 2 if pipelined and (min(engine.zero_stages) or (chunked and engine.name == "megatron")) else 1
    # Around what the states need, so that about half of the rows fit.
    memory = (
        2.2
        + 18 * model.total_params / 2**30 / gpus * draw(st.integers(2, 40 if chunked else 20)) / 8
        + draw(st.integers(0, 16)) / 16
    )
    machine = profile(
        memory=f"{memory:.3f} GiB", node_size=draw(st.sampled_from((2, 4))), nic=draw(st.sampled_from(("5 GB/s", "50 GB/s")))
    )
    # Interleaving takes pp micro-batches at a time, DualPipeV two a stage at least.
    batch = draw(st.sampled_from((16, 24, 48) if split else (8, 16, 24) if chunked else (4, 8, 12)))
    t = task(model, gpus, draw(st.sampled_from((512, 2048))), batch, engine.name, machine)
    modes = [m for m in _MODES if "none" in m or not split]
    zero = [z for z in engine.zero_stages if z < 3 or not split]
    pins: dict[str, list[object]] = {
        "schedule": [schedule], "micro_batch": [draw(st.sampled_from((1, 2)))], "recompute": draw(st.sampled_from(modes)),
        "zero": sorted(draw(st.sets(st.sampled_from(zero), min_size=1))) if gpus > 2 else [min(zero)],
    }  # fmt: skip
    return t, engine, declared_space(t, engine, pins, [] if draw(st.booleans()) else ["cp"])
