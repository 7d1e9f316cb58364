"""Random small planning tasks: loose and tight memory, both engines, tied and untied, pinned and not."""

from __future__ import annotations

import random
from dataclasses import replace

from machines import gpt, llama, mixed, mixture, profile, task

from planner.cost.task import Task
from planner.engines.base import Engine
from planner.engines.registry import engine_named
from planner.search.space import Space, declared_space
from planner.specs.adapter import Adapter
from planner.specs.hardware import HardwareProfile
from planner.specs.model import Model


def scarce(rng: random.Random, model: Model, gpus: int) -> float:
    """GiB of a device around what the states need."""
    return 2.2 + 18 * model.total_params / 2**30 / gpus * rng.uniform(0.4, 3.0) + rng.choice((0.05, 0.5, 4.0))


def cluster(rng: random.Random, memory: float) -> HardwareProfile:
    return profile(memory=f"{memory:.3f} GiB", node_size=rng.choice((2, 4, 8)), nic=rng.choice(("5 GB/s", "50 GB/s")))


def some_pins(rng: random.Random) -> dict[str, list[object]]:
    pins: dict[str, list[object]] = {"micro_batch": [1, 2]}
    if rng.random() < 0.2:
        pins["recompute"] = rng.choice((["none"], ["full"], ["selective", "full"], ["none", "full"]))
    return pins


def instance(seed: int) -> tuple[Task, Engine, Space]:
    """A task whose spaces brute force can exhaust in about a second."""
    rng = random.Random(seed)
    layers, hidden = rng.randint(2, 5), rng.choice((512, 1024, 2048, 4096))
    vocab = rng.choice((8192, 32000, 131072))
    if rng.random() < 0.5:
        model = llama(layers, hidden, heads=8, kv_heads=rng.choice((2, 4, 8)), width=rng.choice((2, 3)) * hidden, vocab=vocab)
    else:
        model = gpt(layers, hidden, heads=8, vocab=vocab, tied=rng.random() < 0.5)
    gpus = rng.choice((1, 2, 4, 8))
    seq_len = rng.choice((512, 1024, 2048))
    memory = scarce(rng, model, gpus)
    engine = engine_named(rng.choice(("bundled", "megatron")))
    machine = cluster(rng, memory)
    precision = rng.choice(("bf16", "bf16", "fp32"))
    t = task(model, gpus, seq_len, rng.choice((4, 8, 12)), engine.name, machine, precision)
    pins = some_pins(rng)
    space = declared_space(t, engine, pins, ["cp"] if rng.random() < 0.5 else [])
    return t, engine, space


def mixed_instance(seed: int) -> tuple[Task, Engine, Space]:
    """The same over sequences of several kinds: dense then routed, alternating windows, an encoder in front."""
    rng = random.Random(seed)
    layers, hidden = rng.randint(2, 6), rng.choice((512, 1024))
    model = mixed(rng.choice(("dense first", "alternating", "encoder", "random")), layers, hidden, rng)
    gpus = rng.choice((2, 4, 8))
    memory = scarce(rng, model, gpus)
    engine = engine_named(rng.choice(("megatron", "torchtitan", "megatron+unfused-attention")))
    machine = cluster(rng, memory)
    t = task(model, gpus, rng.choice((512, 1024)), rng.choice((4, 8)), engine.name, machine)
    pins = some_pins(rng)
    return t, engine, declared_space(t, engine, pins, ["cp"])


def mixture_instance(seed: int) -> tuple[Task, Engine, Space]:
    """The same over routed experts: ep in the space, engines that spread experts."""
    rng = random.Random(seed)
    model = mixture(
        rng.randint(2, 4), rng.choice((512, 1024)), rng.choice((4, 8)), rng.choice((1, 2)), rng.choice((512, 2048)),
        rng.choice((0, 1024)),
    )  # fmt: skip
    gpus = rng.choice((2, 4, 8))
    memory = scarce(rng, model, gpus)
    engine = engine_named(rng.choice(("megatron", "torchtitan", "megatron+deep-ep")))
    machine = cluster(rng, memory)
    t = task(model, gpus, rng.choice((512, 1024)), rng.choice((4, 8)), engine.name, machine)
    return t, engine, declared_space(t, engine, {"micro_batch": [1, 2]}, ["cp"])


def adapter_instance(seed: int) -> tuple[Task, Engine, Space]:
    """The same with an adapter: little besides the base fills the memory."""
    rng = random.Random(seed)
    routed = rng.random() < 0.3
    hidden = rng.choice((1024, 2048, 4096))
    if routed:
        model = mixture(rng.randint(2, 4), 1024, 4, 2, 2048, rng.choice((0, 1024)))
    else:
        model = llama(rng.randint(2, 5), hidden, heads=8, kv_heads=rng.choice((2, 8)), width=3 * hidden, vocab=32000)
    engine = engine_named("megatron" if routed else rng.choice(("megatron", "deepspeed")))
    base = rng.choice(("same", "fp8") if engine.name == "megatron" else ("same", "int8", "nf4"))
    targets = rng.choice((["attention"], ["attention", "mlp"], ["attention", "experts"] if routed else ["mlp", "attention"]))
    gpus = rng.choice((1, 2, 4, 8))
    memory = 1.9 + 2 * model.total_params / 2**30 * rng.uniform(0.3, 1.5) + rng.choice((0.05, 0.3, 2.0))
    machine = cluster(rng, memory)
    t = task(model, gpus, rng.choice((512, 1024, 2048)), rng.choice((4, 8, 12)), engine.name, machine)
    adapter = Adapter(rank=rng.choice((8, 64)), targets=targets, base=base, train_embeddings=rng.random() < 0.2)
    t = replace(t, job=t.job.model_copy(update={"adapter": adapter}))
    return t, engine, declared_space(t, engine, {"micro_batch": [1, 2]}, ["cp"])
