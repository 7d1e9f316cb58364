"""Synthetic models, machines and tasks for tests: small numbers, no shipped files."""

from __future__ import annotations

import random
from typing import Any

from planner.cost.task import Task
from planner.engines.registry import engine_named
from planner.specs.hardware import HardwareProfile
from planner.specs.job import Job
from planner.specs.model import Model


def figure(value: Any) -> dict[str, Any]:
    return {"value": value, "provenance": "assumed", "source": "test"}


def tier(name: str, bandwidth: str, latency: str, curve: Any, **more: Any) -> dict[str, Any]:
    return {"name": name, "bandwidth": figure(bandwidth), "latency": figure(latency), "efficiency": curve, **more}


def profile_data(memory: str = "79 GiB", node_size: int = 8, nic: str = "50 GB/s", **device: Any) -> dict[str, Any]:
    """A profile like an eight-device node with fast links inside and NICs outside."""
    curve = {"points": [[65536.0, 0.2], [1048576.0, 0.5], [67108864.0, 0.9]], "provenance": "assumed", "source": "test"}
    data: dict[str, Any] = {
        "name": "test-machine",
        "device": {
            "name": "Test device",
            "kind": "cuda",
            "compute_units": 132,
            "peak": {"bf16": figure("989 TFLOP/s"), "fp32": figure("60 TFLOP/s")},
            "memory": figure(memory),
            "memory_bandwidth": figure("3.35 TB/s"),
            "memory_efficiency": figure(0.8),
            "context": figure("0.6 GiB"),
            "communicator": figure("0.35 GiB"),
            "workspace": figure("32 MiB"),
            "launch": figure("5 us"),
            "gemm": {
                "latency": "2.2 us", "large": 0.7, "medium": 0.79, "small": 0.6, "tile_overhead": "0.8 us",
                "memory_efficiency": 0.6, "wave_rounding": 0.8, "provenance": "assumed", "source": "test",
            },
            "attention": {"forward": 0.55, "backward": 0.42, "provenance": "assumed", "source": "test"},
            "sustained": figure(1.2),
            "host_link": figure("50 GB/s"),
        },
        "node_size": node_size,
        "network": [
            tier("nvlink", "450 GB/s", "2 us", curve, size=node_size),
            tier("nics", nic, "15 us", curve),
        ],
        "overlap_slowdown": figure(1.1),
    }  # fmt: skip
    data["device"] |= device
    return data


def profile(**changes: Any) -> HardwareProfile:
    return HardwareProfile.model_validate(profile_data(**changes))


def llama(
    layers: int = 8, hidden: int = 1024, heads: int = 16, kv_heads: int = 8, width: int = 2816, vocab: int = 32000
) -> Model:
    group = {
        "count": layers,
        "attention": {"heads": heads, "kv_heads": kv_heads},
        "mlp": {"kind": "gated", "width": width},
    }
    return Model.model_validate({"name": "test-llama", "hidden": hidden, "vocab": vocab, "layers": [group]})


def llama_70b() -> Model:
    return llama(80, 8192, 64, 8, 28672, 128256)


def gpt(layers: int = 8, hidden: int = 1024, heads: int = 16, vocab: int = 51200, tied: bool = False) -> Model:
    group = {
        "count": layers,
        "attention": {"heads": heads, "qkv_bias": True, "out_bias": True},
        "mlp": {"kind": "gelu", "width": 4 * hidden, "bias": True},
    }
    return Model.model_validate(
        {
            "name": "test-gpt", "hidden": hidden, "vocab": vocab, "norm": "layernorm", "positions": "learned",
            "max_positions": 2048, "tied_embeddings": tied, "layers": [group],
        }
    )  # fmt: skip


def mixture(
    layers: int = 4, hidden: int = 1024, experts: int = 8, top_k: int = 2, width: int = 1024, shared: int = 0, **model: Any
) -> Model:
    group = {
        "count": layers,
        "attention": {"heads": 16, "kv_heads": 4},
        "mlp": {"kind": "gated", "width": width, "experts": experts, "top_k": top_k, "shared_width": shared},
    }
    return Model.model_validate({"name": "test-moe", "hidden": hidden, "vocab": 32000, "layers": [group]} | model)


def mixed(kind: str, layers: int, hidden: int, rng: random.Random) -> Model:
    """Sequences of several kinds of layers: "dense first", "alternating", "encoder" in front, or "random"."""
    plain = {"attention": {"heads": 16, "kv_heads": 4}, "mlp": {"kind": "gated", "width": 4 * hidden}}
    expert = {"kind": "gated", "width": hidden, "experts": 4, "top_k": 2, "shared_width": rng.choice((0, hidden))}
    routed = plain | {"mlp": expert}
    local = plain | {"attention": {"heads": 16, "kv_heads": 4, "sliding_window": 128}}
    if kind == "dense first":
        groups = [plain | {"count": 1}, routed | {"count": layers}]
    elif kind == "alternating":
        groups = [(local if i % 3 else plain) | {"count": 1} for i in range(layers)]
    elif kind == "encoder":
        front = {"hidden": 512, "tokens": rng.choice((256, 2048)), "patch": 588, "merge": 4, "projector": [hidden]}
        vision = {"heads": 8, "causal": False, "chunk": 256}
        encoder = {"attention": vision, "mlp": {"kind": "gelu", "width": 2048}, "front": front, "count": rng.randint(1, 3)}
        groups = [encoder, plain | {"count": layers}]
    else:
        groups = [rng.choice((plain, routed, local)) | {"count": 1} for _ in range(layers)]
    data = {"name": "test-mixed", "hidden": hidden, "vocab": 32000, "layers": groups, "mtp": int(rng.random() < 0.2)}
    return Model.model_validate(data)


def task(
    model: Model | None = None,
    gpus: int = 8,
    seq_len: int = 2048,
    global_batch: int = 32,
    engine: str = "bundled",
    hardware: HardwareProfile | None = None,
    precision: str = "bf16",
    fraction: float = 0.92,
) -> Task:
    job = Job.model_validate({"seq_len": seq_len, "global_batch": global_batch, "precision": precision})
    accounting = engine_named(engine).accounting
    return Task(model or llama(), job, hardware or profile(), gpus, accounting, fraction)
