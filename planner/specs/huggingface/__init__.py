"""Hugging Face `config.json` to our model spec, without transformers.

Lives here: `families` (the table that says which field of which family means what), `fields` (reading one value), `rules`
(what a family derives from several). A family that is not in the table is refused, never guessed, and so is a field that would
make another network. Comes in: parsed JSON. Goes out: data for `planner.specs.model.Model`.
"""

from __future__ import annotations

import itertools
from typing import Any, NoReturn

from planner.errors import input_error
from planner.specs.huggingface.families import FAMILIES, LLAMA, STRUCTURE, WRAPPERS
from planner.specs.huggingface.fields import Config, Field, Locate, Terms, shown

__all__ = ["FAMILIES", "WRAPPERS", "is_config", "to_model_data"]

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "relu2": "relu2", "clamped_silu": "clamped_silu",
}  # fmt: skip
"""Our name of an activation."""


def is_config(data: Any) -> bool:
    """Whether parsed data looks like a Hugging Face configuration."""
    return isinstance(data, dict) and ("model_type" in data or "architectures" in data)


def to_model_data(config: Config, name: str, locate: Locate, as_type: str | None = None) -> dict[str, Any]:
    """Our model data from a configuration. `as_type` treats an unknown family as a known one; `locate` finds a key's place.

    Raises InputError for an unknown family, for missing fields, and for features that the spec cannot express.
    """
    config, stated, nested = _language_model(config)
    place = (lambda *keys: locate("text_config", *keys)) if nested else locate
    family = as_type or config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        _unknown(config, family, place)
    terms = Terms(config, family, FAMILIES[family], place)
    if missing := terms.lacking():
        terms.refuse(f"{family} configuration lacks {', '.join(missing)}", "sizes cannot be derived", "add what is missing")
    _refuse_features(terms)
    return {"name": name, "source": _source(stated, config, nested), **_model(terms)}


def _language_model(config: Config) -> tuple[Config, Any, bool]:
    """The configuration of the language model, the family that the file states, and whether it is nested in the file's."""
    stated, text = config.get("model_type"), config.get("text_config")
    if not isinstance(text, dict) or "hidden_size" in config:
        return config, stated, False
    wrapped = WRAPPERS.get(stated) if isinstance(stated, str) else None
    family = text.get("model_type") or wrapped if wrapped else stated
    whole = {k: config[k] for k in ("tie_word_embeddings", "quantization_config") if k in config}
    return whole | text | {"model_type": family}, stated, True


def _unknown(config: Config, family: Any, locate: Locate) -> NoReturn:
    """Refuse a family that is not in the table, with what llama would lack. Raises InputError."""
    lacking = Terms(config, "llama", LLAMA, locate).lacking()
    lacks = f"read as llama it lacks {', '.join(lacking)}" if lacking else "it has every field that llama needs"
    same = "if the network is one of them under another name, --as llama"
    if family is None:
        why = f"the family decides what the fields mean; {lacks}"
        raise input_error("PLN111", "model_type is missing", why, f"add it; or, {same}", locate())
    known = ", ".join([*FAMILIES, *WRAPPERS])
    why = f"its fields cannot be mapped safely; {lacks}"
    raise input_error(
        "PLN111", f"model_type '{family}' is not known", why, f"use one of {known}; or, {same}", locate("model_type")
    )


def _refuse_features(terms: Terms) -> None:
    """Refuse what would silently become another network. Raises InputError."""
    config, table = terms.config, terms.table
    reads = {name.rpartition(".")[2] for f in table.values() if isinstance(f, Field) for name in f.names}
    reads |= set(table.get("reads", ()))
    reasons = dict(table["refused"])
    unread = [name for name in (*STRUCTURE, *reasons) if name in reasons or name not in reads]
    for name in unread:
        value = config.get(name)
        if not _says_something(value):
            continue
        why = reasons.get(name, f"{terms.family} has no such part: the network would be another one without it")
        terms.refuse(
            f"{terms.family} configuration: {name} = {shown(value)} is not supported",
            why,
            "remove it if the network lacks it",
            name,
        )
    rope = config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        what = f"{terms.family} configuration: rope_parameters = {shown(rope)}"
        terms.refuse(what, "it is keys and values", "correct it", "rope_parameters")
    share = rope.get("partial_rotary_factor")
    if "partial_rotary_factor" not in reads and share not in (None, 1):
        what = f"{terms.family} configuration: partial_rotary_factor = {shown(share)} is not supported"
        terms.refuse(what, f"{terms.family} turns whole heads", "remove it", "rope_parameters.partial_rotary_factor")


def _says_something(value: Any) -> bool:
    """Whether a field that a family does not read would change the network: not when it is off, one, or the usual."""
    if isinstance(value, list):
        return not set(map(str, value)) <= {"full_attention", "1"}
    return value is True or value not in (None, False, 0, 1, {}, [])


def _source(stated: Any, config: Config, nested: bool) -> str:
    """Where the sizes come from, and what of the file is not part of them."""
    parts = [f"Hugging Face config.json, model_type {stated}"]
    if nested:
        parts.append("the language model of text_config, without the vision tower")
    if isinstance(stored := config.get("quantization_config"), dict):
        method = stored.get("quant_method") or stored.get("quant_algo") or "quantised"
        parts.append(f"weights stored as {method} (quantization_config), sizes as trained")
    return "; ".join(parts)


# ---- the model -----------------------------------------------------------------------------------------------------


def _model(terms: Terms) -> dict[str, Any]:
    """Data of the model from its terms."""
    return {
        "hidden": terms["hidden"],
        "vocab": terms["vocab"],
        "norm": terms["norm"],
        "norm_bias": terms["norm_bias"],
        "norm_weight": terms["norm_weight"],
        "norm_epsilon": float(terms["epsilon"]),
        "positions": terms["positions"],
        "max_positions": terms["max_positions"],
        "rope_theta": float(terms["rope_theta"]),
        "tied_embeddings": terms["tied"],
        "head_bias": terms["head_bias"],
        "mtp": terms["mtp"],
        "layers": _groups(terms),
    }


def _groups(terms: Terms) -> list[dict[str, Any]]:
    """Layer groups in order: equal layers in a row are one."""
    kinds, routed = terms["attention_of"], terms["routed_of"]
    rotary = terms["rotary_of"] or [True] * len(kinds)
    built: dict[tuple[str, bool, bool], dict[str, Any]] = {}
    groups = []
    for key, layers in itertools.groupby(zip(kinds, rotary, routed, strict=True)):
        if key not in built:
            kind, turned, has_experts = key
            mlp = _experts(terms) if has_experts else _dense(terms)
            norms = {"norms": terms["norms"], "parallel": terms["parallel"]}
            built[key] = {"attention": _attention(terms, kind, turned), "mlp": mlp, **norms}
        groups.append({"count": len(list(layers)), **built[key]})
    return groups


def _attention(terms: Terms, kind: str, rotary: bool) -> dict[str, Any]:
    """Attention of one kind of layer: full, sliding, chunked or linear."""
    heads = {"heads": terms["heads"], "head_dim": terms["head_dim"], "kv_heads": terms["kv_heads"] or terms["heads"]}
    attention = heads | {name: terms[name] for name in ("qkv_bias", "out_bias", "qk_norm", "sinks", "softcap")}
    attention["rope_share"] = float(terms["rope_share"]) if rotary else 0.0
    if kind == "linear":
        return attention | {
            "kind": "linear",
            "kv_heads": terms["heads"],
            "rope_share": 0.0,
            "output_gate": True,
            "output_norm": True,
        }
    if terms["latent"]:
        names = ("q_lora_rank", "kv_lora_rank", "rope_dim", "v_head_dim")
        attention |= {"kind": "latent", "head_dim": terms["nope_dim"] + terms["rope_dim"]} | {n: terms[n] for n in names}
    local = {"sliding": ("sliding_window", "window"), "chunked": ("chunk", "chunk")}.get(kind)
    if local:
        field, term = local
        if terms[term] is None:
            terms.refuse(
                f"{terms.family} configuration: {kind} layers without a length", "layer_types has them", f"add {field}"
            )
        attention[field] = terms[term]
    return attention


def _dense(terms: Terms) -> dict[str, Any]:
    """A dense MLP."""
    return _activated(terms) | {"width": terms["width"], "bias": terms["mlp_bias"]}


def _experts(terms: Terms) -> dict[str, Any]:
    """A mixture of experts."""
    if terms["experts"] == 1:
        terms.refuse(f"{terms.family} configuration has 1 expert", "a router over one is not a mixture", "use the dense family")
    names = ("experts", "top_k", "shared_width", "router_bias")
    shared = {"shared_gate": terms["shared_gate"] and terms["shared_width"] > 0}
    return (
        _activated(terms)
        | {"width": terms["expert_width"], "bias": terms["expert_bias"]}
        | {n: terms[n] for n in names}
        | shared
    )


def _activated(terms: Terms) -> dict[str, Any]:
    """Kind and activation of the MLP; the activation is left out where it is the kind's own."""
    given = terms["activation"]
    if given not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        terms.refuse(
            f"{terms.family} configuration: activation {shown(given)} is not supported", f"known are {known}", "use one of them"
        )
    own = {"gated": "silu", "gelu": "gelu"}[terms["mlp"]]
    activation = ACTIVATIONS[given]
    return {"kind": terms["mlp"]} | ({"activation": activation} if activation != own else {})
