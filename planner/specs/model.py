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
    """Softmax attention: multi-head (kv_heads = heads), grouped-query, multi-query (kv_heads = 1), or latent.

    `latent` is DeepSeek's multi-head latent attention (arXiv 2405.04434, section 2.1): queries and keys of
    `head_dim` = nope + rope_dim, values of `v_head_dim`, both projected up from low-rank latents.
    """

    kind: Literal["softmax", "latent"] = "softmax"
    """The attention family."""
    q_lora_rank: int | None = Field(default=None, gt=0, lt=2**31)
    """Rank of the query latent; queries are projected directly when left out. Latent attention only."""
    kv_lora_rank: int | None = Field(default=None, gt=0, lt=2**31)
    """Rank of the key/value latent: required with latent attention."""
    rope_dim: int = Field(default=0, ge=0, lt=2**31)
    """Rotary part of each query and of the one shared key. Latent attention only."""
    v_head_dim: int | None = Field(default=None, gt=0, lt=2**31)
    """Width of one value head; head_dim when left out. Latent attention only."""
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
    """An MLP: `gelu` is up-activation-down (2 matrices), `gated` is SwiGLU-like (3 matrices); or a mixture of such experts."""

    kind: Literal["gelu", "gated"]
    width: int = Field(gt=0, lt=2**31)
    """Inner width f; of one expert where there are several."""
    bias: bool = False
    """Biases on every projection of the MLP."""
    experts: int = Field(default=1, gt=0, lt=2**31)
    """Routed experts; 1 is a dense MLP."""
    top_k: int = Field(default=1, gt=0, lt=2**31)
    """Routed experts that each token visits."""
    shared_width: int = Field(default=0, ge=0, lt=2**31)
    """Inner width of the experts that every token visits, summed; 0 for none."""
    capacity: float | None = Field(default=None, gt=0)
    """Slots of an expert over its even share of tokens, padded; dropless when left out."""

    @model_validator(mode="after")
    def _routing_is_possible(self) -> Mlp:
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} exceeds the {self.experts} experts")
        if self.experts == 1 and (self.shared_width or self.capacity):
            raise ValueError("shared_width and capacity need more than one expert")
        return self

    @property
    def matrices(self) -> int:
        """Projections of one MLP."""
        return 3 if self.kind == "gated" else 2

    @property
    def routed(self) -> bool:
        """Whether tokens are routed to experts."""
        return self.experts > 1

    @property
    def dense_width(self) -> int:
        """Inner width that every token passes: of the dense MLP, or of the shared experts."""
        return self.shared_width if self.routed else self.width


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
            if a.kind == "latent" and (a.kv_lora_rank is None or a.head_dim is None or a.rope_dim >= a.head_dim):
                raise ValueError("latent attention needs kv_lora_rank, and head_dim larger than rope_dim")
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

    def attention_dim_of(self, group: LayerGroup) -> float:
        """Mean width of the two products of attention: of a query or key head, and of a value head."""
        return (self.head_dim_of(group) + self.v_dim_of(group)) / 2

    def v_dim_of(self, group: LayerGroup) -> int:
        """Width of one value head."""
        return group.attention.v_head_dim or self.head_dim_of(group)

    @cached_property
    def kinds(self) -> tuple[tuple[LayerGroup, int], ...]:
        """The distinct kinds of layers with how many there are, in order of their first layer."""
        seen: dict[tuple[Attention, Mlp], tuple[LayerGroup, int]] = {}
        for group in self.layers:
            key = (self._resolved(group), group.mlp)
            first, count = seen.get(key, (group, 0))
            seen[key] = (first, count + group.count)
        return tuple(seen.values())

    @cached_property
    def kind_of_layer(self) -> tuple[int, ...]:
        """Index into `kinds` of each layer."""
        keys = [(self._resolved(g), g.mlp) for g, _ in self.kinds]
        return tuple(keys.index((self._resolved(g), g.mlp)) for g in self.layers for _ in range(g.count))

    def only(self, kind: int) -> Model:
        """This model with all its layers of one kind: what one layer of that kind costs is asked of it."""
        group = self.kinds[kind][0].model_copy(update={"count": self.n_layers})
        fields = {name: getattr(self, name) for name in Model.model_fields} | {"layers": [group]}
        return Model.model_construct(**fields)  # not a copy: that would keep cached sizes

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
        """Weights of one layer that tensor parallelism splits: projections without biases, without routed experts."""
        a, h = group.attention, self.hidden
        d = self.head_dim_of(group)
        dense = group.mlp.matrices * h * group.mlp.dense_width
        if a.kind == "latent":
            v = a.v_head_dim or d
            up = (a.q_lora_rank or h) * a.heads * d + (a.kv_lora_rank or 0) * a.heads * (d - a.rope_dim + v)
            return up + a.heads * v * h + dense
        q, kv = a.heads * d, (a.kv_heads or a.heads) * d
        return h * q + 2 * h * kv + q * h + dense

    def expert_params_of(self, group: LayerGroup) -> int:
        """Weights of one layer's routed experts, biases included: 0 for a dense layer."""
        m = group.mlp
        biases = (m.matrices - 1) * m.width + self.hidden if m.bias else 0
        return m.experts * (m.matrices * self.hidden * m.width + biases) if m.routed else 0

    def split_bias_params_of(self, group: LayerGroup) -> int:
        """Biases that tensor parallelism splits with their matrix: q, k, v and the MLP's first projection(s)."""
        a, d = group.attention, self.head_dim_of(group)
        q, kv = a.heads * d, (a.kv_heads or a.heads) * d
        firsts = group.mlp.matrices - 1
        return (q + 2 * kv if a.qkv_bias else 0) + (firsts * group.mlp.dense_width if group.mlp.bias else 0)

    def whole_params_of(self, group: LayerGroup) -> int:
        """Parameters of one layer that every tensor-parallel rank holds: norms, router, latent down-projections, and
        biases after a reduction."""
        a, d, m = group.attention, self.head_dim_of(group), group.mlp
        biases = (self.hidden if a.out_bias else 0) + (self.hidden if m.bias and m.dense_width else 0)
        router = self.hidden * m.experts if m.routed else 0
        latent = 0
        if a.kind == "latent":
            q, kv = a.q_lora_rank or 0, a.kv_lora_rank or 0
            latent = self.hidden * (q + kv + a.rope_dim) + q + kv  # with the norms of both latents
        return 2 * self.norm_params + biases + (2 * d if a.qk_norm else 0) + router + latent

    def layer_params_of(self, group: LayerGroup) -> int:
        """All parameters of one layer of `group`."""
        split = self.matmul_params_of(group) + self.split_bias_params_of(group) + self.expert_params_of(group)
        return split + self.whole_params_of(group)

    def active_params_of(self, group: LayerGroup) -> int:
        """Weights of one layer that a token passes through in matrix products: its top_k experts only."""
        a, m = group.attention, group.mlp
        routed = m.top_k * m.matrices * self.hidden * m.width + self.hidden * m.experts if m.routed else 0
        down = self.hidden * ((a.q_lora_rank or 0) + (a.kv_lora_rank or 0) + a.rope_dim) if a.kind == "latent" else 0
        return self.matmul_params_of(group) + routed + down

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
        projections = sum(g.count * self.active_params_of(g) for g in self.layers) + self.vocab * self.hidden
        attention = 0.0
        for g in self.layers:
            context = min(g.attention.sliding_window or seq_len, seq_len)
            attention += g.count * 12.0 * g.attention.heads * self.attention_dim_of(g) * context
        return 6.0 * projections + attention * (0.5 if causal else 1.0)
