"""Imported families against transformers: every parameter of the built network is counted, layer by layer."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from planner.cli.common import to_yaml
from planner.errors import InputError
from planner.specs.files import load_model
from planner.specs.huggingface import FAMILIES
from planner.specs.model import Model

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PUBLISHED = {
    "llama": 6_738_415_616,
    "llama4_text": 107_769_861_120,
    "mistral": 7_241_732_096,
    "mixtral": 46_702_792_704,
    "qwen2": None,
    "qwen2_moe": 14_315_784_192,
    "qwen3": None,
    "qwen3_moe": None,
    "gemma": 8_537_680_896,
    "gemma2": 2_614_341_888,
    "gemma3_text": None,
    "gpt2": 124_439_808,
    "gpt_neox": 20_554_567_680,
    "falcon": 6_921_720_704,
    "phi": 1_418_270_720,
    "phi3": 3_821_079_552,
    "phimoe": 41_872_793_600,
    "olmo": 6_888_095_744,
    "olmo2": 6_888_624_128,
    "gpt_oss": 116_829_156_672,
    "deepseek_v2": None,
    "deepseek_v3": 671_026_404_352,
    "starcoder2": 3_030_371_328,
    "glm4": 9_400_279_040,
    "glm4_moe": None,
    "minimax": None,
    "minimax_m2": 228_689_748_992,
}
"""Default-constructed classes, and their count where it is a published model's."""

ONLY_HERE = {"kimi_k2": "deepseek_v3", "qwen3_vl_text": "qwen3", "qwen3_vl_moe_text": "qwen3_moe"}
"""Families without a causal language model of their own: the class of the same network."""

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "vocab_size": 320,
    "max_position_embeddings": 128,
}
KV = {"num_key_value_heads": 2}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DEEPSEEK = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
GLM_MOE = {k: v for k, v in DEEPSEEK.items() if "lora" not in k and "head_dim" not in k}
GPT2 = {"n_embd": 64, "n_layer": 6, "n_head": 8, "n_positions": 128, "vocab_size": 320}
FALCON2 = {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}
MIXED = ["sliding_attention"] * 2 + ["full_attention"] * 4
LLAMA4 = MOE | {"intermediate_size_mlp": 112, "head_dim": 8, "attention_chunk_size": 32}

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", KV | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", KV | {"head_dim": 20, "hidden_act": "gelu"}),
    ("mistral", KV | {"sliding_window": 16}),
    ("mistral", KV | {"sliding_window": None, "head_dim": 10}),
    ("mixtral", MOE | KV),
    ("mixtral", MOE | KV | {"sliding_window": 16, "num_experts_per_tok": 1, "tie_word_embeddings": True}),
    ("qwen2", KV | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 4}),
    ("qwen2", KV | {"tie_word_embeddings": True}),
    ("qwen2_moe", QWEN_MOE | KV | {"shared_expert_intermediate_size": 40}),
    ("qwen2_moe", QWEN_MOE | KV | {"shared_expert_intermediate_size": 40, "qkv_bias": False, "decoder_sparse_step": 2}),
    ("qwen2_moe", QWEN_MOE | KV | {"mlp_only_layers": [0, 3], "use_sliding_window": True, "max_window_layers": 4}),
    ("qwen3", KV | {"head_dim": 16, "attention_bias": True}),
    ("qwen3", KV | {"head_dim": 16, "use_sliding_window": True, "layer_types": MIXED}),
    ("qwen3_vl_text", KV | {"head_dim": 16}),
    ("qwen3_vl_moe_text", QWEN_MOE | KV | {"head_dim": 16, "mlp_only_layers": [0]}),
    ("qwen3_moe", QWEN_MOE | KV | {"head_dim": 16}),
    ("qwen3_moe", QWEN_MOE | KV | {"attention_bias": True, "decoder_sparse_step": 3, "mlp_only_layers": [2]}),
    ("gemma", KV | {"head_dim": 16}),
    ("gemma", KV | {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": False}),
    ("gemma2", KV | {"head_dim": 16, "sliding_window": 16}),
    ("gemma2", KV | {"head_dim": 16, "attn_logit_softcapping": None, "layer_types": ["full_attention"] * 6}),
    ("gemma3_text", KV | {"head_dim": 16, "sliding_window": 16}),
    ("gemma3_text", KV | {"head_dim": 16, "sliding_window_pattern": 3, "attention_bias": True}),
    ("gpt2", GPT2),
    ("gpt2", GPT2 | {"n_inner": 100, "tie_word_embeddings": False, "activation_function": "relu"}),
    ("gpt_neox", {}),
    ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True}),
    ("falcon", {}),
    ("falcon", {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 100}),
    ("falcon", FALCON2 | {"tie_word_embeddings": False}),
    ("phi", KV),
    ("phi", {"tie_word_embeddings": True}),
    ("phi3", KV | {"sliding_window": 16, "pad_token_id": 0}),
    ("phi3", {"tie_word_embeddings": True, "pad_token_id": 0}),
    ("phimoe", MOE | KV),
    ("phimoe", MOE | KV | {"attention_bias": True, "lm_head_bias": True}),
    ("olmo", KV),
    ("olmo", {"attention_bias": True, "tie_word_embeddings": True}),
    ("olmo2", KV),
    ("olmo2", {"attention_bias": True, "tie_word_embeddings": True}),
    ("gpt_oss", MOE | KV | {"head_dim": 16, "sliding_window": 16}),
    ("gpt_oss", MOE | KV | {"head_dim": 16, "attention_bias": False, "layer_types": ["full_attention"] * 6}),
    ("deepseek_v2", DEEPSEEK),
    ("deepseek_v2", DEEPSEEK | {"q_lora_rank": None, "first_k_dense_replace": 0, "n_shared_experts": 2}),
    ("deepseek_v2", DEEPSEEK | {"attention_bias": True}),
    ("deepseek_v3", DEEPSEEK),
    ("deepseek_v3", DEEPSEEK | {"q_lora_rank": None, "first_k_dense_replace": 3, "n_shared_experts": 3}),
    ("deepseek_v3", DEEPSEEK | {"attention_bias": True}),
    ("deepseek_v3", DEEPSEEK | {"first_k_dense_replace": 6, "tie_word_embeddings": True}),
    ("kimi_k2", DEEPSEEK | {"moe_layer_freq": 1, "ep_size": 1}),
    ("starcoder2", KV),
    ("starcoder2", KV | {"use_bias": False, "sliding_window": 16, "tie_word_embeddings": False}),
    ("glm4", KV | {"head_dim": 16, "pad_token_id": 0}),
    ("glm4", KV | {"head_dim": 16, "attention_bias": False, "tie_word_embeddings": True, "pad_token_id": 0}),
    ("glm4_moe", GLM_MOE | KV),
    ("glm4_moe", GLM_MOE | KV | {"use_qk_norm": True, "attention_bias": True, "first_k_dense_replace": 2, "head_dim": 16}),
    ("llama4_text", LLAMA4 | KV),
    ("llama4_text", LLAMA4 | KV | {"interleave_moe_layer_step": 2, "attention_bias": True}),
    ("llama4_text", LLAMA4 | KV | {"moe_layers": [1, 2, 5], "no_rope_layers": [1, 0, 1, 1, 0, 1]}),
    ("minimax", MOE | KV),
    ("minimax", MOE | KV | {"head_dim": 16, "layer_types": (["linear_attention"] * 2 + ["full_attention"]) * 2}),
    ("minimax_m2", MOE | KV | {"head_dim": 16}),
]  # fmt: skip


FALCON_40B = {
    "hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128, "num_kv_heads": 8, "vocab_size": 65_024,
    "new_decoder_architecture": True,
}  # fmt: skip
DEEPSEEK_V2 = {
    "hidden_size": 5120, "intermediate_size": 12_288, "num_hidden_layers": 60, "num_attention_heads": 128,
    "num_key_value_heads": 128, "vocab_size": 102_400, "q_lora_rank": 1536, "n_routed_experts": 160, "n_shared_experts": 2,
    "num_experts_per_tok": 6, "moe_intermediate_size": 1536, "first_k_dense_replace": 1,
}  # fmt: skip
DEEPSEEK_V2_LITE = DEEPSEEK_V2 | {
    "hidden_size": 2048, "intermediate_size": 10_944, "num_hidden_layers": 27, "num_attention_heads": 16,
    "num_key_value_heads": 16, "q_lora_rank": None, "n_routed_experts": 64, "moe_intermediate_size": 1408,
}  # fmt: skip

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")


def sized(*sizes: int, **fields: Any) -> dict[str, Any]:
    return dict(zip(SIZES, sizes, strict=True)) | fields


REAL: dict[str, tuple[str, dict[str, Any], int]] = {
    "Llama-3.2-1B": ("llama", sized(2048, 8192, 16, 32, 8, 128_256, tie_word_embeddings=True), 1_235_814_400),
    "Qwen2.5-72B": ("qwen2", sized(8192, 29_568, 80, 64, 8, 152_064), 72_706_203_648),
    "Qwen3-8B": ("qwen3", sized(4096, 12_288, 36, 32, 8, 151_936, head_dim=128), 8_190_735_360),
    "Mixtral-8x22B": ("mixtral", sized(6144, 16_384, 56, 48, 8, 32_768), 140_630_071_296),
    "gemma-2-9b": ("gemma2", sized(3584, 14_336, 42, 16, 8, 256_000), 9_241_705_984),
    "gemma-2-27b": ("gemma2", sized(4608, 36_864, 46, 32, 16, 256_000, head_dim=128), 27_227_128_320),
    "gemma-3-27b": ("gemma3_text", sized(5376, 21_504, 62, 32, 16, 262_208, head_dim=128), 27_009_346_304),
    "pythia-12b": ("gpt_neox", sized(5120, 20_480, 36, 40, 40, 50_688), 11_846_072_320),
    "falcon-40b": ("falcon", FALCON_40B, 41_303_293_952),
    "Phi-3-medium": ("phi3", sized(5120, 17_920, 40, 40, 10, 32_064), 13_960_238_080),
    "OLMo-2-13B": ("olmo2", sized(5120, 13_824, 40, 40, 40, 100_352), 13_716_198_400),
    "OLMo-2-32B": ("olmo2", sized(5120, 27_648, 64, 40, 8, 100_352), 32_234_279_936),
    "DeepSeek-V2": ("deepseek_v2", DEEPSEEK_V2, 235_741_434_880),
    "DeepSeek-V2-Lite": ("deepseek_v2", DEEPSEEK_V2_LITE, 15_706_484_224),
}
"""Published models, and their counts."""


# ---- what transformers builds --------------------------------------------------------------------------------------


def configuration(family: str, **fields: Any) -> Any:
    return transformers.AutoConfig.for_model(ONLY_HERE.get(family, family), **fields)


def built(config: Any) -> Any:
    """The network on the meta device: shapes without memory."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def counts(network: Any, top_k: int) -> tuple[int, dict[int, int], int]:
    """Total parameters (tied once), those of each layer, and active ones: less the routed experts not visited."""
    total, idle, layers = 0, 0, Counter[int]()
    for name, p in network.named_parameters():
        total += p.numel()
        if found := re.search(r"(?:layers|\.h)\.(\d+)\.", name):
            layers[int(found[1])] += p.numel()
        if ".experts." in name:  # tensors of all experts: the first dimension counts them
            idle += p.numel() // p.shape[0] * (p.shape[0] - top_k)
    return total, dict(layers), total - idle


def ours(folder: Path, data: dict[str, Any]) -> Model:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(data, indent=2))
    return load_model(str(folder / "config.json"))[0]


def ours_by_layer(model: Model) -> dict[int, int]:
    each = [model.layer_params_of(g) for g in model.layers for _ in range(g.count)]
    return {i: n for i, n in enumerate(each) if n}


def assert_equal(model: Model, network: Any) -> None:
    top_k = max([1, *(g.mlp.top_k for g in model.layers)])
    total, layers, active = counts(network, top_k)
    assert ours_by_layer(model) == layers
    assert (model.total_params, model.active_params) == (total, active)


def stated(family: str, config: Any) -> dict[str, Any]:
    """The file that a user has."""
    data: dict[str, Any] = json.loads(config.to_json_string())
    return data | {"model_type": family} if family in ONLY_HERE else data


# ---- counts --------------------------------------------------------------------------------------------------------


def test_every_family_has_a_variant_and_a_class():
    assert {family for family, _ in VARIANTS} == set(FAMILIES) == set(PUBLISHED) | set(ONLY_HERE)


@pytest.mark.parametrize("family", PUBLISHED)
def test_default_class(family: str, tmp_path: Path):
    config = configuration(family, **({"num_experts_per_tok": 6} if family == "deepseek_v2" else {}))
    model, network = ours(tmp_path, stated(family, config)), built(config)
    assert_equal(model, network)
    assert PUBLISHED[family] in (None, model.total_params)


@pytest.mark.parametrize("name", REAL)
def test_published_size(name: str, tmp_path: Path):
    family, fields, published = REAL[name]
    config = configuration(family, **fields)
    model = ours(tmp_path, stated(family, config))
    assert_equal(model, built(config))
    assert model.total_params == published


def test_an_encoder_before_the_language_model():
    """Qwen2.5-VL-72B, with its vision tower."""
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3456, "num_heads": 16, "out_hidden_size": 8192}
    text = sized(8192, 29_568, 80, 64, 8, 152_064)
    config = configuration("qwen2_5_vl", vision_config=vision, text_config=text, tie_word_embeddings=False)
    with torch.device("meta"):
        network = transformers.AutoModelForImageTextToText.from_config(config)
    sizes = {name: p.numel() for name, p in network.named_parameters()}
    model = load_model("vit-llm-72b")[0]
    encoder = [g for g in model.layers if g.front]
    inside = sum(g.count * model.layer_params_of(g) for g in encoder)
    assert inside == sum(n for name, n in sizes.items() if "visual.blocks" in name)
    assert inside + model.front_params == sum(n for name, n in sizes.items() if "visual" in name)
    assert model.total_params == sum(sizes.values())


@pytest.mark.parametrize(("family", "fields"), VARIANTS, ids=lambda v: v if isinstance(v, str) else "")
def test_variant(family: str, fields: dict[str, Any], tmp_path: Path):
    config = configuration(family, **(({} if family == "gpt2" else SMALL) | fields))
    assert_equal(ours(tmp_path, stated(family, config)), built(config))


@pytest.mark.parametrize(("family", "fields"), VARIANTS, ids=lambda v: v if isinstance(v, str) else "")
def test_our_file_is_the_same_model(family: str, fields: dict[str, Any], tmp_path: Path):
    config = configuration(family, **(({} if family == "gpt2" else SMALL) | fields))
    model = ours(tmp_path / "imported", stated(family, config))
    path = tmp_path / "ours.yaml"
    path.write_text(to_yaml(model.model_dump(mode="json", exclude_none=True, exclude_defaults=True)))
    assert load_model(str(path))[0] == model


def test_dense_layers_between_experts(tmp_path: Path):
    """Published deepseek code routes every `moe_layer_freq`-th layer; the class in transformers does not read it."""
    config = configuration("deepseek_v3", **SMALL | DEEPSEEK | {"first_k_dense_replace": 1})
    _, each, _ = counts(built(config), 2)
    model = ours(tmp_path, stated("deepseek_v3", config) | {"moe_layer_freq": 2})
    assert ours_by_layer(model) == {i: each[1] if i in (2, 4) else each[0] for i in range(6)}
    assert [g.count for g in model.layers] == [2, 1, 1, 1, 1]


# ---- what layers are -----------------------------------------------------------------------------------------------


def kinds(model: Model) -> list[str]:
    """Attention of every layer: f full, s sliding, c in chunks, l linear; n without positions."""
    letters = []
    for g in model.layers:
        a = g.attention
        letter = "l" if a.kind == "linear" else "s" if a.sliding_window else "c" if a.chunk else "f"
        letters += [letter + ("" if a.rope_share else "n")] * g.count
    return letters


PATTERNS: list[tuple[str, dict[str, Any], str]] = [
    ("mistral", KV | {"sliding_window": 16}, "s s s s s s"),
    ("mistral", KV | {"sliding_window": None}, "f f f f f f"),
    ("qwen2", KV | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 4}, "f f f f s s"),
    ("qwen2", KV | {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 4}, "f f f f f f"),
    ("qwen2_moe", QWEN_MOE | KV | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 4}, "s f s f f f"),
    ("gemma2", {}, "s f s f s f"),
    ("gemma3_text", {}, "s s s s s f"),
    ("gemma3_text", {"sliding_window_pattern": 2}, "s f s f s f"),
    ("gpt_oss", MOE, "s f s f s f"),
    ("llama4_text", LLAMA4, "c c c fn c c"),
    ("llama4_text", LLAMA4 | {"no_rope_layers": [0, 1, 1, 0, 1, 1]}, "fn c c fn c c"),
    ("minimax", MOE, "f ln f ln f ln"),
]


@pytest.mark.parametrize(("family", "fields", "expected"), PATTERNS)
def test_layer_types_old_and_new(family: str, fields: dict[str, Any], expected: str, tmp_path: Path):
    data = stated(family, configuration(family, **SMALL | fields))
    assert kinds(ours(tmp_path / "new", data)) == expected.split()
    data.pop("layer_types", None)  # files before version 5 of transformers
    assert kinds(ours(tmp_path / "old", data)) == expected.split()


def test_both_spellings_of_positions(tmp_path: Path):
    old = SMALL | {"model_type": "glm4", "partial_rotary_factor": 0.25, "rope_theta": 5e5, "torch_dtype": "bfloat16"}
    new = SMALL | {
        "model_type": "glm4",
        "rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 5e5},
        "dtype": "bfloat16",
    }
    both = [ours(tmp_path / "m", data) for data in (old, new)]
    assert both[0] == both[1]
    assert (both[0].rope_theta, both[0].layer.attention.rope_share) == (5e5, 0.25)


def test_multi_token_modules_are_not_part_of_the_total(tmp_path: Path):
    base = SMALL | DEEPSEEK | {"model_type": "deepseek_v3"}
    without, with_one = (ours(tmp_path / "m", base | {"num_nextn_predict_layers": n}) for n in (0, 1))
    assert (without.mtp, with_one.mtp) == (0, 1)
    assert with_one.total_params == without.total_params
    # a layer, the projection of 2 h to h, three norms (DeepSeek-V3, section 2.2)
    assert with_one.mtp_params == with_one.layer_params_of(with_one.layers[-1]) + 2 * 64 * 64 + 3 * 64


def test_the_language_model_of_a_nested_file(tmp_path: Path):
    text = {
        "hidden_size": 64,
        "num_hidden_layers": 7,
        "intermediate_size": 96,
        "model_type": "gemma3_text",
        "sliding_window": 8,
    }
    nested = ours(tmp_path / "m", {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 8}})
    alone = ours(tmp_path / "m", text)
    assert nested.model_copy(update={"source": ""}) == alone.model_copy(update={"source": ""})
    assert "without the vision tower" in nested.source
    assert nested.vocab == 262_208  # published files leave it out
    assert nested.tied_embeddings


def test_how_weights_are_stored_is_said_and_ignored(tmp_path: Path):
    base = SMALL | DEEPSEEK | {"model_type": "deepseek_v3"}
    plain, stored = (ours(tmp_path / "m", base | extra) for extra in ({}, {"quantization_config": {"quant_method": "fp8"}}))
    assert stored.total_params == plain.total_params
    assert "stored as fp8" in stored.source


# ---- refusals ------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"num_local_experts": 8}, "num_local_experts"),
    ("llama", {"sliding_window": 16}, "sliding_window"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"layer_types": ["sliding_attention"] * 6}, "layer_types"),
    ("llama", {"hidden_act": "xielu"}, "xielu"),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ("llama", {"num_key_value_heads": 2.0}, "num_key_value_heads"),
    ("mixtral", MOE | {"num_experts": 16}, "disagree"),
    ("mixtral", MOE | {"num_local_experts": 1}, "1 expert"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma2", {"layer_types": ["sliding_attention"] * 5}, "layer_types"),
    ("gemma2", {"layer_types": ["sliding_attention"] * 6, "sliding_window": None}, "without a length"),
    ("gpt2", GPT2 | {"add_cross_attention": True}, "add_cross_attention"),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "parallel_attn": False}, "parallel_attn"),
    ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn"),
    ("phi", {"qk_layernorm": True}, "qk_layernorm"),
    ("olmo", {"clip_qkv": 8.0}, "clip_qkv"),
    ("deepseek_v2", DEEPSEEK | {"mlp_bias": True}, "mlp_bias"),
    ("deepseek_v3", DEEPSEEK | {"index_topk": 2048}, "index_topk"),
    ("minimax_m2", MOE | {"use_qk_norm": False}, "use_qk_norm"),
    ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ("llama", {"rope_parameters": [1]}, "rope_parameters"),
    ("minimax_m2", MOE | {"use_mtp": True, "mtp_transformer_layers": 2}, "mtp_transformer_layers"),
]


@pytest.mark.parametrize(("family", "fields", "named"), REFUSED)
def test_another_network_is_refused(family: str, fields: dict[str, Any], named: str, tmp_path: Path):
    with pytest.raises(InputError) as caught:
        ours(tmp_path, SMALL | fields | {"model_type": family})
    [problem] = caught.value.problems
    assert problem.code == "PLN112"
    assert named in problem.what + problem.why
    assert problem.why
    assert problem.fix
    assert problem.location.file.endswith("config.json")


def test_an_unknown_family_says_what_llama_lacks(tmp_path: Path):
    with pytest.raises(InputError, match="read as llama it lacks vocab_size") as caught:
        ours(tmp_path, {k: v for k, v in SMALL.items() if k != "vocab_size"} | {"model_type": "mamba2"})
    assert "--as llama" in caught.value.problems[0].fix


# ---- slow: every field left out, and published files --------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_fields_left_out_are_what_the_class_says(family: str, tmp_path: Path):
    """Each key alone removed from the file: refused, or counted as the class builds it."""
    fields = next(fields for name, fields in VARIANTS if name == family)
    full = stated(family, configuration(family, **(({} if family == "gpt2" else SMALL) | fields)))
    for key in set(full) - {"model_type", "pad_token_id"}:  # some default paddings are outside of a small vocabulary
        data = {k: v for k, v in full.items() if k != key}
        try:
            model = ours(tmp_path, data)
        except InputError:
            continue
        known = {k: v for k, v in data.items() if k != "model_type"}
        assert_equal(model, built(configuration(family, **known)))
