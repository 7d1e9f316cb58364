"""Hugging Face `config.json` to our model spec, without transformers.

One table says which field of which family means what. A family that is not in it is refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from planner.errors import Location, input_error

Config = dict[str, Any]


def is_config(data: Any) -> bool:
    """Whether parsed data looks like a Hugging Face configuration."""
    return isinstance(data, dict) and ("model_type" in data or "architectures" in data)


def to_model_data(config: Config, name: str, place: Location, as_type: str | None = None) -> dict[str, Any]:
    """Our model data from a configuration. `as_type` treats an unknown family as a known one.

    Raises InputError for an unknown family, for missing fields, and for features that the spec cannot express.
    """
    family = as_type or config.get("model_type")
    if family is None:
        raise input_error(
            "PLN111", "model_type is missing", "the family decides what the fields mean", "add it, or use --as llama", place
        )
    if not isinstance(family, str) or family not in FAMILIES:
        fix = f"use one of {', '.join(FAMILIES)}; or, if the network is one of them under another name, --as llama"
        raise input_error("PLN111", f"model_type '{family}' is not known", "its fields cannot be mapped safely", fix, place)
    missing = [f for f in _REQUIRED.get(family, _LLAMA_FIELDS) if config.get(f) is None]
    if missing:
        raise input_error("PLN112", f"{family} configuration lacks {', '.join(missing)}", "sizes cannot be derived", "", place)
    wrong = [f for f in _SIZES if config.get(f) is not None and not _is_size(config[f])]
    if wrong:
        shown = ", ".join(f"{f} = {config[f]!r}" for f in wrong)
        raise input_error("PLN112", f"{family} configuration: {shown}", "sizes are whole numbers above zero", "", place)
    _refuse_features(config, str(family), place)
    try:
        data = FAMILIES[family](config)
    except (TypeError, ValueError, AttributeError) as error:
        raise input_error("PLN112", f"{family} configuration has a value of the wrong type", str(error), "", place) from None
    return {"name": name, "source": f"Hugging Face config.json, model_type {config.get('model_type')}", **data}


def _llama(config: Config, qkv_bias: bool | None = None, qk_norm: bool = False) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    bias = bool(config.get("attention_bias", False))
    attention = {
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "qkv_bias": bias if qkv_bias is None else qkv_bias,
        "out_bias": bias,
        "qk_norm": qk_norm,
    }
    window = config.get("sliding_window")
    if window and config.get("use_sliding_window", True):
        attention["sliding_window"] = window
    mlp = {"kind": "gated", "width": config["intermediate_size"], "bias": bool(config.get("mlp_bias", False))}
    rope = config.get("rope_parameters") or {}
    return {
        "hidden": config["hidden_size"],
        "vocab": config["vocab_size"],
        "norm": "rmsnorm",
        "norm_epsilon": float(config.get("rms_norm_eps") or 1e-6),
        "positions": "rotary",
        "max_positions": config.get("max_position_embeddings"),
        "rope_theta": float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
        "layers": [{"count": config["num_hidden_layers"], "attention": attention, "mlp": mlp}],
    }


def _gpt2(config: Config) -> dict[str, Any]:
    hidden = config["n_embd"]
    attention = {"heads": config["n_head"], "qkv_bias": True, "out_bias": True}
    mlp = {"kind": "gelu", "width": config.get("n_inner") or 4 * hidden, "bias": True}
    return {
        "hidden": hidden,
        "vocab": config["vocab_size"],
        "norm": "layernorm",
        "norm_epsilon": float(config.get("layer_norm_epsilon") or 1e-5),
        "positions": "learned",
        "max_positions": config.get("n_positions") or config.get("n_ctx"),
        "tied_embeddings": bool(config.get("tie_word_embeddings", True)),
        "layers": [{"count": config["n_layer"], "attention": attention, "mlp": mlp}],
    }


FAMILIES: dict[str, Callable[[Config], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": lambda c: _llama({**c, "use_sliding_window": c.get("use_sliding_window", False)}, qkv_bias=True),
    "qwen3": lambda c: _llama({**c, "use_sliding_window": c.get("use_sliding_window", False)}, qk_norm=True),
    "gpt2": _gpt2,
}
"""Families that import exactly, by `model_type`."""

_ACTIVATIONS = {"gpt2": ("hidden_act", "activation_function", ("gelu_new", "gelu", "gelu_pytorch_tanh", "gelu_fast"))}
_LLAMA_ACTIVATIONS = ("hidden_act", "hidden_activation", ("silu", "swish"))
_ABSENT = (
    "num_local_experts", "num_experts", "n_routed_experts", "kv_lora_rank", "quantization_config", "vision_config",
    "add_cross_attention", "is_encoder_decoder", "partial_rotary_factor", "layer_types",
)  # fmt: skip
"""Features that the spec cannot express: refused unless absent, empty, false, one, or full attention throughout."""


def _refuse_features(config: Config, family: str, place: Location) -> None:
    """Raise InputError for what would silently become another network."""
    *names, allowed = _ACTIVATIONS.get(family, _LLAMA_ACTIVATIONS)
    found = [f"{n} = {config[n]!r}" for n in names if config.get(n) not in (None, *allowed)]
    for name in _ABSENT:
        value = config.get(name)
        plain = value in (None, False, 0, 1, 1.0, {}, []) or (name == "layer_types" and set(value) == {"full_attention"})
        if not plain:
            found.append(f"{name} = {value!r}"[:80])
    tied = config.get("tie_word_embeddings")
    if tied is not None and not isinstance(tied, bool):
        found.append(f"tie_word_embeddings = {tied!r}")
    if found:
        why = "the network would be another one without it"
        raise input_error("PLN112", f"{family} configuration: {', '.join(found)} is not supported", why, "", place)


_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "head_dim", "max_position_embeddings", "n_embd", "n_layer", "n_head", "n_positions", "n_inner",
)  # fmt: skip


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


_LLAMA_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_REQUIRED = {"gpt2": ("n_embd", "n_layer", "n_head", "vocab_size")}
