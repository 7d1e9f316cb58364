"""Weights of the llama family: what transformers computes with them is what the runtime computes, in and out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import plans
import pytest
import torch
from launching import HERE, launch

from planner.errors import InputError
from planner.runtime import weights
from planner.runtime.mesh import start_processes
from planner.runtime.train import Trainer
from planner.specs import files

transformers = pytest.importorskip("transformers")
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {}, "Qwen2": {}, "Qwen3": {"tie_word_embeddings": True}, "Mistral": {"sliding_window": None},
}  # fmt: skip


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process group of this process only, one a test run."""
    if not torch.distributed.is_initialized():
        monkeypatch.setenv("MASTER_PORT", str(29000 + os.getpid() % 900))
    start_processes(plans.plan())


def source(folder: Path, kind: str) -> Any:
    """A model of transformers with random weights, and its folder."""
    config = getattr(transformers, f"{kind}Config")(**SIZES, **KINDS[kind])
    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, value in made.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                value.add_(torch.randn_like(value) * 0.1)  # ones and zeros would hide a mix-up
    made.save_pretrained(folder)
    return made.eval()


def logits(trainer: Trainer, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        (part,) = trainer.parts.values()
        found: torch.Tensor = part(tokens)
    return found


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kind", ["Llama", "Qwen3", *(pytest.param(k, marks=pytest.mark.slow) for k in ("Qwen2", "Mistral"))])
def test_weights_go_in_and_out(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = source(tmp_path / "in", kind)
    model, _ = files.load_model(str(tmp_path / "in" / "config.json"))
    trainer = Trainer(plans.plan(model), torch.device("cpu"))
    weights.load(trainer, tmp_path / "in")
    tokens = torch.randint(0, 64, (2, 16))
    torch.testing.assert_close(logits(trainer, tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-5)

    monkeypatch.setattr(weights, "FILE_BYTES", 20_000)
    weights.export(trainer, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(again) is type(theirs) or kind == "Mistral"
    torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("alone")
def test_other_models_are_refused(tmp_path: Path) -> None:
    source(tmp_path / "in", "Llama")
    with pytest.raises(InputError, match=r"another model than the plan's[\s\S]*in the plan"):
        weights.check_source(plans.llama(), tmp_path / "in")
    model, _ = files.load_model(str(tmp_path / "in" / "config.json"))
    path = tmp_path / "in" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}))
    with pytest.raises(InputError, match="rotary positions are scaled"):
        weights.check_source(model, tmp_path / "in")
    path.write_text(json.dumps({**config, "model_type": "gpt_neox"}))
    with pytest.raises(InputError, match="model_type gpt_neox"):
        weights.check_source(model, tmp_path / "in")
    path.write_text(json.dumps(config))
    (tmp_path / "in" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot read the safetensors"):
        weights.load(Trainer(plans.plan(model), torch.device("cpu")), tmp_path / "in")
    with pytest.raises(InputError, match="PLN622"):
        weights.check_target(model, tmp_path / "in")
    with pytest.raises(InputError, match="not of the llama family"):
        weights.check_target(plans.gpt(), tmp_path / "new")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_layout_writes_what_it_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    source(tmp_path / "source", "Llama")
    done = launch([str(HERE / "exporting.py"), str(tmp_path)], 800)
    assert done.returncode == 0, done.stderr[-3000:]
    wanted = load_file(tmp_path / "source" / "model.safetensors")
    for name in ("tp2", "dp2-zero3", "pp2"):
        found = {k: v for p in (tmp_path / name).glob("*.safetensors") for k, v in load_file(p).items()}
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[k], wanted[k]) for k in wanted), name
