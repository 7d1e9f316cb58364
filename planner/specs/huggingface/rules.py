"""What a family derives from several fields: the kind of every layer, and sizes that flags decide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from planner.specs.huggingface.fields import Terms

Rule = Callable[[Terms], Any]

KINDS = {
    "full_attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
    "linear_attention": "linear",
}
"""Attention of a layer by its name in `layer_types`."""


# ---- attention of every layer --------------------------------------------------------------------------------------


def everywhere(terms: Terms) -> list[str]:
    """The window, where the file gives one, holds in every layer."""
    return ["sliding" if terms["window"] else "full"] * terms["n_layers"]


def typed(fallback: Callable[[Terms, int], str]) -> Rule:
    """`layer_types` of the file; by `fallback` and the layer's index in files that have none."""

    def rule(terms: Terms) -> list[str]:
        given = terms["layer_types"]
        if given is None:
            return [fallback(terms, i) for i in range(terms["n_layers"])]
        unknown = sorted(set(given) - set(KINDS))
        if unknown or len(given) < terms["n_layers"]:
            what = f"{terms.family} configuration: layer_types has {', '.join(unknown) or f'{len(given)} entries'}"
            why = f"known are {', '.join(KINDS)}, one for each of {terms['n_layers']} layers"
            terms.refuse(what, why, "correct it", "layer_types")
        return [KINDS[name] for name in given[: terms["n_layers"]]]

    return rule


def alternating(every: int, first: str, last: str) -> Callable[[Terms, int], str]:
    """`last` in every n-th layer, `first` in the others."""
    return lambda _, i: last if (i + 1) % every == 0 else first


def gemma3_pattern(terms: Terms, i: int) -> str:
    """Full attention in every `sliding_window_pattern`-th layer."""
    return "full" if (i + 1) % terms["pattern"] == 0 else "sliding"


def upper_window(terms: Terms, i: int) -> str:
    """qwen2, qwen3: a window from `max_window_layers` on, when it is used."""
    return "sliding" if terms["window"] and i >= terms["max_window_layers"] else "full"


def lower_window(terms: Terms, i: int) -> str:
    """qwen2_moe: a window in every other layer below `max_window_layers`, when it is used."""
    return "sliding" if terms["window"] and i % 2 == 0 and i < terms["max_window_layers"] else "full"


def window_if_used(terms: Terms) -> int | None:
    """qwen: `sliding_window` where `use_sliding_window` says so."""
    window: int | None = terms["stated_window"]
    return window if terms["use_window"] else None


def llama4_rotary(terms: Terms) -> list[bool]:
    """llama4: `no_rope_layers` has a 1 where positions rotate; every fourth layer has none when left out."""
    given = terms["rope_flags"]
    if not given:
        return [(i + 1) % terms["nope_every"] != 0 for i in range(terms["n_layers"])]
    if len(given) < terms["n_layers"]:
        why = f"one for each of {terms['n_layers']} layers is needed"
        terms.refuse(f"no_rope_layers has {len(given)} entries", why, "correct it", "no_rope_layers")
    return [bool(x) for x in given[: terms["n_layers"]]]


def llama4_chunks(terms: Terms, i: int) -> str:
    """llama4: layers with rotary positions see their chunk, the others everything."""
    return "chunked" if llama4_rotary(terms)[i] and terms["chunk"] else "full"


# ---- routed layers -------------------------------------------------------------------------------------------------


def all_routed(terms: Terms) -> list[bool]:
    """Experts in every layer."""
    return [True] * terms["n_layers"]


def none_routed(terms: Terms) -> list[bool]:
    """No experts."""
    return [False] * terms["n_layers"]


def sparse_steps(terms: Terms) -> list[bool]:
    """qwen: experts in every `decoder_sparse_step`-th layer but `mlp_only_layers`."""
    dense, step = terms["dense_layers"] or [], terms["sparse_step"]
    return [i not in dense and (i + 1) % step == 0 for i in range(terms["n_layers"])]


def after_dense(terms: Terms) -> list[bool]:
    """deepseek, glm4_moe: dense first, then experts in every `moe_layer_freq`-th layer; none without experts."""
    first, step = terms["dense_first"], terms["moe_every"]
    return [terms["experts"] is not None and i >= first and i % step == 0 for i in range(terms["n_layers"])]


def llama4_routed(terms: Terms) -> list[bool]:
    """llama4: `moe_layers`, or every `interleave_moe_layer_step`-th."""
    given, step = terms["moe_layers"], terms["moe_step"]
    chosen = range(step - 1, terms["n_layers"], step) if given is None else given
    return [i in chosen for i in range(terms["n_layers"])]


# ---- sizes that flags decide ---------------------------------------------------------------------------------------


def shared_experts(terms: Terms) -> int:
    """deepseek, glm4_moe: `n_shared_experts` of the routed experts' width."""
    width: int = terms["n_shared"] * terms["expert_width"]
    return width


def falcon_kv_heads(terms: Terms) -> int | None:
    """falcon: `num_kv_heads` counts in the new architecture only; one otherwise with `multi_query`."""
    if terms["new_architecture"]:
        kv_heads: int | None = terms["stated_kv_heads"]
        return kv_heads
    return 1 if terms["multi_query"] else None


def falcon_norms(terms: Terms) -> str:
    """falcon: one norm before a parallel block; two in the new architecture unless told otherwise."""
    new, given = terms["new_architecture"], terms["parallel_norms"]
    if new and not terms["stated_parallel"]:
        why = "the new architecture is always parallel"
        terms.refuse("falcon configuration: parallel_attn = False", why, "set it to true", "parallel_attn")
    if given == 2 and not new:
        why = "only new_decoder_architecture uses two norms"
        key = "num_ln_in_parallel_attn"
        terms.refuse(f"falcon configuration: {key} = 2", why, "remove it", key)
    if not terms["parallel"]:
        return "pre"
    return "pre" if new and given in (None, 2) else "shared"


def falcon_parallel(terms: Terms) -> bool:
    """falcon: `parallel_attn`; always in the new architecture."""
    return bool(terms["new_architecture"] or terms["stated_parallel"])


def falcon_positions(terms: Terms) -> str:
    """falcon: alibi or rotary."""
    return "alibi" if terms["alibi"] else "rotary"


def four_hidden(terms: Terms) -> int:
    """gpt2, falcon: the MLP is four times the hidden width unless told otherwise."""
    width: int = terms["stated_width"] or 4 * terms["hidden"]
    return width


def always_normed(kind: str) -> Rule:
    """qwen3, minimax_m2: queries and keys are normed; a file that says otherwise is not one of them."""

    def rule(terms: Terms) -> str:
        if not terms["use_qk_norm"]:
            why = "this family always norms queries and keys"
            terms.refuse(f"{terms.family} configuration: use_qk_norm = False", why, "remove it", "use_qk_norm")
        return kind

    return rule


def rounded_head_dim(terms: Terms) -> int:
    """glm4_moe: hidden / heads, rounded down, unless told otherwise."""
    width: int = terms["stated_head_dim"] or terms["hidden"] // terms["heads"]
    return width


def head_share(terms: Terms) -> float:
    """minimax_m2: `rotary_dim` of each head is turned."""
    dim, width = terms["rotary_dim"], terms["head_dim"] or terms["hidden"] // terms["heads"]
    share: float = dim / width if dim and width else terms["stated_share"]
    return share


def minimax_modules(terms: Terms) -> int:
    """minimax_m2: `num_mtp_modules`, when used."""
    if not terms["use_mtp"]:
        return 0
    if terms["mtp_layers"] != 1:
        key = "mtp_transformer_layers"
        terms.refuse(f"{terms.family} configuration: {key} = {terms['mtp_layers']}", "a module has one layer", "set 1", key)
    modules: int = terms["mtp_modules"]
    return modules
