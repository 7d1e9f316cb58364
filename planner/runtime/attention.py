"""Causal softmax attention with grouped queries, rotary positions, q/k norms, windows and chunks.

Symbols: b sequences of a micro-batch, s tokens of one, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planner.runtime.context import Ulysses
from planner.runtime.norms import norm_of
from planner.runtime.ring import Ring
from planner.runtime.rotary import rotate
from planner.specs.layers import Attention as Spec
from planner.specs.model import LayerGroup, Model

SAVED_BY_SELECTIVE = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)
"""Selective recompute keeps the outputs of these (attention out and log-sum-exp), and recomputes all else."""


def locality_mask(spec: Spec, seq_len: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """What to add to the scores [s, s] of a window or of chunks: 0 where a query sees a key. None where it sees all before it.

    Of the compute type: attention would convert any other mask, and keep the copy, in every layer.
    """
    reach = spec.keys_of(seq_len)
    if reach == seq_len:
        return None
    at = torch.arange(seq_len, device=device)
    query, key = at[:, None], at[None, :]
    near = query - key < reach if spec.sliding_window else query // reach == key // reach
    hidden = torch.full((seq_len, seq_len), float("-inf"), dtype=dtype, device=device)
    return hidden.masked_fill_((key <= query) & near, 0.0)


class Attention(nn.Module):
    """Causal softmax attention. Under tp every rank holds heads / tp query heads: `view` finds the number by itself.

    Under cp `x` holds this rank's piece of each sequence.
    """

    cos: Tensor | None
    sin: Tensor | None
    mask: Tensor | None

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
        self.whole_norms = spec.qk_norm == "width"
        widths = {"head": (self.head_dim, self.head_dim), "width": (q, kv)}.get(spec.qk_norm)
        self.q_norm = norm_of(model, widths[0]) if widths else None
        self.k_norm = norm_of(model, widths[1]) if widths else None
        self.spec = spec
        turned = int(self.head_dim * spec.rope_share) if model.positions == "rotary" else 0
        self.turned = turned - turned % 2
        """Dimensions of each head that rotary positions turn."""
        self.context: Ulysses | Ring | None = None
        # Tables are buffers, not arguments: FSDP's mixed precision would cast arguments to bf16 and save them a block.
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)
        self.register_buffer("mask", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.wq(x), self.wk(x), self.wv(x)
        if self.whole_norms and self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.view(b, s, -1, self.head_dim) for t in (q, k, v))
        if not self.whole_norms and self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.cos is not None and self.sin is not None:
            q, k = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)
        out = self._attend(q, k, v) if self.context is None else self.context.attend(q, k, v, self._attend)
        result: Tensor = self.wo(out.reshape(b, s, -1))
        return result

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of whole sequences, [b, s, heads, d] each and out."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        causal = self.mask is None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=causal, enable_gqa=self.grouped)
        return out.transpose(1, 2)
