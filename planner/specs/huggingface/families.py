"""The table: which field of which family means what.

A family is a mapping from our terms to a constant of that family, a field of its files (with the value that the family's
published class has when a file leaves it out), or a rule over several fields. Families are written as their difference from
another. `refused` names fields that a family's code reads and the spec has no words for, with the reason; `reads` those that
change neither sizes nor cost. Sources: the configuration and modelling classes of Hugging Face transformers 5.23, and the
configurations that the models' authors published; the tests build every family and compare.

Terms are those of `planner.specs`: `attention_of`, `rotary_of` and `routed_of` give one entry a layer.
"""

from __future__ import annotations

from typing import Any

from planner.specs.huggingface import rules
from planner.specs.huggingface.fields import REQUIRED, flag, layers, names_of, number, number_of, numbers, size, text

Family = dict[str, Any]

_ROPE = ("rope_parameters.rope_theta", "rope_parameters.full_attention.rope_theta", "rope_theta")
_SHARE = ("rope_parameters.partial_rotary_factor", "partial_rotary_factor")


def _theta(default: float, *names: str) -> Any:
    return number(*_ROPE, *names, default=default)


def _window(default: int | None) -> Any:
    return size("sliding_window", default=default, null=None)


def _kv(default: int | None) -> Any:
    return size("num_key_value_heads", default=default, null=None)


def _head(default: int | None) -> Any:
    return size("head_dim", default=default, null=None)


LLAMA: Family = {
    "hidden": size("hidden_size"),
    "vocab": size("vocab_size"),
    "n_layers": layers("num_hidden_layers"),
    "heads": size("num_attention_heads"),
    "kv_heads": _kv(None),
    "head_dim": _head(None),
    "latent": False,
    "qkv_bias": flag("attention_bias", default=False),
    "out_bias": flag("attention_bias", default=False),
    "qk_norm": "none",
    "sinks": False,
    "softcap": None,
    "window": None,
    "chunk": None,
    "attention_of": rules.everywhere,
    "rotary_of": None,
    "mlp": "gated",
    "activation": text("hidden_act", default="silu"),
    "width": size("intermediate_size"),
    "mlp_bias": flag("mlp_bias", default=False),
    "routed_of": rules.none_routed,
    "shared_width": 0,
    "shared_gate": False,
    "router_bias": False,
    "norm": "rmsnorm",
    "norm_bias": None,
    "norm_weight": True,
    "epsilon": number("rms_norm_eps", default=1e-6),
    "norms": "pre",
    "parallel": False,
    "positions": "rotary",
    "rope_theta": _theta(10_000.0),
    "rope_share": 1.0,
    "max_positions": size("max_position_embeddings", default=None),
    "tied": flag("tie_word_embeddings", default=False),
    "head_bias": False,
    "mtp": 0,
    "refused": {},
}
"""Llama 1 to 3, and what every family starts from."""

MISTRAL: Family = LLAMA | {
    "kv_heads": _kv(8),
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
    "window": _window(4096),
}

MIXTRAL: Family = MISTRAL | {
    "window": _window(None),
    "epsilon": number("rms_norm_eps", default=1e-5),
    "rope_theta": _theta(1e6),
    "routed_of": rules.all_routed,
    "experts": size("num_local_experts", "num_experts"),
    "top_k": size("num_experts_per_tok", default=2),
    "expert_width": size("intermediate_size"),
    "expert_bias": False,
}

_QWEN_WINDOW: Family = {
    "use_window": flag("use_sliding_window", default=False),
    "stated_window": _window(4096),
    "window": rules.window_if_used,
    "max_window_layers": number_of("max_window_layers", default=28),
    "layer_types": names_of("layer_types"),
    "attention_of": rules.typed(rules.upper_window),
}

QWEN2: Family = LLAMA | _QWEN_WINDOW | {"kv_heads": _kv(32), "qkv_bias": True, "out_bias": False, "mlp_bias": False}

QWEN3: Family = (
    LLAMA
    | _QWEN_WINDOW
    | {"kv_heads": _kv(32), "head_dim": _head(128), "qk_norm": "head", "mlp_bias": False}
    | {"reads": ("use_qk_norm",)}
)

_QWEN_EXPERTS: Family = {
    "mlp_bias": False,
    "routed_of": rules.sparse_steps,
    "dense_layers": numbers("mlp_only_layers"),
    "sparse_step": size("decoder_sparse_step", default=1),
    "experts": size("num_experts", "num_local_experts"),
    "expert_width": size("moe_intermediate_size"),
    "expert_bias": False,
}

QWEN2_MOE: Family = LLAMA | _QWEN_WINDOW | _QWEN_EXPERTS | {
    "kv_heads": _kv(16),
    "qkv_bias": flag("qkv_bias", default=True),
    "out_bias": False,
    "attention_of": rules.typed(rules.lower_window),
    "top_k": size("num_experts_per_tok", default=4),
    "shared_width": number_of("shared_expert_intermediate_size", default=5632),
    "shared_gate": True,
}  # fmt: skip

QWEN3_MOE: Family = LLAMA | _QWEN_WINDOW | _QWEN_EXPERTS | {
    "kv_heads": _kv(4),
    "use_qk_norm": flag("use_qk_norm", default=True),
    "qk_norm": rules.always_normed("head"),
    "attention_of": rules.everywhere,
    "top_k": size("num_experts_per_tok", default=8),
}  # fmt: skip

GEMMA: Family = LLAMA | {
    "kv_heads": _kv(16),
    "head_dim": _head(256),
    "mlp_bias": False,
    "activation": text("hidden_activation", "hidden_act", default="gelu_pytorch_tanh"),
    "tied": flag("tie_word_embeddings", default=True),
    "refused": {"use_bidirectional_attention": "tokens would see later ones"},
}

GEMMA2: Family = GEMMA | {
    "kv_heads": _kv(4),
    "norms": "both",
    "softcap": number("attn_logit_softcapping", default=50.0, null=None),
    "window": _window(4096),
    "layer_types": names_of("layer_types"),
    "attention_of": rules.typed(rules.alternating(2, "sliding", "full")),
}

GEMMA3: Family = GEMMA2 | {  # published files leave out what equals the class, sizes too
    "hidden": size("hidden_size", default=2304),
    "vocab": size("vocab_size", default=262_208),
    "n_layers": layers("num_hidden_layers", default=26),
    "heads": size("num_attention_heads", default=8),
    "width": size("intermediate_size", default=9216),
    "max_positions": size("max_position_embeddings", default=131_072),
    "qk_norm": "head",
    "softcap": number("attn_logit_softcapping", default=None),
    "rope_theta": _theta(1e6),
    "pattern": size("sliding_window_pattern", "_sliding_window_pattern", default=6),
    "attention_of": rules.typed(rules.gemma3_pattern),
}

GPT2: Family = LLAMA | {
    "hidden": size("n_embd", "hidden_size"),
    "n_layers": layers("n_layer", "num_hidden_layers"),
    "heads": size("n_head", "num_attention_heads"),
    "kv_heads": None,
    "head_dim": None,
    "qkv_bias": True,
    "out_bias": True,
    "mlp": "gelu",
    "activation": text("activation_function", "hidden_act", default="gelu_new"),
    "stated_width": size("n_inner", default=None),
    "width": rules.four_hidden,
    "mlp_bias": True,
    "norm": "layernorm",
    "epsilon": number("layer_norm_epsilon", default=1e-5),
    "positions": "learned",
    "max_positions": size("n_positions", "n_ctx", "max_position_embeddings", default=1024),
    "tied": flag("tie_word_embeddings", default=True),
}

GPT_NEOX: Family = LLAMA | {
    "kv_heads": None,
    "head_dim": None,
    "qkv_bias": flag("attention_bias", default=True),
    "out_bias": flag("attention_bias", default=True),
    "mlp": "gelu",
    "activation": text("hidden_act", default="gelu"),
    "mlp_bias": True,
    "norm": "layernorm",
    "epsilon": number("layer_norm_eps", default=1e-5),
    "parallel": flag("use_parallel_residual", default=True),
    "rope_theta": _theta(10_000.0, "rotary_emb_base"),
    "rope_share": number(*_SHARE, "rotary_pct", default=0.25),
}

FALCON: Family = LLAMA | {
    "hidden": size("hidden_size", "n_embed"),
    "n_layers": layers("num_hidden_layers", "n_layer"),
    "heads": size("num_attention_heads", "n_head"),
    "new_architecture": flag("new_decoder_architecture", default=False),
    "multi_query": flag("multi_query", default=True),
    "stated_kv_heads": size("num_kv_heads", "n_head_kv", default=None),
    "kv_heads": rules.falcon_kv_heads,
    "head_dim": None,
    "qkv_bias": flag("bias", default=False),
    "out_bias": flag("bias", default=False),
    "mlp": "gelu",
    "activation": text("activation", default="gelu"),
    "stated_width": size("ffn_hidden_size", default=None),
    "width": rules.four_hidden,
    "mlp_bias": flag("bias", default=False),
    "norm": "layernorm",
    "epsilon": number("layer_norm_epsilon", default=1e-5),
    "stated_parallel": flag("parallel_attn", default=True),
    "parallel": rules.falcon_parallel,
    "parallel_norms": size("num_ln_in_parallel_attn", default=None),
    "norms": rules.falcon_norms,
    "alibi": flag("alibi", default=False),
    "positions": rules.falcon_positions,
    "tied": flag("tie_word_embeddings", default=True),
}

PHI: Family = LLAMA | {
    "qkv_bias": True,
    "out_bias": True,
    "mlp": "gelu",
    "activation": text("hidden_act", default="gelu_new"),
    "mlp_bias": True,
    "norm": "layernorm",
    "epsilon": number("layer_norm_eps", default=1e-5),
    "norms": "shared",
    "parallel": True,
    "head_bias": True,
    "rope_share": number(*_SHARE, default=0.5),
    "refused": {"qk_layernorm": "norms of queries and keys with biases cannot be expressed"},
}

PHI3: Family = MISTRAL | {
    "kv_heads": _kv(None),
    "window": _window(None),
    "epsilon": number("rms_norm_eps", default=1e-5),
    "rope_share": number(*_SHARE, default=1.0),
}

PHIMOE: Family = MIXTRAL | {
    "qkv_bias": flag("attention_bias", default=False),
    "out_bias": flag("attention_bias", default=False),
    "experts": size("num_local_experts"),
    "norm": "layernorm",
    "head_bias": flag("lm_head_bias", default=False),
}

OLMO: Family = LLAMA | {
    "mlp_bias": False,
    "norm": "layernorm",
    "norm_bias": False,
    "norm_weight": False,
    "epsilon": 1e-5,
    "refused": {"clip_qkv": "clipped queries, keys and values cannot be expressed"},
}

OLMO2: Family = LLAMA | {
    "mlp_bias": False,
    "qk_norm": "width",
    "norms": "post",
    "epsilon": number("rms_norm_eps", default=1e-5),
    "refused": {"clip_qkv": "clipped queries, keys and values cannot be expressed"},
}

GPT_OSS: Family = MIXTRAL | {
    "kv_heads": _kv(8),
    "head_dim": _head(64),
    "qkv_bias": flag("attention_bias", default=True),
    "out_bias": flag("attention_bias", default=True),
    "sinks": True,
    "window": _window(128),
    "layer_types": names_of("layer_types"),
    "attention_of": rules.typed(rules.alternating(2, "sliding", "full")),
    "activation": "clamped_silu",
    "top_k": size("num_experts_per_tok", "experts_per_token", default=4),
    "expert_bias": True,
    "router_bias": True,
    "rope_theta": _theta(150_000.0),
}

DEEPSEEK_V3: Family = LLAMA | {
    "latent": True,
    "kv_heads": None,  # num_key_value_heads of the files is not grouping
    "q_lora_rank": size("q_lora_rank", default=1536, null=None),
    "kv_lora_rank": size("kv_lora_rank"),
    "nope_dim": size("qk_nope_head_dim"),
    "rope_dim": size("qk_rope_head_dim"),
    "v_head_dim": size("v_head_dim"),
    "mlp_bias": False,
    "routed_of": rules.after_dense,
    "dense_first": number_of("first_k_dense_replace", default=3),
    "moe_every": size("moe_layer_freq", default=1),
    "experts": size("n_routed_experts", "num_local_experts", default=REQUIRED, null=None),
    "top_k": size("num_experts_per_tok", default=8),
    "expert_width": size("moe_intermediate_size"),
    "expert_bias": False,
    "n_shared": number_of("n_shared_experts", default=1, null=0),
    "shared_width": rules.shared_experts,
    "mtp": number_of("num_nextn_predict_layers", "num_mtp_layers"),
}

DEEPSEEK_V2: Family = DEEPSEEK_V3 | {
    "experts": size("n_routed_experts", "num_experts", default=REQUIRED, null=None),
    "dense_first": number_of("first_k_dense_replace"),
    "n_shared": number_of("n_shared_experts", default=2, null=0),
    "top_k": size("num_experts_per_tok"),
    "refused": {"mlp_bias": "biases of shared experts alone cannot be expressed"},
}

STARCODER2: Family = MISTRAL | {
    "kv_heads": _kv(2),
    "window": _window(None),
    "qkv_bias": flag("use_bias", default=True),
    "out_bias": flag("use_bias", default=True),
    "mlp": "gelu",
    "activation": text("hidden_act", default="gelu_pytorch_tanh"),
    "mlp_bias": flag("use_bias", default=True),
    "norm": "layernorm",
    "epsilon": number("norm_epsilon", default=1e-5),
    "tied": flag("tie_word_embeddings", default=True),
}

GLM4: Family = LLAMA | {
    "kv_heads": _kv(2),
    "head_dim": _head(128),
    "qkv_bias": flag("attention_bias", default=True),
    "out_bias": False,
    "mlp_bias": False,
    "norms": "both",
    "epsilon": number("rms_norm_eps", default=1.5625e-7),
    "rope_share": number(*_SHARE, default=0.5),
}

GLM4_MOE: Family = DEEPSEEK_V3 | {
    "latent": False,
    "kv_heads": _kv(8),
    "stated_head_dim": _head(None),
    "head_dim": rules.rounded_head_dim,
    "qk_norm": lambda terms: "head" if terms["use_qk_norm"] else "none",
    "use_qk_norm": flag("use_qk_norm", default=False),
    "out_bias": False,
    "dense_first": number_of("first_k_dense_replace", default=1),
    "moe_every": 1,
    "epsilon": number("rms_norm_eps", default=1e-5),
    "rope_share": number(*_SHARE, default=0.5),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "nope_dim", "rope_dim", "v_head_dim")),
}

LLAMA4: Family = LLAMA | {
    "kv_heads": _kv(8),
    "head_dim": _head(128),
    "mlp_bias": False,
    "width": size("intermediate_size_mlp", default=16_384),
    "expert_width": size("intermediate_size"),
    "expert_bias": False,
    "shared_width": size("intermediate_size"),  # always one shared expert
    "experts": size("num_local_experts"),
    "top_k": size("num_experts_per_tok", default=1),
    "routed_of": rules.llama4_routed,
    "moe_layers": numbers("moe_layers"),
    "moe_step": size("interleave_moe_layer_step", default=1),
    "chunk": size("attention_chunk_size", default=8192, null=None),
    "layer_types": names_of("layer_types"),
    "attention_of": rules.typed(rules.llama4_chunks),
    "rope_flags": numbers("no_rope_layers"),
    "nope_every": size("no_rope_layer_interval", default=4),
    "rotary_of": rules.llama4_rotary,
    "epsilon": number("rms_norm_eps", default=1e-5),
    "rope_theta": _theta(500_000.0),
    "reads": ("use_qk_norm",),  # without parameters
}

MINIMAX: Family = MIXTRAL | {
    "layer_types": names_of("layer_types"),
    "attention_of": rules.typed(rules.alternating(2, "full", "linear")),
}

MINIMAX_M2: Family = MIXTRAL | {
    "head_dim": _head(128),
    "use_qk_norm": flag("use_qk_norm", default=True),
    "qk_norm": rules.always_normed("width"),
    "window": None,
    "top_k": size("num_experts_per_tok", default=8),
    "epsilon": number("rms_norm_eps", default=1e-6),
    "rope_theta": _theta(5e6),
    "rotary_dim": size("rotary_dim", default=None),
    "stated_share": number(*_SHARE, default=1.0),
    "rope_share": rules.head_share,
    "use_mtp": flag("use_mtp", default=False),
    "mtp_modules": number_of("num_mtp_modules"),
    "mtp_layers": size("mtp_transformer_layers", default=1),
    "mtp": rules.minimax_modules,
    "refused": {"shared_intermediate_size": "shared experts are not part of this family"},
}

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "llama4_text": LLAMA4,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "qwen2": QWEN2,
    "qwen2_moe": QWEN2_MOE,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "qwen3_vl_text": QWEN3,
    "qwen3_vl_moe_text": QWEN3_MOE | {"kv_heads": _kv(16), "top_k": size("num_experts_per_tok", default=4)},
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "falcon": FALCON,
    "phi": PHI,
    "phi3": PHI3,
    "phimoe": PHIMOE,
    "olmo": OLMO,
    "olmo2": OLMO2,
    "gpt_oss": GPT_OSS,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "kimi_k2": DEEPSEEK_V3,
    "starcoder2": STARCODER2,
    "glm4": GLM4,
    "glm4_moe": GLM4_MOE,
    "minimax": MINIMAX,
    "minimax_m2": MINIMAX_M2,
}
"""Families that import exactly, by `model_type`."""

WRAPPERS = {
    "llama4": "llama4_text",
    "gemma3": "gemma3_text",
    "kimi_k25": "kimi_k2",
    "qwen3_vl": "qwen3_vl_text",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
}
"""Families with a vision tower: the family of their `text_config` when it does not say."""

STRUCTURE = (
    "num_local_experts", "num_experts", "n_routed_experts", "n_shared_experts", "shared_expert_intermediate_size",
    "moe_intermediate_size", "first_k_dense_replace", "moe_layer_freq", "decoder_sparse_step", "mlp_only_layers", "moe_layers",
    "kv_lora_rank", "q_lora_rank", "index_topk", "index_n_heads", "layer_types", "layers_block_type", "hybrid_override_pattern",
    "sliding_window_pattern", "sliding_window", "attention_chunk_size", "no_rope_layers", "attn_logit_softcapping", "alibi",
    "attention_bias", "qkv_bias", "bias", "use_bias", "mlp_bias", "lm_head_bias", "add_bias_linear", "partial_rotary_factor",
    "rotary_pct", "rotary_dim", "use_qk_norm", "qk_layernorm", "qk_norm", "parallel_attn", "use_parallel_residual",
    "num_nextn_predict_layers", "num_mtp_layers", "use_mtp", "add_cross_attention", "is_encoder_decoder", "encoder_layers",
    "cross_attention_layers", "vision_config", "audio_config", "block_configs", "ssm_state_size", "mamba_num_heads",
    "linear_num_value_heads", "num_kv_shared_layers", "hidden_size_per_layer_input", "hc_mult", "kda_layers",
    "linear_attn_config", "attn_type_list", "moe_num_experts", "ffn_config", "attn_config", "attention_sink_bias",
)  # fmt: skip
"""Fields that say what the network is, in any family: where a family does not read one, a file that sets it is refused."""
