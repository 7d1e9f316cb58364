"""Shipped models and Hugging Face configurations: exact parameter counts, and errors that name the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planner.cli.common import to_yaml
from planner.errors import InputError, Problem
from planner.specs import files
from planner.specs.files import load_model, shipped

SHIPPED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "qwen3-8b": 8_190_735_360,
    "gemma3-27b": 27_009_346_304,
    "olmo2-32b": 32_234_279_936,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "gpt-oss-120b": 116_829_156_672,
    "llama4-maverick": 400_711_848_960,
    "deepseek-v3": 671_026_404_352,
    "vit-llm-72b": 73_410_777_344,
    # layers (12 h^2 + 13 h) + (vocab + positions) h + 2 h, with tied embeddings
    "gpt3-175b": 96 * (12 * 12288**2 + 13 * 12288) + (51200 + 2048) * 12288 + 2 * 12288,
    "megatron-1t": 128 * (12 * 25600**2 + 13 * 25600) + (51200 + 2048) * 25600 + 2 * 25600,
    "turing-530b": 105 * (12 * 20480**2 + 13 * 20480) + (51200 + 2048) * 20480 + 2 * 20480,
    # 2 V h + layers (2 h q + 2 h kv + 3 h f + 2 h) + h
    "tiny": 2 * 2048 * 256 + 8 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 704 + 2 * 256) + 256,
}

ACTIVE = {
    "mixtral-8x7b": 12_879_925_248,
    "qwen3-30b-a3b": 3_353_032_704,
    "qwen3-235b-a22b": 22_190_763_520,
    "gpt-oss-120b": 5_711_982_912,
    "llama4-maverick": 17_184_691_200,
    "deepseek-v3": 37_552_282_624,
}

GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
GPT2_XL = GPT2 | {"n_embd": 1600, "n_layer": 48, "n_head": 25}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
MISTRAL = LLAMA | {
    "model_type": "mistral",
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}
QWEN2_7B = LLAMA | {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "sliding_window": 131072,
    "use_sliding_window": False,
}
QWEN3_8B = LLAMA | {
    "model_type": "qwen3",
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
QWEN2_TIED = QWEN2_7B | {  # Qwen2-0.5B
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}

HUGGING_FACE = {
    "gpt2": (GPT2, 124_439_808),
    "gpt2-xl": (GPT2_XL, 1_557_611_200),
    "llama-2-7b": (LLAMA, 6_738_415_616),
    "mistral-7b": (MISTRAL, 7_241_732_096),
    "qwen2-7b": (QWEN2_7B, 7_615_616_512),
    "qwen2-0.5b": (QWEN2_TIED, 494_032_768),
    "qwen3-8b": (QWEN3_8B, 8_190_735_360),
}

TINY = """\
name: mine
hidden: 256
vocab: 2048
layers:
  - count: 2
    attention:
      heads: 8
      kv_heads: 4
    mlp:
      kind: gated
      width: 704
"""


def write_config(folder: Path, config: dict[str, Any]) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(config, indent=2))
    return str(path)


def model_problem(path: Path | str) -> Problem:
    """The only problem of a model file."""
    with pytest.raises(InputError) as caught:
        load_model(str(path))
    assert len(caught.value.problems) == 1, str(caught.value)
    return caught.value.problems[0]


def yaml_problem(tmp_path: Path, old: str, new: str) -> Problem:
    """The only problem of the tiny model above with `old` replaced."""
    assert TINY.count(old) == 1
    path = tmp_path / "model.yaml"
    path.write_text(TINY.replace(old, new))
    problem = model_problem(path)
    assert problem.location.file == str(path)
    return problem


# ---- counts --------------------------------------------------------------------------------------------------------


def test_every_shipped_model_has_a_count_here():
    assert set(shipped("models")) == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_count_is_exact(name: str):
    model, _ = load_model(name)
    assert model.name == name
    assert model.total_params == SHIPPED[name]
    assert model.active_params == ACTIVE.get(name, model.total_params)
    assert model.source
    text = (files.data_folder("models") / f"{name}.yaml").read_text()
    if name in ACTIVE:
        assert f"{model.total_params:,} parameters, {model.active_params:,} active" in text.splitlines()[0]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_survives_the_trip_through_yaml(name: str, tmp_path: Path):
    model, _ = load_model(name)
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(model.model_dump(mode="json", exclude_none=True, exclude_defaults=True)))
    assert load_model(str(path))[0] == model


def test_full_recompute_is_narayanan():
    """Narayanan et al. 2021, arXiv 2104.04473, equation 3: 96 l h^2 (1 + s / 6 h + V / 16 l h) FLOPs a token."""
    model, _ = load_model("gpt3-175b")
    layers, h, s, v = 96, 12288, 2048, 51200
    expected = 96 * layers * h**2 * (1 + s / (6 * h) + v / (16 * layers * h))
    assert model.flops_per_token(s, "recompute") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["llama3-8b", "deepseek-v3", "gemma3-27b", "vit-llm-72b"])
def test_recompute_adds_one_forward_pass_of_the_layers(name: str):
    """The whole without the embedding-sized head, projections of multi-token modules, patches and projectors, once more."""
    model, _ = load_model(name)
    full, again = (model.flops_per_token(8192, c) for c in ("full", "recompute"))
    outside = 6 * model.vocab * model.hidden * (1 + model.mtp) + model.mtp * 12 * model.hidden**2
    for front in model.fronts:
        products = sum(n * m for n, m in front.projector_shapes(model.hidden)) / front.merge + front.hidden * front.patch
        outside += 6 * products * front.tokens / 8192
    assert again - full == pytest.approx((full - outside) / 3)


def test_the_gpt_papers_round_to_these_counts():
    assert load_model("megatron-1t")[0].total_params == pytest.approx(1008e9, rel=1e-3)  # Narayanan 2021, table 1
    assert load_model("gpt3-175b")[0].total_params == pytest.approx(174.6e9, rel=1e-3)
    assert load_model("turing-530b")[0].total_params == pytest.approx(530e9, rel=1e-3)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_count_is_exact(name: str, tmp_path: Path):
    config, count = HUGGING_FACE[name]
    model, document = load_model(write_config(tmp_path / name, config))
    assert model.total_params == count
    assert model.name == name  # from the folder, since every file is called config.json
    assert document.path.endswith("config.json")


def test_the_same_network_from_both_formats(tmp_path: Path):
    ours, _ = load_model("llama2-7b")
    theirs, _ = load_model(write_config(tmp_path / "llama2-7b", LLAMA))
    assert ours.model_copy(update={"source": ""}) == theirs.model_copy(update={"source": "", "layers": [ours.layers[0]]})
    assert (theirs.heads, theirs.kv_heads, theirs.head_dim, theirs.mlp_width) == (32, 32, 128, 11008)


def test_windows_that_the_configuration_turns_off_are_ignored(tmp_path: Path):
    qwen, _ = load_model(write_config(tmp_path / "qwen", QWEN2_7B))
    mistral, _ = load_model(write_config(tmp_path / "mistral", MISTRAL))
    assert qwen.layer.attention.sliding_window is None
    assert mistral.layer.attention.sliding_window == 4096


def test_a_known_family_under_another_name(tmp_path: Path):
    path = write_config(tmp_path / "renamed", LLAMA | {"model_type": "yi"})
    assert load_model(path, as_type="llama")[0].total_params == SHIPPED["llama2-7b"]


def test_a_path_relative_to_the_file_that_names_it(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(TINY)
    assert load_model("mine.yaml", relative_to=tmp_path)[0].hidden == 256


# ---- errors in configurations --------------------------------------------------------------------------------------


def test_unknown_model_type_is_refused(tmp_path: Path):
    path = write_config(tmp_path / "odd", LLAMA | {"model_type": "mamba"})
    problem = model_problem(path)
    assert (problem.code, problem.location.line) == ("PLN111", 5)
    assert "mamba" in problem.what
    assert "every field that llama needs" in problem.why
    assert "llama" in problem.fix


def test_missing_fields_are_named(tmp_path: Path):
    config = {k: v for k, v in LLAMA.items() if k not in ("hidden_size", "vocab_size")}
    problem = model_problem(write_config(tmp_path / "odd", config))
    assert (problem.code, problem.location.line) == ("PLN112", 1)
    assert "hidden_size" in problem.what
    assert "vocab_size" in problem.what


def test_configuration_heads_must_be_divisible(tmp_path: Path):
    problem = model_problem(write_config(tmp_path / "odd", LLAMA | {"num_key_value_heads": 5}))
    assert (problem.code, problem.location.line) == ("PLN108", 1)
    assert "heads 32 is not divisible by kv_heads 5" in problem.what


def test_broken_json_names_the_line(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text('{\n  "model_type": "llama",\n  "hidden_size": \n}\n')
    problem = model_problem(path)
    assert (problem.code, problem.location.line) == ("PLN102", 4)


def test_duplicate_json_key(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text('{\n  "model_type": "llama",\n  "model_type": "gpt2"\n}\n')
    problem = model_problem(path)
    assert problem.code == "PLN102"
    assert "model_type" in problem.what


# ---- errors in our own format --------------------------------------------------------------------------------------


def test_unknown_key_suggests_the_nearest(tmp_path: Path):
    problem = yaml_problem(tmp_path, "kv_heads: 4", "kv_head: 4")
    assert (problem.code, problem.location.line, problem.location.col) == ("PLN104", 8, 7)
    assert "'kv_heads'" in problem.fix


def test_duplicate_yaml_key(tmp_path: Path):
    problem = yaml_problem(tmp_path, "vocab: 2048", "vocab: 2048\nhidden: 512")
    assert (problem.code, problem.location.line) == ("PLN102", 4)
    assert "twice" in problem.what


def test_wrong_type(tmp_path: Path):
    problem = yaml_problem(tmp_path, "hidden: 256", 'hidden: "256"')
    assert (problem.code, problem.location.line) == ("PLN106", 2)


def test_a_fraction_is_not_a_size(tmp_path: Path):
    problem = yaml_problem(tmp_path, "width: 704", "width: 704.0")
    assert (problem.code, problem.location.line) == ("PLN106", 11)


def test_negative_size(tmp_path: Path):
    problem = yaml_problem(tmp_path, "hidden: 256", "hidden: -256")
    assert (problem.code, problem.location.line) == ("PLN107", 2)
    assert "-256" in problem.what


def test_not_a_choice_suggests_the_nearest(tmp_path: Path):
    problem = yaml_problem(tmp_path, "kind: gated", "kind: gatd")
    assert (problem.code, problem.location.line) == ("PLN106", 10)
    assert "gated" in problem.fix


def test_missing_key_points_at_its_mapping(tmp_path: Path):
    problem = yaml_problem(tmp_path, "      width: 704\n", "")
    assert (problem.code, problem.location.line) == ("PLN105", 9)
    assert "width" in problem.fix


def test_heads_must_divide(tmp_path: Path):
    problem = yaml_problem(tmp_path, "heads: 8\n      kv_heads: 4", "heads: 7")
    assert problem.code == "PLN108"
    assert problem.location.line == 1
    assert "hidden 256 is not divisible by heads 7" in problem.what


def test_learned_positions_need_their_number(tmp_path: Path):
    problem = yaml_problem(tmp_path, "vocab: 2048", "vocab: 2048\npositions: learned")
    assert problem.code == "PLN108"
    assert "max_positions" in problem.what


def test_every_problem_is_reported_at_once(tmp_path: Path):
    path = tmp_path / "model.yaml"
    path.write_text(TINY.replace("hidden: 256", "hidden: -256").replace("heads: 8", "heads: x"))
    with pytest.raises(InputError) as caught:
        load_model(str(path))
    assert {p.location.line for p in caught.value.problems} == {2, 7}


def test_unknown_name_suggests_shipped_ones():
    problem = model_problem("llama3-8")
    assert problem.code == "PLN110"
    assert "llama3-8b" in problem.fix


def test_no_such_file(tmp_path: Path):
    assert model_problem(tmp_path / "absent.yaml").code == "PLN101"
