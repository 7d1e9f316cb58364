"""One decoder family that covers the model spec: layers of attention and MLP, the embedding before, the head after.

A `Decoder` is a run of layers with the embedding on the first stage and the head on the last. Modules keep their
global names on every stage ("layers.17.attn.wq.weight"), so that names do not depend on the plan. Symbols: b sequences
of a micro-batch, s tokens of one, h hidden, V vocabulary; under tensor parallelism activations between blocks are
[b, s/tp, h] plain tensors. Under context parallelism s counts the tokens of this rank's pieces of the sequence.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from planner.runtime import masters
from planner.runtime.activations import activate, activation_of
from planner.runtime.attention import Attention, locality_mask
from planner.runtime.head import Head
from planner.runtime.mla import LatentAttention
from planner.runtime.moe import Moe
from planner.runtime.norms import norm_of
from planner.runtime.recompute import KEEP_ATTENTION
from planner.runtime.rotary import rotary_tables
from planner.specs.model import LayerGroup, Model


class Mlp(nn.Module):
    """`gelu`: w2(act(w1 x)); `gated`: w2(act(w1 x) * w3 x) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, model: Model, group: LayerGroup):
        super().__init__()
        spec, width = group.mlp, group.mlp.dense_width
        self.w1 = nn.Linear(model.hidden, width, bias=spec.bias)
        self.w2 = nn.Linear(width, model.hidden, bias=spec.bias)
        self.w3 = nn.Linear(model.hidden, width, bias=spec.bias) if spec.kind == "gated" else None
        self.activation = activation_of(spec)

    def forward(self, x: Tensor) -> Tensor:
        inner = activate(self.activation, self.w1(x), None if self.w3 is None else self.w3(x))
        out: Tensor = self.w2(inner)
        return out


def _attention(model: Model, group: LayerGroup) -> Attention | LatentAttention:
    if group.attention.kind == "latent":
        return LatentAttention(model, group)
    return Attention(model, group)


def _mlp(model: Model, group: LayerGroup) -> Mlp | Moe:
    """A dense MLP, or routed experts beside the shared ones that are a dense MLP of their own."""
    if not group.mlp.routed:
        return Mlp(model, group)
    return Moe(model.hidden, group.mlp, Mlp(model, group) if group.mlp.shared_width else None)


class Block(nn.Module):
    """Attention and MLP, one after the other or side by side, with norms before, after or around. x and result: [b, s/tp, h].

    Recompute sits inside `forward`: FSDP's hooks stay outside it, and no wrapper changes parameter names.
    """

    def __init__(self, model: Model, group: LayerGroup):
        super().__init__()
        self.recompute = "none"
        self.kept: Any = KEEP_ATTENTION
        """What selective recompute keeps."""
        before, after = group.norms != "post", group.norms in ("post", "both")
        self.attn_norm = norm_of(model) if before else None
        self.attn = _attention(model, group)
        self.attn_post_norm = norm_of(model) if after else None
        self.mlp_norm = norm_of(model) if before and group.norms != "shared" else None
        self.mlp = _mlp(model, group)
        self.mlp_post_norm = norm_of(model) if after else None
        self.parallel, self.shared = group.parallel, group.norms == "shared"

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self._layer(x)
        extra: dict[str, Any] = {"context_fn": self.kept} if self.recompute == "selective" else {}
        out: Tensor = checkpoint(self._layer, x, use_reentrant=False, preserve_rng_state=False, **extra)
        return out

    def _layer(self, x: Tensor) -> Tensor:
        normed = _maybe(self.attn_norm, x)
        attention = _maybe(self.attn_post_norm, self.attn(normed))
        if not self.parallel:
            x = x + attention
        read = normed if self.shared else _maybe(self.mlp_norm, x)
        mlp = _maybe(self.mlp_post_norm, self.mlp(read))
        return x + attention + mlp if self.parallel else x + mlp


def _maybe(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


class Decoder(nn.Module):
    """Some consecutive layers; the embedding when `first`, the final norm and head when `last`.

    Input: token ids [b, s] on the first stage, else activations [b, s/tp, h]. Output: on the last stage logits [b, s, V]
    (a DTensor split over V under tp), or the loss where the head expects targets; else activations.
    """

    positions: Tensor | None
    """Positions of the tokens that this rank sees of a sequence [s], where positions are learned."""

    def __init__(self, model: Model, layers: Sequence[int], first: bool, last: bool):
        super().__init__()
        self.model = model
        self.settle = False
        """Whether the first block is to start from finished values (see `parallelize.apply_compile`)."""
        self.tok = nn.Embedding(model.vocab, model.hidden) if first else None
        learned = first and model.positions == "learned"
        self.pos = nn.Embedding(model.max_positions or 0, model.hidden) if learned else None
        self.register_buffer("positions", None, persistent=False)
        self.layers = nn.ModuleDict({str(i): Block(model, model.kinds[model.kind_of_layer[i]][0]) for i in layers})
        self.norm = norm_of(model) if last else None
        self.head = Head(model.hidden, model.vocab, model.head_bias) if last else None

    def blocks(self) -> list[Block]:
        """The layers in order."""
        return [m for m in self.layers.values() if isinstance(m, Block)]

    def tie(self) -> None:
        """Make the head use the embedding's parameter. Needed again after anything that replaces parameters."""
        if self.model.tied_embeddings and self.tok is not None and self.head is not None:
            self.head.weight = self.tok.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.tok is not None:
            x = self.tok(x)
            if self.pos is not None and self.positions is not None:
                x = x + self.pos(self.positions[None])
            x = x * 1 if self.settle else x
        for block in self.layers.values():
            x = block(x)
        if self.norm is not None and self.head is not None:
            x = self.head(self.norm(x))
        return x


def initialise(part: Decoder, positions: npt.NDArray[np.int64], seed: int, device: torch.device, dtype: torch.dtype) -> None:
    """Give an allocated part its first values, the same in every layout; `positions` are those that this rank sees of
    each sequence, `dtype` the compute type. Buffers go to `device`, where parameters may not be (offload).
    """
    fill(part, seed, device)
    _set_buffers(part, torch.from_numpy(positions).to(device), dtype, device)


def fill(part: Decoder, seed: int, device: torch.device) -> None:
    """Write first values.

    Each parameter has its own generator, seeded by its name; the whole tensor is drawn, then the local part kept. One
    tensor at a time, so that the peak is one full parameter above the sharded model.
    """
    scale = 0.02 / math.sqrt(2 * part.model.n_layers)
    with torch.no_grad():
        for name, param in part.named_parameters():
            assign(param, _first_value(name, param.shape, seed, scale, device))


def assign(param: Tensor, full: Tensor) -> None:
    """Give a parameter, and its master, this rank's part of a whole tensor."""
    with torch.no_grad():
        for target in {id(t): t for t in (masters.values(param), param)}.values():
            if isinstance(target, DTensor):
                placed = distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None)
                target.to_local().copy_(placed.to_local())  # from the device to where the parameter lives
            else:
                target.copy_(full)


def _set_buffers(part: Decoder, positions: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Give the embedding its positions and attention its rotary tables and masks; layers of one kind share them."""
    part.positions = positions if part.pos is not None else None
    tables = {n: rotary_tables(part.model, n, positions) for n in {block.attn.turned for block in part.blocks()} if n}
    masks: dict[tuple[int | None, int | None], Tensor | None] = {}
    for block in part.blocks():
        attention = block.attn
        attention.cos, attention.sin = tables.get(attention.turned, (None, None))
        if isinstance(attention, LatentAttention):
            continue
        spec = attention.spec
        kind, whole = (spec.sliding_window, spec.chunk), len(positions) * (attention.context.size if attention.context else 1)
        if kind not in masks:
            masks[kind] = locality_mask(spec, whole, dtype, device)
        attention.mask = masks[kind]


def _first_value(name: str, shape: torch.Size, seed: int, scale: float, device: torch.device) -> Tensor:
    """Norm weights 1, biases 0, matrices N(0, 0.02), the two that write to the residual smaller (GPT-2)."""
    if name.endswith("norm.weight"):
        return torch.ones(shape, device=device)
    if name.endswith("bias"):
        return torch.zeros(shape, device=device)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    std = scale if name.endswith(("wo.weight", "w2.weight", "experts.w2")) else 0.02
    return torch.empty(shape, device=device).normal_(0.0, std, generator=generator)
