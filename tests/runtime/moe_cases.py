"""Mixtures of experts and latent attention among the plans that must compute the gradients of one process.

Choosing experts is not continuous: layouts agree only where rounding moves no token to another expert. In fp32 a tie within
rounding is a matter of 1 in 10^5 among these few hundred choices; in bf16 it is common, so those plans visit all experts.
"""

from __future__ import annotations

from typing import Any

from planner.specs.layers import Attention, LayerGroup, Mlp
from planner.specs.model import Model

GROUPED = Attention(heads=4, kv_heads=2, qk_norm="head")
LATENT = Attention(kind="latent", heads=4, head_dim=24, rope_dim=8, v_head_dim=16, kv_lora_rank=16, q_lora_rank=20)
DIRECT = Attention(kind="latent", heads=4, head_dim=16, rope_dim=4, kv_lora_rank=16, qkv_bias=True)
DENSE = Mlp(kind="gated", width=48)
ROUTED = Mlp(kind="gated", width=24, experts=8, top_k=2)
SHARED = Mlp(kind="gated", width=24, experts=8, top_k=3, shared_width=40, shared_gate=True, router_bias=True)
ALL = Mlp(kind="gated", width=24, experts=4, top_k=4, shared_width=32)


def model(name: str, *layers: tuple[Attention, Mlp], **changes: Any) -> Model:
    """A model of one layer of each pair."""
    groups = [LayerGroup(count=1, attention=a, mlp=m) for a, m in layers]
    return Model(name=name, hidden=32, vocab=64, layers=groups, **changes)


MODELS: dict[str, Model] = {
    "moe": model("tiny-moe", (GROUPED, DENSE), (GROUPED, ROUTED), (GROUPED, ROUTED)),
    "shared": model("tiny-shared", (GROUPED, SHARED), (GROUPED, DENSE), (GROUPED, SHARED), (GROUPED, SHARED)),
    "mla": model("tiny-mla", (LATENT, DENSE), (LATENT, SHARED), (DIRECT, ROUTED)),
    "gelu": model(
        "tiny-gelu", (GROUPED, Mlp(kind="gelu", width=24, experts=6, top_k=2)), (GROUPED, Mlp(kind="gelu", width=40, bias=True))
    ),
    "padded": model("tiny-padded", (GROUPED, Mlp(kind="gated", width=24, experts=4, top_k=2, capacity=2.0))),
    "all": model("tiny-all", (LATENT, DENSE), (GROUPED, ALL)),
}

Case = tuple[str, dict[str, Any]]


def _two() -> dict[str, Case]:
    cases: dict[str, Case] = {f"ep2-zero{zero}": ("moe", {"dp": 2, "ep": 2, "zero": zero}) for zero in range(4)}
    cases["moe-dp2-zero1"] = ("shared", {"dp": 2, "zero": 1})
    cases["ep2-zero1-full"] = ("shared", {"dp": 2, "ep": 2, "zero": 1, "recompute": "full"})
    cases["ep2-gelu"] = ("gelu", {"dp": 2, "ep": 2, "zero": 1, "recompute": "selective"})
    cases["ep2-bf16"] = ("all", {"dp": 2, "ep": 2, "zero": 2, "precision": "bf16"})
    cases["tp2-ep2-shared"] = ("shared", {"tp": 2, "ep": 2})
    cases["tp2-ep2-bf16"] = ("all", {"tp": 2, "ep": 2, "precision": "bf16"})
    cases["moe-dp2-zero3"] = ("moe", {"dp": 2, "zero": 3, "recompute": "selective"})
    cases["ep2-full"] = ("shared", {"dp": 2, "ep": 2, "zero": 2, "recompute": "full"})
    cases["ep2-padded"] = ("padded", {"dp": 2, "ep": 2, "zero": 1})
    cases["ep2-zero3-bf16"] = ("all", {"dp": 2, "ep": 2, "zero": 3, "precision": "bf16", "recompute": "full"})
    cases["ep2-zero1-bf16-selective"] = (
        "all",
        {"dp": 2, "ep": 2, "zero": 1, "precision": "bf16", "recompute": "selective", "micro_batch": 1},
    )
    cases["ep2-zero3-bf16-selective"] = ("all", {"dp": 2, "ep": 2, "zero": 3, "precision": "bf16", "recompute": "selective"})
    cases["moe-tp2"] = ("shared", {"tp": 2})
    cases["tp2-ep2"] = ("moe", {"tp": 2, "ep": 2, "recompute": "full"})
    cases["tp2-etp2"] = ("moe", {"tp": 2, "etp": 2, "recompute": "selective"})
    cases["dp2-etp2"] = ("moe", {"dp": 2, "etp": 2, "zero": 1})
    cases["mla-tp2"] = ("mla", {"tp": 2, "recompute": "full"})
    cases["mla-ep2"] = ("mla", {"dp": 2, "ep": 2, "zero": 3})
    cases["moe-pp2"] = ("moe", {"pp": 2})
    return cases


def _four() -> dict[str, Case]:
    interleaved = {"pp": 2, "schedule": "interleaved", "virtual_stages": 2}
    return {
        "ep4-zero2": ("moe", {"dp": 4, "ep": 4, "zero": 2}),
        "dp4-ep2-uneven-zero3": ("gelu", {"dp": 4, "ep": 2, "zero": 3}),
        "tp2-dp2-ep2-mla-zero3": ("mla", {"tp": 2, "dp": 2, "ep": 2, "zero": 3, "recompute": "full"}),
        "tp2-dp2-ep2-etp2-zero1": ("moe", {"tp": 2, "dp": 2, "ep": 2, "etp": 2, "zero": 1}),
        "pp2-ep2-zero3-interleaved": ("shared", {**interleaved, "dp": 2, "ep": 2, "zero": 3, "recompute": "full"}),
        "pp2-tp2-moe": ("moe", {"pp": 2, "tp": 2}),
        **{f"dp4-ep2-zero{zero}": ("shared", {"dp": 4, "ep": 2, "zero": zero}) for zero in range(4)},
        "tp2-dp2-ep2-zero0": ("shared", {"tp": 2, "dp": 2, "ep": 2}),
        "tp2-dp2-ep4-zero1": ("moe", {"tp": 2, "dp": 2, "ep": 4, "zero": 1}),
        "tp2-dp2-etp2-zero2": ("shared", {"tp": 2, "dp": 2, "etp": 2, "zero": 2}),
        "tp2-dp2-moe-zero3": ("moe", {"tp": 2, "dp": 2, "zero": 3}),
        "pp2-ep2-zero0": ("shared", {"pp": 2, "dp": 2, "ep": 2, "recompute": "full"}),
        "pp2-ep2-zero1": ("shared", {"pp": 2, "dp": 2, "ep": 2, "zero": 1}),
        "pp2-ep2-zero2": ("moe", {"pp": 2, "dp": 2, "ep": 2, "zero": 2, "layers": [2, 1]}),
        "pp2-dp2-moe-zero3": ("shared", {"pp": 2, "dp": 2, "zero": 3}),
        "pp2-tp2-ep2": ("shared", {"pp": 2, "tp": 2, "ep": 2, "recompute": "selective"}),
        "tp2-dp2-ep2-zero2-bf16": ("all", {"tp": 2, "dp": 2, "ep": 2, "zero": 2, "precision": "bf16"}),
    }


def _eight() -> dict[str, Case]:
    layout = {"tp": 2, "pp": 2, "dp": 2, "ep": 4, "zero": 3, "recompute": "full"}
    return {"tp2-pp2-dp2-ep4-zero3": ("shared", layout)}


CASES: dict[int, dict[str, Case]] = {2: _two(), 4: _four(), 8: _eight()}
