"""Weights as Hugging Face keeps them: safetensors of the llama family (llama, mistral, qwen2, qwen3), in and out.

Both sides rotate halves of each head, so that no row is permuted; only names differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from planner.errors import InputError, MissingPartError, Problem, input_error
from planner.runtime import masters
from planner.runtime.model import assign
from planner.specs import files
from planner.specs.features import features
from planner.specs.model import Model

if TYPE_CHECKING:
    from planner.runtime.train import Trainer

FAMILY = ("llama", "mistral", "qwen2", "qwen3")
"""Values of `model_type` whose modules and names are the ones below."""
TOP = {"tok.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attn.wq": "self_attn.q_proj",
    "attn.wk": "self_attn.k_proj",
    "attn.wv": "self_attn.v_proj",
    "attn.wo": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w3": "mlp.up_proj",
    "mlp.w2": "mlp.down_proj",
}
FILE_BYTES = 5 * 10**9
"""Most bytes of an exported file."""
INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"


def theirs(name: str) -> str:
    """Hugging Face's name of one of our parameters."""
    if name in TOP:
        return TOP[name]
    found = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if found is None or found[2] not in IN_LAYER:
        raise KeyError(name)
    return f"model.layers.{found[1]}.{IN_LAYER[found[2]]}.{found[3]}"


def check(model: Model, flag: str) -> None:
    """Raise InputError for a model that is not of the family; MissingPartError without safetensors."""
    try:
        import safetensors  # noqa: F401
    except ImportError:
        problem = Problem("PLN620", "safetensors is not installed", f"{flag} needs it", "pip install 'planner[runtime]'")
        raise MissingPartError(problem) from None
    mlp = model.layer.mlp
    reasons = {
        "layernorm": model.norm != "rmsnorm",
        f"{model.positions} positions": model.positions != "rotary",
        "an MLP without gate": mlp.kind != "gated",
        "biases in the MLP": bool(mlp.bias),
        **dict.fromkeys(features(model), True),
    }
    found = [why for why, holds in reasons.items() if holds]
    if found:
        why = f"it has {', '.join(found)}"
        raise input_error("PLN620", f"{model.name} is not of the llama family", why, f"leave {flag} out")


# ---- in ----------------------------------------------------------------------------------------------------------


def load(trainer: Trainer, folder: Path) -> None:
    """Give the trainer the weights of a folder, one tensor at a time. Raises InputError when they are another model's."""
    check_source(trainer.plan.model, folder)
    from safetensors import safe_open

    where = _file_of_each(folder)
    named = trainer.named_parameters()
    missing = [theirs(name) for name, _ in named if theirs(name) not in where]
    if missing:
        why = f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''} are not in its safetensors"
        raise input_error("PLN621", f"{folder} lacks {len(missing)} tensors of the model", why, "give the whole model")
    opened: dict[Path, Any] = {}
    with torch.no_grad(), ExitStack() as files_open:
        for name, param in named:
            path = where[theirs(name)]
            if path not in opened:
                opened[path] = files_open.enter_context(safe_open(path, framework="pt"))
            _assign(name, param, opened[path].get_tensor(theirs(name)), path)


def _assign(name: str, param: Tensor, value: Tensor, path: Path) -> None:
    """Copy this rank's part of a whole tensor."""
    if value.shape != param.shape:
        why = f"{theirs(name)} is {list(value.shape)} there and {list(param.shape)} in the plan's model"
        raise input_error("PLN621", f"{path} is of another model", why, "plan for the model of these weights")
    assign(param, value.to(device=param.device, dtype=masters.values(param).dtype))


def check_source(model: Model, folder: Path) -> None:
    """Raise InputError when a folder's config.json is not that of `model`, or asks for what the runtime does not do."""
    check(model, "--init-from")
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is no JSON"
        raise input_error("PLN621", f"cannot read {path}", why, "give the folder of a Hugging Face model") from None
    if config.get("model_type") not in FAMILY:
        what = f"{path} is of model_type {config.get('model_type')}"
        raise input_error("PLN621", what, f"weights are read of {', '.join(FAMILY)}", "convert them")
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        why = f"its rotary positions are scaled ({kind}); the runtime's are not, and it would be another function"
        raise input_error("PLN621", f"{path} cannot be trained here", why, "use a model without rope_scaling")
    found, _ = files.load_model(str(path))
    ours, other = (m.model_dump(exclude={"name", "source", "max_positions"}) for m in (model, found))
    different = [f"{k} {other[k]} there, {ours[k]} in the plan" for k in ours if ours[k] != other[k]]
    if different:
        raise input_error("PLN621", f"{path} is another model than the plan's", different[0][:300], "plan for that config.json")


def _file_of_each(folder: Path) -> dict[str, Path]:
    """The file of each tensor. Raises InputError."""
    from safetensors import SafetensorError, safe_open

    try:
        if (folder / INDEX).is_file():
            names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            return {name: folder / file for name, file in names.items()}
        with safe_open(folder / SINGLE, framework="pt") as stream:
            return dict.fromkeys(stream.keys(), folder / SINGLE)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        why = f"{type(error).__name__}: {error}"
        fix = f"a model has {SINGLE}, or {INDEX} and its files"
        raise input_error("PLN621", f"cannot read the safetensors of {folder}", why, fix) from None


# ---- out ---------------------------------------------------------------------------------------------------------


def check_target(model: Model, folder: Path) -> None:
    """Raise InputError when weights cannot be exported there: another model's must not be mixed with them."""
    check(model, "--export-hf")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise input_error("PLN622", f"--export-hf {folder} exists and is not empty", "", "give a new folder")


def export(trainer: Trainer, folder: Path) -> None:
    """Write all weights, with a config.json, so that transformers' `from_pretrained` reads them. Collective.

    The first rank of each pipeline rank writes its layers. In bf16 where the job computes in bf16, else fp32. The folder
    must be on a file system that all nodes share; it appears whole.
    """
    from safetensors.torch import save_file

    world, model = trainer.world, trainer.plan.model
    dtype = torch.bfloat16 if trainer.plan.job.precision == "bf16" else torch.float32
    chunks = list(_chunks(trainer, dtype.itemsize))
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, (world.pp_rank, [[theirs(n) for n, _ in chunk] for chunk in chunks]))
    writers = {pp: next(r for r, (p, _) in enumerate(everyone) if p == pp) for pp in range(world.pp)}
    before = sum(len(everyone[writers[pp]][1]) for pp in range(world.pp_rank))
    total = sum(len(everyone[r][1]) for r in writers.values())
    target = folder.with_name(f".{folder.name}.partial")
    if world.rank == 0:
        target.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    for i, chunk in enumerate(chunks):
        whole = {theirs(name): _whole(masters.values(param), dtype) for name, param in chunk}
        if world.rank == writers[world.pp_rank]:
            save_file(whole, target / file_name(before + i, total), metadata={"format": "pt"})
    dist.barrier()
    if world.rank == 0:
        names = [names for pp in range(world.pp) for names in everyone[writers[pp]][1]]
        _finish(target, names, hf_config(model, str(dtype).removeprefix("torch.")), trainer)
        if folder.is_dir():
            folder.rmdir()
        target.rename(folder)
    dist.barrier()


def _chunks(trainer: Trainer, item_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """This pipeline rank's parameters, cut into files."""
    chunk: list[tuple[str, Tensor]] = []
    size = 0
    for name, param in trainer.named_parameters():
        if chunk and size + param.numel() * item_bytes > FILE_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append((name, param))
        size += param.numel() * item_bytes
    yield chunk


def file_name(i: int, total: int) -> str:
    """Name of file `i` of `total`."""
    return SINGLE if total == 1 else f"model-{i + 1:05d}-of-{total:05d}.safetensors"


def _whole(param: Tensor, dtype: torch.dtype) -> Tensor:
    full = param.full_tensor() if isinstance(param, DTensor) else param
    return full.detach().to("cpu", dtype).contiguous()


def _finish(target: Path, names: list[list[str]], config: dict[str, Any], trainer: Trainer) -> None:
    if len(names) > 1:
        weight_map = {n: file_name(i, len(names)) for i, chunk in enumerate(names) for n in chunk}
        size = trainer.plan.model.total_params * (2 if trainer.plan.job.precision == "bf16" else 4)
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2)
        (target / INDEX).write_text(text + "\n", encoding="utf-8")
    (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def hf_config(model: Model, dtype: str) -> dict[str, Any]:
    """A config.json of the model: qwen3 with norms of queries and keys, qwen2 with their biases, else llama."""
    attention = model.layer.attention
    kind = "qwen3" if attention.qk_norm == "head" else "qwen2" if attention.qkv_bias and not attention.out_bias else "llama"
    if kind == "qwen3" and attention.qkv_bias != attention.out_bias:
        raise InputError(
            Problem("PLN620", f"{model.name} has biases of queries only", "no known family has them with q/k norms")
        )
    names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    config = {
        "architectures": [names[kind]],
        "model_type": kind,
        "hidden_size": model.hidden,
        "intermediate_size": model.layer.mlp.width,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_theta,
        "max_position_embeddings": model.max_positions or 4096,
        "tie_word_embeddings": model.tied_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if kind != "qwen2":
        config["attention_bias"] = attention.qkv_bias
    if kind == "qwen2":
        config["use_sliding_window"] = False
    return config
