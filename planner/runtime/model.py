"""One decoder family that covers the model spec: rmsnorm or layernorm, gelu or gated MLP, GQA, rotary or learned.

A `Decoder` is a run of layers with the embedding on the first stage and the head on the last. Modules keep their
global names on every stage ("layers.17.attn.wq.weight"), so that names do not depend on the plan. Symbols: b sequences
of a micro-batch, s tokens of one, h hidden, V vocabulary; under tensor parallelism activations between blocks are
[b, s/tp, h] plain tensors.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from planner.specs.model import Model

SAVED_BY_SELECTIVE = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)
"""Selective recompute keeps the outputs of these (attention out and log-sum-exp), and recomputes all else."""


class _RmsNormCpu(torch.autograd.Function):
    """RMSNorm that saves x, weight and one fp32 value a row, as CUDA's fused kernel does.

    `F.rms_norm` on a CPU saves two fp32 copies of x instead. Rows go in blocks, so that fp32 temporaries stay small:
    a metered CPU run then shows the bytes of a CUDA run.
    """

    ROWS_X_WIDTH = 1 << 16

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:  # type: ignore[no-untyped-def]
        width = x.shape[-1]
        rows = x.reshape(-1, width)
        out, rstd = torch.empty_like(rows), torch.empty(rows.shape[0], 1, dtype=torch.float32)
        step = max(1, _RmsNormCpu.ROWS_X_WIDTH // width)
        for i in range(0, rows.shape[0], step):
            part = rows[i : i + step].float()
            rstd[i : i + step] = torch.rsqrt(part.pow(2).mean(-1, keepdim=True) + epsilon)
            out[i : i + step] = part * rstd[i : i + step] * weight.float()
        ctx.save_for_backward(x, weight, rstd)
        return out.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        x, weight, rstd = ctx.saved_tensors
        width = x.shape[-1]
        rows, grads = x.reshape(-1, width), grad.reshape(-1, width)
        dx, dw = torch.empty_like(rows), torch.zeros(width, dtype=torch.float32)
        step = max(1, _RmsNormCpu.ROWS_X_WIDTH // width)
        for i in range(0, rows.shape[0], step):
            r = rstd[i : i + step]
            normed, g = rows[i : i + step].float() * r, grads[i : i + step].float()
            dw += (g * normed).sum(0)
            g = g * weight.float()
            dx[i : i + step] = (g - normed * (g * normed).mean(-1, keepdim=True)) * r
        return dx.view_as(x), dw.to(weight.dtype), None


def _local(param: Tensor) -> Tensor:
    """The local value of a parameter that every tensor parallel rank holds whole.

    Each rank uses it on its own tokens or heads, so its gradient is a part of a sum over the tp group; the redistribute
    makes that sum in backward.
    """
    if isinstance(param, DTensor):
        whole = param.redistribute(placements=[Replicate()])
        return whole.to_local(grad_placements=[Partial()])
    return param


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, in the compute type with fp32 statistics."""

    def __init__(self, width: int, kind: str, bias: bool, epsilon: float):
        super().__init__()
        self.kind, self.epsilon = kind, epsilon
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight = _local(self.weight)
        if self.kind == "layernorm":
            bias = None if self.bias is None else _local(self.bias)
            return F.layer_norm(x, weight.shape, weight, bias, self.epsilon)
        if x.is_cuda:
            return F.rms_norm(x, list(weight.shape), weight, self.epsilon)
        out: Tensor = _RmsNormCpu.apply(x, weight, self.epsilon)  # type: ignore[no-untyped-call]
        return out


def _norm(model: Model, width: int | None = None) -> Norm:
    if width is not None:  # the norm of queries and keys is always an RMS norm
        return Norm(width, "rmsnorm", False, model.norm_epsilon)
    return Norm(model.hidden, model.norm, model.has_norm_bias, model.norm_epsilon)


def rotary_tables(model: Model, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the rotary angles, each [s, 1, head_dim / 2] fp32 (Su 2021, arXiv 2104.09864)."""
    half = model.head_dim // 2
    frequency = model.rope_theta ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    angle = torch.outer(torch.arange(seq_len, device=device, dtype=torch.float32), frequency)
    return angle.cos()[:, None, :], angle.sin()[:, None, :]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate halves of each head; x [b, s, heads, head_dim], in fp32 inside."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


class Attention(nn.Module):
    """Causal softmax attention. Under tp every rank holds heads / tp query heads: `view` finds the number by itself."""

    cos: Tensor | None
    sin: Tensor | None

    def __init__(self, model: Model):
        super().__init__()
        spec = model.layer.attention
        self.head_dim = model.head_dim
        self.grouped = model.kv_heads != model.heads
        self.wq = nn.Linear(model.hidden, model.q_width, bias=spec.qkv_bias)
        self.wk = nn.Linear(model.hidden, model.kv_width, bias=spec.qkv_bias)
        self.wv = nn.Linear(model.hidden, model.kv_width, bias=spec.qkv_bias)
        self.wo = nn.Linear(model.q_width, model.hidden, bias=spec.out_bias)
        self.q_norm = _norm(model, self.head_dim) if spec.qk_norm == "head" else None
        self.k_norm = _norm(model, self.head_dim) if spec.qk_norm == "head" else None
        # Tables are buffers, not arguments: FSDP's mixed precision would cast arguments to bf16 and save them a block.
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (proj(x).view(b, s, -1, self.head_dim) for proj in (self.wq, self.wk, self.wv))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.cos is not None and self.sin is not None:
            q, k = _rotate(q, self.cos, self.sin), _rotate(k, self.cos, self.sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        result: Tensor = self.wo(out.transpose(1, 2).reshape(b, s, -1))
        return result


class Mlp(nn.Module):
    """`gelu`: w2(gelu(w1 x)); `gated`: w2(silu(w1 x) * w3 x) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, model: Model):
        super().__init__()
        spec = model.layer.mlp
        self.w1 = nn.Linear(model.hidden, spec.width, bias=spec.bias)
        self.w2 = nn.Linear(spec.width, model.hidden, bias=spec.bias)
        self.w3 = nn.Linear(model.hidden, spec.width, bias=spec.bias) if spec.kind == "gated" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.w3 is None:
            inner = F.gelu(self.w1(x), approximate="tanh")
        else:
            inner = F.silu(self.w1(x)) * self.w3(x)
        out: Tensor = self.w2(inner)
        return out


class Block(nn.Module):
    """Norm, attention, norm, MLP, each pair with a residual. x and result: [b, s/tp, h].

    Recompute sits inside `forward`: FSDP's hooks stay outside it, and no wrapper changes parameter names.
    """

    def __init__(self, model: Model):
        super().__init__()
        self.recompute = "none"
        self.attn_norm, self.attn = _norm(model), Attention(model)
        self.mlp_norm, self.mlp = _norm(model), Mlp(model)

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self._layer(x)
        extra: dict[str, Any] = {"context_fn": _keep_attention} if self.recompute == "selective" else {}
        out: Tensor = checkpoint(self._layer, x, use_reentrant=False, preserve_rng_state=False, **extra)
        return out

    def _layer(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


def _keep_attention() -> Any:
    return create_selective_checkpoint_contexts(list(SAVED_BY_SELECTIVE))  # type: ignore[no-untyped-call]


class Decoder(nn.Module):
    """Some consecutive layers; the embedding when `first`, the final norm and head when `last`.

    Input: token ids [b, s] on the first stage, else activations [b, s/tp, h]. Output: logits [b, s, V] on the last
    stage (a DTensor split over V under tp), else activations.
    """

    def __init__(self, model: Model, layers: Sequence[int], first: bool, last: bool):
        super().__init__()
        self.model = model
        self.tok = nn.Embedding(model.vocab, model.hidden) if first else None
        learned = first and model.positions == "learned"
        self.pos = nn.Embedding(model.max_positions or 0, model.hidden) if learned else None
        self.layers = nn.ModuleDict({str(i): Block(model) for i in layers})
        self.norm = _norm(model) if last else None
        self.head = nn.Linear(model.hidden, model.vocab, bias=False) if last else None

    def blocks(self) -> list[Block]:
        """The layers in order."""
        return [m for m in self.layers.values() if isinstance(m, Block)]

    def tie(self) -> None:
        """Make the head use the embedding's parameter. Needed again after anything that replaces parameters."""
        if self.model.tied_embeddings and self.tok is not None and self.head is not None:
            self.head.weight = self.tok.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.tok is not None:
            tokens, x = x, self.tok(x)
            if self.pos is not None:
                x = x + self.pos(torch.arange(tokens.shape[1], device=tokens.device)[None])
        for block in self.layers.values():
            x = block(x)
        if self.norm is not None and self.head is not None:
            x = self.head(self.norm(x))
        return x


def initialise(part: Decoder, seq_len: int, seed: int, device: torch.device) -> None:
    """Give a meta-device part its memory, its tables and its first values, the same in every layout."""
    part.to_empty(device=device)
    part.tie()
    fill(part, seed, device)
    if part.model.positions == "rotary" and len(part.layers):
        tables = rotary_tables(part.model, seq_len, device)
        for block in part.blocks():
            block.attn.cos, block.attn.sin = tables


def fill(part: Decoder, seed: int, device: torch.device) -> None:
    """Write first values.

    Each parameter has its own generator, seeded by its name; the whole tensor is drawn, then the local part kept. One
    tensor at a time, so that the peak is one full parameter above the sharded model.
    """
    scale = 0.02 / math.sqrt(2 * part.model.n_layers)
    with torch.no_grad():
        for name, param in part.named_parameters():
            full = _first_value(name, param.shape, seed, scale, device)
            if isinstance(param, DTensor):
                placed = distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None)
                param.to_local().copy_(placed.to_local())
            else:
                param.copy_(full)


def _first_value(name: str, shape: torch.Size, seed: int, scale: float, device: torch.device) -> Tensor:
    """Norm weights 1, biases 0, matrices N(0, 0.02), the two that write to the residual smaller (GPT-2)."""
    if name.endswith("norm.weight"):
        return torch.ones(shape, device=device)
    if name.endswith("bias"):
        return torch.zeros(shape, device=device)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    std = scale if name.endswith(("wo.weight", "w2.weight")) else 0.02
    return torch.empty(shape, device=device).normal_(0.0, std, generator=generator)
