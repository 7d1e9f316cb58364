"""The network: layer groups, attention and MLP kinds, embedding, head. Parameter counts are exact.

A model is a list of layer groups, so that mixed sequences (dense then expert layers, alternating windows) need no
special case. Symbols in docstrings: h hidden, q = heads * head_dim, kv = kv_heads * head_dim, f MLP width, V vocab.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

from pydantic import Field, model_validator

from planner.specs.base import Spec


class Attention(Spec):
    """Softmax attention: multi-head (kv_heads = heads), grouped-query, or multi-query (kv_heads = 1)."""

    kind: Literal["softmax"] = "softmax"
    """The attention family; latent attention will be a second one."""
    heads: int = Field(gt=0, lt=2**31)
    """Query heads."""
    kv_heads: int | None = Field(default=None, gt=0, lt=2**31)
    """Key and value heads; as many as `heads` when left out."""
    head_dim: int | None = Field(default=None, gt=0, lt=2**31)
    """Width of one head; hidden / heads when left out. It may differ from that (Qwen3-32B: 128, not 5120 / 64)."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections (gpt2, qwen2)."""
    out_bias: bool = False
    """Bias on the output projection (gpt2)."""
    qk_norm: bool = False
    """RMS norm over each query and key head (qwen3): 2 * head_dim parameters a layer."""
    sliding_window: int | None = Field(default=None, gt=0, lt=2**31)
    """Tokens that a query attends to; all earlier ones when left out."""


class Mlp(Spec):
    """A dense MLP: `gelu` is up-activation-down (2 matrices), `gated` is SwiGLU-like (3 matrices)."""

    kind: Literal["gelu", "gated"]
    width: int = Field(gt=0, lt=2**31)
    """Inner width f."""
    bias: bool = False
    """Biases on every projection of the MLP."""


class LayerGroup(Spec):
    """`count` identical transformer layers in a row: norm, attention, norm, MLP, each with a residual."""

    count: int = Field(gt=0, le=10_000)
    attention: Attention
    mlp: Mlp


class Model(Spec):
    """A decoder-only language model."""

    name: str = Field(min_length=1, max_length=200, pattern=r"^[ -~]+$")
    """Printable: it ends up in file names and scripts."""
    hidden: int = Field(gt=0, lt=2**31)
    vocab: int = Field(gt=0, lt=2**31)
    """Rows of the embedding as built, padding included."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_bias: bool | None = None
    """Bias of the norms; layernorm has one unless told otherwise, rmsnorm never."""
    norm_epsilon: float = Field(default=1e-5, gt=0)
    positions: Literal["rotary", "learned", "none"] = "rotary"
    max_positions: int | None = Field(default=None, gt=0, lt=2**31)
    """Rows of a learned position embedding: required with `positions: learned`, the longest sequence otherwise."""
    rope_theta: float = Field(default=10000.0, gt=0)
    tied_embeddings: bool = False
    """The output head reuses the embedding matrix."""
    layers: list[LayerGroup] = Field(min_length=1)
    source: str = ""
    """Where these sizes come from: a paper with its table, a config file."""

    @model_validator(mode="after")
    def _derived_sizes_exist(self) -> Model:
        for group in self.layers:
            a = group.attention
            if a.head_dim is None and self.hidden % a.heads:
                raise ValueError(f"hidden {self.hidden} is not divisible by heads {a.heads}: set head_dim")
            if a.heads % (a.kv_heads or a.heads):
                raise ValueError(f"heads {a.heads} is not divisible by kv_heads {a.kv_heads}")
            if self.positions == "rotary" and self.head_dim_of(group) % 2:
                raise ValueError(f"rotary positions need an even head_dim, not {self.head_dim_of(group)}")
        if self.positions == "learned" and self.max_positions is None:
            raise ValueError("learned positions need max_positions")
        if self.norm == "rmsnorm" and self.norm_bias:
            raise ValueError("rmsnorm has no bias")
        return self

    # ---- derived sizes -------------------------------------------------------------------------------------------

    def head_dim_of(self, group: LayerGroup) -> int:
        """Width of one attention head of `group`."""
        return group.attention.head_dim or self.hidden // group.attention.heads

    @cached_property
    def n_layers(self) -> int:
        """Transformer layers in all groups."""
        return sum(g.count for g in self.layers)

    @cached_property
    def layer(self) -> LayerGroup:
        """The one layer kind of a homogeneous model. Raises ValueError for mixed sequences."""
        if not self.homogeneous:
            raise ValueError(f"{self.name} mixes several kinds of layers")
        return self.layers[0]

    @property
    def homogeneous(self) -> bool:
        """Whether all layers are of one kind."""
        return len({(self._resolved(g), g.mlp) for g in self.layers}) == 1

    def _resolved(self, group: LayerGroup) -> Attention:
        """The group's attention with its defaults written out."""
        a = group.attention
        return a.model_copy(update={"kv_heads": a.kv_heads or a.heads, "head_dim": self.head_dim_of(group)})

    @property
    def heads(self) -> int:
        """Query heads of the (one) layer kind."""
        return self.layer.attention.heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads of the (one) layer kind."""
        return self.layer.attention.kv_heads or self.layer.attention.heads

    @property
    def head_dim(self) -> int:
        """Head width of the (one) layer kind."""
        return self.head_dim_of(self.layer)

    @property
    def q_width(self) -> int:
        """q = heads * head_dim."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """kv = kv_heads * head_dim."""
        return self.kv_heads * self.head_dim

    @property
    def mlp_width(self) -> int:
        """f, the inner width of the (one) layer kind."""
        return self.layer.mlp.width

    @property
    def has_norm_bias(self) -> bool:
        """Whether the norms carry a bias vector."""
        return self.norm == "layernorm" if self.norm_bias is None else self.norm_bias

    # ---- parameter counts (exact) --------------------------------------------------------------------------------

    @property
    def norm_params(self) -> int:
        """Parameters of one norm over the hidden width."""
        return self.hidden * (2 if self.has_norm_bias else 1)

    def matmul_params_of(self, group: LayerGroup) -> int:
        """Weights of one layer that tensor parallelism splits: projections without biases."""
        a, h = group.attention, self.hidden
        d = self.head_dim_of(group)
        q, kv = a.heads * d, (a.kv_heads or a.heads) * d
        matrices = 3 if group.mlp.kind == "gated" else 2
        return h * q + 2 * h * kv + q * h + matrices * h * group.mlp.width

    def split_bias_params_of(self, group: LayerGroup) -> int:
        """Biases that tensor parallelism splits with their matrix: q, k, v and the MLP's first projection(s)."""
        a, d = group.attention, self.head_dim_of(group)
        q, kv = a.heads * d, (a.kv_heads or a.heads) * d
        firsts = 2 if group.mlp.kind == "gated" else 1
        return (q + 2 * kv if a.qkv_bias else 0) + (firsts * group.mlp.width if group.mlp.bias else 0)

    def whole_params_of(self, group: LayerGroup) -> int:
        """Parameters of one layer that every tensor-parallel rank holds: norms, and biases after a reduction."""
        a, d = group.attention, self.head_dim_of(group)
        biases = (self.hidden if a.out_bias else 0) + (self.hidden if group.mlp.bias else 0)
        return 2 * self.norm_params + biases + (2 * d if a.qk_norm else 0)

    def layer_params_of(self, group: LayerGroup) -> int:
        """All parameters of one layer of `group`."""
        return self.matmul_params_of(group) + self.split_bias_params_of(group) + self.whole_params_of(group)

    @property
    def embedding_params(self) -> int:
        """Token embedding, without learned positions."""
        return self.vocab * self.hidden

    @property
    def position_params(self) -> int:
        """Learned position embedding, 0 otherwise."""
        return (self.max_positions or 0) * self.hidden if self.positions == "learned" else 0

    @property
    def head_params(self) -> int:
        """Output head as separate parameters: 0 when tied."""
        return 0 if self.tied_embeddings else self.vocab * self.hidden

    @cached_property
    def total_params(self) -> int:
        """Every trainable parameter, tied ones once."""
        layers = sum(g.count * self.layer_params_of(g) for g in self.layers)
        return self.embedding_params + self.position_params + layers + self.norm_params + self.head_params

    def flops_per_token(self, seq_len: int, causal: bool = False) -> float:
        """Training FLOPs a token, forward and backward, without recompute.

        6 (N - input embeddings) + 12 L q s with full attention, half the attention term when `causal`
        (PaLM, arXiv 2204.02311, appendix B, with the input embedding left out because it is a lookup).
        """
        projections = sum(g.count * self.matmul_params_of(g) for g in self.layers) + self.vocab * self.hidden
        attention = 0.0
        for g in self.layers:
            context = min(g.attention.sliding_window or seq_len, seq_len)
            attention += g.count * 12.0 * g.attention.heads * self.head_dim_of(g) * context
        return 6.0 * projections + attention * (0.5 if causal else 1.0)
