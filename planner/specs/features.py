"""What a model has beyond a plain decoder, by name: engines say which of these they build."""

from __future__ import annotations

from collections.abc import Callable

from planner.specs.layers import LayerGroup
from planner.specs.model import Model

_USUAL = {"gated": (None, "silu"), "gelu": (None, "gelu", "gelu_tanh")}


def _unturned(g: LayerGroup) -> bool:
    """Whether rotary positions leave part of the heads as they are, or all of them."""
    return g.front is None and g.attention.kind == "softmax" and g.attention.rope_share < 1


_OF_GROUP: dict[str, Callable[[LayerGroup], object]] = {
    "routed experts": lambda g: g.mlp.routed,
    "latent attention": lambda g: g.attention.kind == "latent",
    "linear attention": lambda g: g.attention.kind == "linear",
    "sliding-window or chunked attention": lambda g: g.attention.sliding_window or g.attention.chunk,
    "attention sinks": lambda g: g.attention.sinks,
    "soft-capped scores": lambda g: g.attention.softcap,
    "gated or normed heads": lambda g: g.attention.kind == "softmax" and (g.attention.output_gate or g.attention.output_norm),
    "attention to later tokens": lambda g: g.front is None and not g.attention.causal,
    "norms over the whole query": lambda g: g.attention.qk_norm == "width",
    "norms after the sublayers": lambda g: g.norms in ("post", "both"),
    "parallel attention and MLP": lambda g: g.parallel,
    "an encoder in front": lambda g: g.front is not None,
    "an uncommon activation": lambda g: g.mlp.activation not in _USUAL[g.mlp.kind],
}
_OF_MODEL: dict[str, Callable[[Model], object]] = {
    "several kinds of layers": lambda m: not m.homogeneous,
    "partial rotary positions": lambda m: m.positions == "rotary" and any(_unturned(g) for g, _ in m.kinds),
    "ALiBi": lambda m: m.positions == "alibi",
    "a bias on the head": lambda m: m.head_bias,
    "norms without weights": lambda m: not m.norm_weight,
    "multi-token prediction": lambda m: m.mtp,
}


def features(model: Model) -> tuple[str, ...]:
    """Names of what the model has beyond norm, rotary or learned positions, softmax attention and one MLP a layer."""
    groups = [g for g, _ in model.kinds]
    found = [name for name, has in _OF_GROUP.items() if any(has(g) for g in groups)]
    return (*found, *(name for name, has in _OF_MODEL.items() if has(model)))
