"""What a table of runs does not say about well-known models: latent attention, shared experts, dense layers, windows.

Facts of the public model configurations, found by the model's name; everything a table does say comes from the table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """A family of models, recognised by name."""

    pattern: str
    attention: dict[str, Any] = field(default_factory=dict)
    shared_experts: float = 0.0
    """Shared experts, in expert widths."""
    dense_first: int = 0
    """Leading layers with a dense MLP."""
    routed_every: int = 1
    """Every n-th layer is routed, the others are dense."""
    window_every: int = 0
    """Every n-th layer has the sliding window `window`; 0 for none."""
    window: int = 0
    missing: str = ""
    """What the cost model lacks for it."""


_V2 = {"kind": "latent", "q_lora_rank": 1536, "kv_lora_rank": 512, "rope_dim": 64, "head_dim": 192, "v_head_dim": 128}
FAMILIES = (
    # deepseek-ai/DeepSeek-V2 and -V3 config.json
    Family(r"deepseek.?v2.?lite", {**_V2, "q_lora_rank": None}, shared_experts=2, dense_first=1),
    Family(r"deepseek.?v2", _V2, shared_experts=2, dense_first=1),
    Family(r"deepseek.?v3.*trunc", _V2, shared_experts=1, dense_first=1),
    Family(r"deepseek.?(v3|r1)", _V2, shared_experts=1, dense_first=3),
    # moonshotai/Kimi-K2-Base config.json
    Family(r"kimi.?k2", _V2, shared_experts=1, dense_first=1),
    # moonshotai/Moonlight-16B-A3B config.json
    Family(r"moonlight", {**_V2, "q_lora_rank": None}, shared_experts=2, dense_first=1),
    # Qwen/Qwen3-* config.json
    Family(r"qwen3.?next|nemotron.?h|kimi.?linear|mamba", missing="linear-attention or state-space layers"),
    Family(r"qwen3", {"qk_norm": True}),
    # openai/gpt-oss-120b config.json
    Family(r"gpt.?oss", {"qkv_bias": True, "out_bias": True}, window_every=2, window=128),
    # meta-llama/Llama-4-Maverick-17B-128E and -Scout-17B-16E config.json
    Family(r"llama.?4.*maverick", shared_experts=1, routed_every=2),
    Family(r"llama.?4", shared_experts=1),
)


def family_of(model_name: str) -> Family:
    """The family of a model, one without peculiarities when the name is not known."""
    return next((f for f in FAMILIES if re.search(f.pattern, model_name, re.IGNORECASE)), Family(""))
