"""Causal softmax attention with grouped queries, rotary positions and q/k norms.

Symbols: b sequences of a micro-batch, s tokens of one, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planner.runtime.context import Context
from planner.runtime.norms import norm_of
from planner.specs.model import LayerGroup, Model

SAVED_BY_SELECTIVE = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)
"""Selective recompute keeps the outputs of these (attention out and log-sum-exp), and recomputes all else."""


def rotary_tables(model: Model, width: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the angles that turn `width` dimensions of a head, each [s, 1, width / 2] fp32, for `positions` [s] in
    the sequence (Su 2021, arXiv 2104.09864)."""
    half = width // 2
    frequency = model.rope_theta ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    angle = torch.outer(positions.float(), frequency)
    return angle.cos()[:, None, :], angle.sin()[:, None, :]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate halves of each head; x [b, s, heads, head_dim], in fp32 inside."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


class Attention(nn.Module):
    """Causal softmax attention. Under tp every rank holds heads / tp query heads: `view` finds the number by itself.

    Under cp `x` holds this rank's piece of each sequence.
    """

    cos: Tensor | None
    sin: Tensor | None

    def __init__(self, model: Model, group: LayerGroup):
        super().__init__()
        spec, self.head_dim = group.attention, model.head_dim_of(group)
        kv_heads = spec.kv_heads or spec.heads
        q, kv = spec.heads * self.head_dim, kv_heads * self.head_dim
        self.grouped = kv_heads != spec.heads
        self.wq = nn.Linear(model.hidden, q, bias=spec.qkv_bias)
        self.wk = nn.Linear(model.hidden, kv, bias=spec.qkv_bias)
        self.wv = nn.Linear(model.hidden, kv, bias=spec.qkv_bias)
        self.wo = nn.Linear(q, model.hidden, bias=spec.out_bias)
        self.q_norm = norm_of(model, self.head_dim) if spec.qk_norm == "head" else None
        self.k_norm = norm_of(model, self.head_dim) if spec.qk_norm == "head" else None
        self.context: Context | None = None
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
        if self.context is not None:
            q, k, v = (self.context.whole_sequence(t) for t in (q, k, v))
        out = self._attend(q, k, v)
        if self.context is not None:
            out = self.context.whole_heads(out)
        result: Tensor = self.wo(out.reshape(b, s, -1))
        return result

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of whole sequences, [b, s, heads, d] each and out."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped).transpose(1, 2)
