"""Mixtures of experts among the plans whose peak is metered: tokens spread over experts as the router's first values say."""

from __future__ import annotations

from typing import Any

import plans

from planner.planfile import Plan
from planner.specs.layers import Attention, LayerGroup, Mlp
from planner.specs.model import Model

SIZES: dict[str, Any] = {"seq_len": 128, "global_batch": 8}
GROUPED = Attention(heads=4, kv_heads=2)
LATENT = Attention(kind="latent", heads=4, head_dim=48, rope_dim=16, kv_lora_rank=64, q_lora_rank=96)
DENSE, ROUTED = Mlp(kind="gated", width=352), Mlp(kind="gated", width=176, experts=8, top_k=2, shared_width=176)


def _model(name: str, attention: Attention, *mlps: tuple[int, Mlp]) -> Model:
    groups = [LayerGroup(count=n, attention=attention, mlp=mlp) for n, mlp in mlps]
    return Model(name=name, hidden=128, vocab=1024, layers=groups)


MOE = _model("moe", GROUPED, (4, ROUTED))
MIXED = _model("mixed", LATENT, (1, DENSE), (3, ROUTED))


def _cases() -> dict[int, dict[str, Plan]]:
    found: dict[int, dict[str, Plan]] = {1: {}, 2: {}, 4: {}}

    def add(processes: int, name: str, model: Model = MOE, **options: Any) -> None:
        found[processes][name] = plans.plan(model, **SIZES, **options)

    add(1, "moe-one", precision="bf16", micro_batch=2)
    add(1, "mla-one", MIXED, precision="bf16", recompute="selective", micro_batch=2)
    for zero in (1, 2, 3):
        mode = "full" if zero in (1, 3) else "none"
        add(2, f"moe-ep2-zero{zero}", precision="bf16", recompute=mode, dp=2, ep=2, zero=zero, micro_batch=2)
    add(2, "mla-tp2-ep2", MIXED, precision="bf16", tp=2, ep=2, micro_batch=2)
    add(2, "moe-tp2-etp2", precision="bf16", tp=2, etp=2, micro_batch=2)
    add(4, "moe-dp4-ep2-zero3", precision="bf16", dp=4, ep=2, zero=3, micro_batch=1)
    add(4, "moe-dp4-ep2-zero2", precision="bf16", dp=4, ep=2, zero=2, micro_batch=2)
    add(4, "moe-pp2-ep2-zero2", precision="bf16", pp=2, dp=2, ep=2, zero=2, recompute="full")
    add(4, "mla-tp2-dp2-ep2-zero3", MIXED, precision="bf16", tp=2, dp=2, ep=2, zero=3, micro_batch=2)
    return found


CASES = _cases()
