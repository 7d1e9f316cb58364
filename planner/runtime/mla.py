"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Queries and keys of head_dim = nope + rope, values of v_head_dim, both projected up from low-rank latents; one rotary key is
shared by all heads. Tensor parallelism splits the heads. The projections down to the latents are whole on every rank and run
on its own tokens: what is gathered over tp are the latents, not the hidden states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from planner.runtime.norms import norm_of
from planner.runtime.replicated import Replicated, whole
from planner.runtime.rotary import rotate
from planner.specs.layers import LayerGroup
from planner.specs.model import Model


class Down(Replicated):
    """A projection to a latent, of this rank's own tokens."""

    def __init__(self, hidden: int, width: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, hidden))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, whole(self.weight), None if self.bias is None else whole(self.bias))


class LatentAttention(nn.Module):
    """Causal latent attention of one layer group. x and result: [b, s/tp, h].

    Unlike `attention.Attention` it takes the tokens of its own rank and gathers latents itself.
    """

    cos: Tensor | None
    sin: Tensor | None

    def __init__(self, model: Model, group: LayerGroup):
        super().__init__()
        a, h = group.attention, model.hidden
        assert a.kv_lora_rank is not None
        self.head_dim, self.v_dim, self.rotary_dim = model.head_dim_of(group), model.v_dim_of(group), a.rope_dim
        self.kv_rank = a.kv_lora_rank
        self.turned = a.rope_dim if model.positions == "rotary" else 0
        """Dimensions of each head that rotary positions turn."""
        query, key_value = a.heads * self.head_dim, a.heads * (self.head_dim - a.rope_dim + self.v_dim)
        self.wq_down = Down(h, a.q_lora_rank, a.qkv_bias) if a.q_lora_rank else None
        self.q_norm = norm_of(model, a.q_lora_rank) if a.q_lora_rank else None
        self.wq = nn.Linear(a.q_lora_rank or h, query, bias=False)
        self.wkv_down = Down(h, self.kv_rank + a.rope_dim, a.qkv_bias)
        self.kv_norm = norm_of(model, self.kv_rank)
        self.wkv = nn.Linear(self.kv_rank, key_value, bias=False)
        self.wo = nn.Linear(a.heads * self.v_dim, h, bias=a.out_bias)
        self.tp: DeviceMesh | None = None
        """Set by tensor parallelism."""
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._heads(x)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = _attend(q, k, v)
        b, _, s, _ = out.shape
        result: Tensor = self.wo(out.transpose(1, 2).reshape(b, s, -1))
        return result

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys [b, s, heads / tp, head_dim], values [b, s, heads / tp, v_head_dim]."""
        latent = x
        if self.wq_down is not None and self.q_norm is not None:
            latent = self.q_norm(self.wq_down(x))
        own = self.wkv_down(x)
        keys = self.wkv(self.kv_norm(own[..., : self.kv_rank]))
        b, s, _ = keys.shape
        q = self.wq(latent).view(b, s, -1, self.head_dim)
        nope, v = keys.view(b, s, -1, self.head_dim - self.rotary_dim + self.v_dim).split(
            [self.head_dim - self.rotary_dim, self.v_dim], dim=-1
        )
        if not self.rotary_dim:
            return q, nope, v
        turned = self._gather(own[..., self.kv_rank :])[:, :, None]
        if self.cos is not None and self.sin is not None:
            turned = rotate(turned, self.cos, self.sin)
            fixed, ahead = q.split([self.head_dim - self.rotary_dim, self.rotary_dim], dim=-1)
            q = torch.cat((fixed, rotate(ahead, self.cos, self.sin)), dim=-1)
        return q, torch.cat((nope, turned.expand(-1, -1, nope.shape[2], -1)), dim=-1), v

    def _gather(self, x: Tensor) -> Tensor:
        """Tokens of the tp group; each rank's heads use all of them, so its gradient is a part of a sum."""
        if self.tp is None:
            return x
        gathered = DTensor.from_local(x, self.tp, [Shard(1)], run_check=False).redistribute(placements=[Replicate()])
        return gathered.to_local(grad_placements=[Partial()])


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention with values of another width than keys: cuDNN takes them, the fused kernel of a CPU does not.

    Values are copied out of the projection that they came from with the keys: attention keeps them until backward.
    """
    width = v.shape[-1]
    v = F.pad(v, (0, q.shape[-1] - width)) if width != q.shape[-1] and not q.is_cuda else v.contiguous()
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)[..., :width]
