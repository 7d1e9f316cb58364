"""Every published `config.json` that aiconfigurator-core carries: counted as transformers builds it, or refused by name."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

from planner.errors import InputError
from planner.specs.files import load_model
from planner.specs.model import Model

os.environ["HF_HUB_OFFLINE"] = "1"
FOUND = importlib.util.find_spec("aiconfigurator_core")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FOUND is None, reason="aiconfigurator-core is not installed: pip install '.[corpus]'"),
]
FOLDER = Path(str(FOUND.origin)).parent / "model_configs" if FOUND else Path("absent")
FILES = sorted(p for p in FOLDER.glob("*_config.json") if not p.name.endswith("_hf_quant_config.json"))

REFUSED = {
    "deepseek_ref", "deepseek_v32", "deepseek_v4", "gemma4", "glm_moe_dsa", "kimi_k3", "mimo", "mimo_v2_flash", "minimax_m3",
    "minimax_m3_vl", "nemotron-nas", "nemotron_h", "qwen3_5", "qwen3_5_moe", "step3p7",
}  # fmt: skip
"""Families with parts that the spec has no words for: sparse attention by an index, state spaces, delta rules, layers that
differ one by one, layers of one sublayer."""

IMPORTED = {
    "deepseek_v3", "gpt_oss", "kimi_k2", "kimi_k25", "llama", "llama4", "minimax_m2", "mixtral", "qwen3", "qwen3_moe",
    "qwen3_vl", "qwen3_vl_moe",
}  # fmt: skip

PUBLISHED = {
    "deepseek-ai--DeepSeek-V3": (671_026_404_352, 37_552_282_624),
    "meta-llama--Llama-4-Maverick-17B-128E-Instruct": (400_711_848_960, 17_184_691_200),
    "meta-llama--Meta-Llama-3.1-405B": (405_853_388_800, 405_853_388_800),
    "mistralai--Mixtral-8x7B-v0.1": (46_702_792_704, 12_879_925_248),
    "mistralai--Mixtral-8x22B-v0.1": (140_620_634_112, 39_152_031_744),
    "openai--gpt-oss-20b": (20_914_757_184, None),
    "openai--gpt-oss-120b": (116_829_156_672, None),
    "Qwen--Qwen3-30B-A3B": (30_532_122_624, None),
    "Qwen--Qwen3-Coder-480B-A35B-Instruct": (480_154_875_392, None),
}
"""Counts that are known from elsewhere."""


def family_of(data: dict[str, Any]) -> str:
    return str(data["model_type"])


def numbers_of(data: dict[str, Any]) -> tuple[int, int]:
    """Total and active parameters that transformers builds for a file's language model."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    family, nested = family_of(data), "text_config" in data
    if family == "kimi_k25":  # no class: its text is a deepseek_v3 with other sizes
        data, nested = data["text_config"], False
    drop = ("model_type", "quantization_config", "auto_map", "architectures")
    fields = {k: v for k, v in data.items() if k not in drop}
    family = "deepseek_v3" if family.startswith("kimi") else family
    config = transformers.AutoConfig.for_model(family, **fields)
    kind = transformers.AutoModelForImageTextToText if nested else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        network = kind.from_config(config)
    total = idle = 0
    text = config.get_text_config()
    for name, p in network.named_parameters():
        if "visual" in name or "vision" in name or "multi_modal_projector" in name:
            continue
        total += p.numel()
        if ".experts." in name:
            idle += p.numel() // p.shape[0] * (p.shape[0] - text.num_experts_per_tok)
    return total, total - idle


SHIPPED = {
    "mixtral-8x7b": "mistralai--Mixtral-8x7B-v0.1",
    "qwen3-8b": "Qwen--Qwen3-8B",
    "qwen3-30b-a3b": "Qwen--Qwen3-30B-A3B",
    "qwen3-235b-a22b": "Qwen--Qwen3-235B-A22B",
    "gpt-oss-120b": "openai--gpt-oss-120b",
    "llama4-maverick": "meta-llama--Llama-4-Maverick-17B-128E-Instruct",
    "deepseek-v3": "deepseek-ai--DeepSeek-V3",
}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_is_the_published_one(name: str) -> None:
    ours, theirs = (load_model(m)[0] for m in (name, str(FOLDER / f"{SHIPPED[name]}_config.json")))
    assert plain(ours) == plain(theirs)


def plain(model: Model) -> Model:
    """Without its name, and head widths written out."""
    groups = []
    for g in model.layers:
        attention = g.attention.model_copy(update={"head_dim": model.head_dim_of(g)})
        groups.append(g.model_copy(update={"attention": attention}))
    return model.model_copy(update={"name": "", "source": "", "layers": groups})


def test_no_file_is_lost() -> None:
    families = {family_of(json.loads(p.read_text())) for p in FILES}
    assert families == IMPORTED | REFUSED


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name.removesuffix("_config.json"))
def test_published_file(path: Path) -> None:
    data = json.loads(path.read_text())
    if family_of(data) in REFUSED:
        with pytest.raises(InputError) as caught:
            load_model(str(path))
        [problem] = caught.value.problems
        assert problem.code == "PLN111"
        assert family_of(data) in problem.what
        assert problem.location.line > 0
        return
    model: Model = load_model(str(path))[0]
    assert (model.total_params, model.active_params) == numbers_of(data)
    known = PUBLISHED.get(path.name.removesuffix("_config.json"), (model.total_params, None))
    assert known in ((model.total_params, model.active_params), (model.total_params, None))
