"""The network: a sequence of layer groups between embedding and head. Parameter counts are exact.

A model is a list of layer groups, so that mixed sequences (dense then expert layers, alternating windows, an encoder before
the language model) need no special case. Symbols in docstrings: h hidden, q = heads * head_dim, kv = kv_heads * head_dim,
f MLP width, V vocab.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

from pydantic import Field, model_validator

from planner.specs.base import Spec
from planner.specs.layers import Attention, FrontEnd, LayerGroup, Mlp

__all__ = ["Attention", "FrontEnd", "LayerGroup", "Mlp", "Model"]

FlopsConvention = Literal["full", "causal", "recompute"]
"""What is counted: attention of every query to every key of the sequence (or window); to the keys that it sees; or as `full`,
with the forward pass of every layer once more, as full activation recompute runs it."""


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
    norm_weight: bool = True
    """Whether the norms have weights (olmo's have none)."""
    norm_epsilon: float = Field(default=1e-5, gt=0)
    positions: Literal["rotary", "learned", "alibi", "none"] = "rotary"
    max_positions: int | None = Field(default=None, gt=0, lt=2**31)
    """Rows of a learned position embedding: required with `positions: learned`, the longest sequence otherwise."""
    rope_theta: float = Field(default=10000.0, gt=0)
    tied_embeddings: bool = False
    """The output head reuses the embedding matrix."""
    head_bias: bool = False
    """Bias of the output head: V parameters (phi)."""
    mtp: int = Field(default=0, ge=0, le=16)
    """Multi-token prediction modules after the last layer, trained with it: each a layer of the last kind, a projection of
    2 h to h and three norms; embedding and head are shared (DeepSeek-V3, arXiv 2412.19437, section 2.2)."""
    layers: list[LayerGroup] = Field(min_length=1)
    source: str = ""
    """Where these sizes come from: a paper with its table, a config file."""

    @model_validator(mode="after")
    def _derived_sizes_exist(self) -> Model:
        for group in self.layers:
            a, hidden = group.attention, self.hidden_of(group)
            if a.head_dim is None and hidden % a.heads:
                raise ValueError(f"hidden {hidden} is not divisible by heads {a.heads}: set head_dim")
            if a.heads % (a.kv_heads or a.heads):
                raise ValueError(f"heads {a.heads} is not divisible by kv_heads {a.kv_heads}")
            if a.kind == "latent" and (a.kv_lora_rank is None or a.head_dim is None or a.rope_dim >= a.head_dim):
                raise ValueError("latent attention needs kv_lora_rank, and head_dim larger than rope_dim")
            rotary = self.positions == "rotary" and a.rope_share > 0 and group.front is None
            if rotary and self.head_dim_of(group) % 2:
                raise ValueError(f"rotary positions need an even head_dim, not {self.head_dim_of(group)}")
        if self.positions == "learned" and self.max_positions is None:
            raise ValueError("learned positions need max_positions")
        if self.norm == "rmsnorm" and self.norm_bias:
            raise ValueError("rmsnorm has no bias")
        self._fronts_come_first()
        return self

    def _fronts_come_first(self) -> None:
        """Encoders feed the language model, so their layers stand before it. Raises ValueError."""
        inside = [group.front for group in self.layers]
        text = [i for i, front in enumerate(inside) if front is None]
        if not text:
            raise ValueError("every layer group belongs to a front end: the language model has none")
        if any(front is not None for front in inside[text[0] :]):
            raise ValueError("layer groups with a front end come before those of the language model")

    # ---- derived sizes -------------------------------------------------------------------------------------------

    def hidden_of(self, group: LayerGroup) -> int:
        """Hidden width of `group`: its front end's, or the model's."""
        return group.front.hidden if group.front else self.hidden

    def head_dim_of(self, group: LayerGroup) -> int:
        """Width of one attention head of `group`."""
        return group.attention.head_dim or self.hidden_of(group) // group.attention.heads

    def attention_dim_of(self, group: LayerGroup) -> float:
        """Mean width of the two products of attention: of a query or key head, and of a value head."""
        return (self.head_dim_of(group) + self.v_dim_of(group)) / 2

    def v_dim_of(self, group: LayerGroup) -> int:
        """Width of one value head."""
        return group.attention.v_head_dim or self.head_dim_of(group)

    @cached_property
    def kinds(self) -> tuple[tuple[LayerGroup, int], ...]:
        """The distinct kinds of layers with how many there are, in order of their first layer."""
        seen: dict[str, tuple[LayerGroup, int]] = {}
        for group in self.layers:
            key = self._kind(group)
            first, count = seen.get(key, (group, 0))
            seen[key] = (first, count + group.count)
        return tuple(seen.values())

    @cached_property
    def kind_of_layer(self) -> tuple[int, ...]:
        """Index into `kinds` of each layer."""
        keys = [self._kind(g) for g, _ in self.kinds]
        return tuple(keys.index(self._kind(g)) for g in self.layers for _ in range(g.count))

    @cached_property
    def text_kind(self) -> int:
        """Index into `kinds` of the language model's last layers: the head and the sends between stages are theirs."""
        return self.kind_of_layer[-1]

    def only(self, kind: int) -> Model:
        """This model with all its layers of one kind: what one layer of that kind costs is asked of it.

        Layers of a front end become a model of its width.
        """
        group = self.kinds[kind][0].model_copy(update={"count": self.n_layers, "front": None})
        fields: dict[str, Any] = {name: getattr(self, name) for name in Model.model_fields} | {"layers": [group]}
        if front := self.kinds[kind][0].front:
            fields |= {
                "hidden": front.hidden,
                "norm_bias": front.norm_bias,
                "norm": "layernorm" if front.norm_bias else "rmsnorm",
            }
        return Model.model_construct(**fields)  # not a copy: that would keep cached sizes

    @cached_property
    def attentions(self) -> tuple[Attention, ...]:
        """Attention of each kind of layers."""
        return tuple(g.attention for g, _ in self.kinds)

    @cached_property
    def mlps(self) -> tuple[Mlp, ...]:
        """MLP of each kind of layers."""
        return tuple(g.mlp for g, _ in self.kinds)

    @cached_property
    def routed_mlps(self) -> tuple[Mlp, ...]:
        """Those that route tokens to experts."""
        return tuple(m for m in self.mlps if m.routed)

    @cached_property
    def fronts(self) -> tuple[FrontEnd, ...]:
        """The distinct front ends."""
        return tuple({g.front.model_dump_json(): g.front for g in self.layers if g.front}.values())

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
        return len({self._kind(g) for g in self.layers}) == 1

    def _kind(self, group: LayerGroup) -> str:
        """What makes the group's layers of one kind: everything but their count, defaults written out."""
        a = group.attention
        whole = a.model_copy(update={"kv_heads": a.kv_heads or a.heads, "head_dim": self.head_dim_of(group)})
        return group.model_copy(update={"attention": whole, "count": 1}).model_dump_json()

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
        return self.hidden * (int(self.norm_weight) + int(self.has_norm_bias))

    def norm_params_of(self, group: LayerGroup) -> int:
        """Parameters of one norm over the hidden width of `group`."""
        return group.front.hidden * (2 if group.front.norm_bias else 1) if group.front else self.norm_params

    def matmul_params_of(self, group: LayerGroup) -> int:
        """Weights of one layer that tensor parallelism splits: projections without biases, without routed experts."""
        a, h = group.attention, self.hidden_of(group)
        d = self.head_dim_of(group)
        dense = group.mlp.matrices * h * group.mlp.dense_width
        if a.kind == "latent":
            v = a.v_head_dim or d
            up = (a.q_lora_rank or h) * a.heads * d + (a.kv_lora_rank or 0) * a.heads * (d - a.rope_dim + v)
            return up + a.heads * v * h + dense
        q, kv = a.heads * d, (a.kv_heads or a.heads) * d
        return h * q * (2 if a.output_gate else 1) + 2 * h * kv + q * h + dense

    def expert_params_of(self, group: LayerGroup) -> int:
        """Weights of one layer's routed experts, biases included: 0 for a dense layer."""
        m, h = group.mlp, self.hidden_of(group)
        biases = (m.matrices - 1) * m.width + h if m.bias else 0
        return m.experts * (m.matrices * h * m.width + biases) if m.routed else 0

    def split_bias_params_of(self, group: LayerGroup) -> int:
        """Vectors that tensor parallelism splits with their matrix: biases of q, k, v and of the MLP's first projections,
        sinks, and norms over the joined heads."""
        a, d = group.attention, self.head_dim_of(group)
        q, kv = a.heads * d, (a.kv_heads or a.heads) * d
        firsts = group.mlp.matrices - 1
        mlp = firsts * group.mlp.dense_width if group.mlp.bias else 0
        heads = (q + kv if a.qk_norm == "width" else 0) + (q if a.output_norm else 0) + (a.heads if a.sinks else 0)
        return (q + 2 * kv if a.qkv_bias and a.kind != "latent" else 0) + mlp + heads

    def whole_params_of(self, group: LayerGroup) -> int:
        """Parameters of one layer that every tensor-parallel rank holds: norms, router, latent down-projections, and
        biases after a reduction."""
        a, d, m, h = group.attention, self.head_dim_of(group), group.mlp, self.hidden_of(group)
        biases = (h if a.out_bias else 0) + (h if m.bias and m.dense_width else 0)
        router = h * m.experts + (m.experts if m.router_bias else 0) if m.routed else 0
        gate = h if m.shared_gate else 0
        latent = 0
        if a.kind == "latent":
            q, kv = a.q_lora_rank or 0, a.kv_lora_rank or 0
            latent = h * (q + kv + a.rope_dim) + q + kv  # with the norms of both latents
            latent += q + kv + a.rope_dim if a.qkv_bias else 0
        norms = group.n_norms * self.norm_params_of(group) + (2 * d if a.qk_norm == "head" else 0)
        return norms + biases + router + gate + latent

    def layer_params_of(self, group: LayerGroup) -> int:
        """All parameters of one layer of `group`."""
        split = self.matmul_params_of(group) + self.split_bias_params_of(group) + self.expert_params_of(group)
        return split + self.whole_params_of(group)

    def active_params_of(self, group: LayerGroup) -> int:
        """Weights of one layer that a token passes through in matrix products: its top_k experts only."""
        a, m, h = group.attention, group.mlp, self.hidden_of(group)
        routed = m.top_k * m.matrices * h * m.width + h * m.experts if m.routed else 0
        down = h * ((a.q_lora_rank or 0) + (a.kv_lora_rank or 0) + a.rope_dim) if a.kind == "latent" else 0
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
    def front_params(self) -> int:
        """Front ends outside their layers: patch embeddings, positions, norms, projectors."""
        return sum(front.params(self.hidden) for front in self.fronts)

    @property
    def head_params(self) -> int:
        """Output head as separate parameters: its bias alone when tied."""
        return (0 if self.tied_embeddings else self.vocab * self.hidden) + (self.vocab if self.head_bias else 0)

    @property
    def mtp_params(self) -> int:
        """Parameters of the multi-token prediction modules; not part of `total_params`, as in published counts."""
        return self.mtp * (self.layer_params_of(self.layers[-1]) + 2 * self.hidden**2 + 3 * self.norm_params)

    @cached_property
    def total_params(self) -> int:
        """Every parameter of the network that is kept after training, tied ones once."""
        layers = sum(g.count * self.layer_params_of(g) for g in self.layers)
        return self.embedding_params + self.position_params + self.front_params + layers + self.norm_params + self.head_params

    def visited_params_of(self, group: LayerGroup) -> int:
        """Parameters of one layer that a token uses: all but the routed experts that it does not visit."""
        m = group.mlp
        return self.layer_params_of(group) - self.expert_params_of(group) // m.experts * (m.experts - m.top_k)

    @cached_property
    def active_params(self) -> int:
        """Parameters that one token uses: all but the routed experts that it does not visit."""
        return self.total_params - sum(g.count * (self.layer_params_of(g) - self.visited_params_of(g)) for g in self.layers)

    def flops_per_token(self, seq_len: int, convention: FlopsConvention = "full") -> float:
        """Training FLOPs a token, forward and backward.

        6 (N - input embeddings) + 12 L q s with `full` attention (PaLM, arXiv 2204.02311, appendix B, with the input
        embedding left out because it is a lookup); `causal` counts the keys that a query sees, s / 2; `recompute` is
        `full` with the layers at 4/3: the forward pass, a third of them, runs twice (8 N instead of 6 N; Narayanan et al.,
        arXiv 2104.04473, appendix). Of routed experts, those visited count. Multi-token modules count as trained, encoder
        layers by the encoder tokens that a sequence brings.
        """
        total = 6.0 * self._end_products(seq_len) + self.mtp * self.layer_flops(self.layers[-1], seq_len, convention)
        for g in self.layers:
            length = g.front.tokens if g.front else seq_len
            total += length / seq_len * g.count * self.layer_flops(g, length, convention)
        return total

    def product_params(self, seq_len: int) -> float:
        """Weights that one token passes through in matrix products, on average over a sequence of `seq_len` tokens."""
        total = self._end_products(seq_len) + self.mtp * self.active_params_of(self.layers[-1])
        for g in self.layers:
            total += (g.front.tokens / seq_len if g.front else 1.0) * g.count * self.active_params_of(g)
        return total

    def _end_products(self, seq_len: int) -> float:
        """The part of `product_params` outside the layers: heads, projections of multi-token modules, front ends."""
        total = float(self.vocab * self.hidden * (1 + self.mtp) + self.mtp * 2 * self.hidden**2)
        for front in self.fronts:
            projector = sum(n * m for n, m in front.projector_shapes(self.hidden)) / front.merge
            total += (projector + front.hidden * front.patch) * front.tokens / seq_len
        return total

    def layer_flops(self, g: LayerGroup, length: int, convention: FlopsConvention) -> float:
        """Training FLOPs of one layer of `g` for a token of a sequence of `length`."""
        a = g.attention
        if a.kind == "linear":  # one state of d x d a head, updated and read
            keys = float(self.head_dim_of(g))
        else:
            keys = a.mean_keys_of(length) if convention == "causal" else float(a.keys_of(length))
        once = 6.0 * self.active_params_of(g) + 12.0 * a.heads * self.attention_dim_of(g) * keys
        return once * 4 / 3 if convention == "recompute" else once
