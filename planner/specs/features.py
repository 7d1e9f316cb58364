"""What a model has beyond a plain decoder, by name: engines say which of these they build."""

from __future__ import annotations

from collections.abc import Callable

from planner.specs.layers import LayerGroup
from planner.specs.model import Model

_OF_GROUP: dict[str, Callable[[LayerGroup], object]] = {
    "routed experts": lambda g: g.mlp.routed,
    "latent attention": lambda g: g.attention.kind == "latent",
    "linear attention": lambda g: g.attention.kind == "linear",
    "sliding-window or chunked attention": lambda g: g.attention.sliding_window or g.attention.chunk,
    "attention sinks": lambda g: g.attention.sinks,
    "soft-capped scores": lambda g: g.attention.softcap,
    "partial or no rotary positions": lambda g: g.front is None and g.attention.rope_share < 1,
    "norms over the whole query": lambda g: g.attention.qk_norm == "width",
    "norms after the sublayers": lambda g: g.norms in ("post", "both"),
    "parallel attention and MLP": lambda g: g.parallel,
    "an encoder in front": lambda g: g.front is not None,
    "an uncommon activation": lambda g: g.mlp.activation not in (None, "silu" if g.mlp.kind == "gated" else "gelu"),
}
_OF_MODEL: dict[str, Callable[[Model], object]] = {
    "several kinds of layers": lambda m: not m.homogeneous,
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
