"""What a layer is: attention, MLP or mixture of experts, norms around them, and the front end that feeds it.

Symbols in docstrings: h hidden, q = heads * head_dim, kv = kv_heads * head_dim, f MLP width.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from planner.specs.base import Spec

Size = Annotated[int, Field(gt=0, lt=2**31)]
"""A whole number above zero."""


def _from_flag(value: Any) -> Any:
    """Files of earlier versions say true or false."""
    return {True: "head", False: "none"}[value] if isinstance(value, bool) else value


class Attention(Spec):
    """Softmax attention: multi-head (kv_heads = heads), grouped-query, multi-query (kv_heads = 1); latent; or linear.

    `latent` is DeepSeek's multi-head latent attention (arXiv 2405.04434, section 2.1): queries and keys of
    `head_dim` = nope + rope_dim, values of `v_head_dim`, both projected up from low-rank latents. `linear` keeps one
    head_dim x head_dim state a head instead of scores (lightning attention, arXiv 2501.08313).
    """

    kind: Literal["softmax", "latent", "linear"] = "softmax"
    """The attention family."""
    q_lora_rank: Size | None = None
    """Rank of the query latent; queries are projected directly when left out. Latent attention only."""
    kv_lora_rank: Size | None = None
    """Rank of the key/value latent: required with latent attention."""
    rope_dim: int = Field(default=0, ge=0, lt=2**31)
    """Rotary part of each query and of the one shared key. Latent attention only."""
    v_head_dim: Size | None = None
    """Width of one value head; head_dim when left out. Latent attention only."""
    heads: int = Field(gt=0, lt=2**31)
    """Query heads."""
    kv_heads: Size | None = None
    """Key and value heads; as many as `heads` when left out."""
    head_dim: Size | None = None
    """Width of one head; hidden / heads when left out. It may differ from that (Qwen3-32B: 128, not 5120 / 64)."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections (gpt2, qwen2); on the down-projections of latent attention."""
    out_bias: bool = False
    """Bias on the output projection (gpt2)."""
    qk_norm: Annotated[Literal["none", "head", "width"], BeforeValidator(_from_flag)] = "none"
    """Norm of queries and keys: over each head (qwen3: 2 * head_dim parameters a layer), or over the whole width
    (olmo2: q + kv parameters)."""
    output_gate: bool = False
    """A gate over the output of the heads, projected from the layer's input: h * q parameters (lightning attention)."""
    output_norm: bool = False
    """A norm over the joined heads before the output projection: q parameters (lightning attention)."""
    sinks: bool = False
    """One learned logit a head that takes attention from all tokens (gpt-oss)."""
    softcap: float | None = Field(default=None, gt=0)
    """Scores are bounded to it by a tanh (gemma2)."""
    rope_share: float = Field(default=1.0, ge=0, le=1)
    """Part of each head that rotary positions turn: 1 all, 0 none (layers without positions in llama4)."""
    causal: bool = True
    """A token sees no later ones; false in encoders."""
    sliding_window: Size | None = None
    """Tokens that a query attends to; all earlier ones when left out."""
    chunk: Size | None = None
    """Length of the blocks inside which tokens attend to each other (llama4: 8,192; an encoder: tokens of one image)."""

    @model_validator(mode="after")
    def _one_locality(self) -> Attention:
        if self.sliding_window and self.chunk:
            raise ValueError("give sliding_window or chunk, one of them")
        return self

    def keys_of(self, seq_len: int) -> int:
        """Most keys that a query of a sequence sees."""
        return min(self.sliding_window or self.chunk or seq_len, seq_len)

    def mean_keys_of(self, seq_len: int) -> float:
        """Keys that a query sees on average: s / 2 when causal, w (1 - w / 2s) with a window w, half a chunk."""
        keys = float(self.keys_of(seq_len))
        if not self.causal:
            return keys
        return keys * (1.0 - keys / (2.0 * seq_len)) if self.sliding_window else keys / 2.0


class Mlp(Spec):
    """An MLP: `gelu` is up-activation-down (2 matrices), `gated` is SwiGLU-like (3 matrices); or a mixture of such experts."""

    kind: Literal["gelu", "gated"]
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_silu"] | None = None
    """The function; silu when gated, gelu otherwise, when left out. It costs the same; what trains has to know it."""
    width: int = Field(gt=0, lt=2**31)
    """Inner width f; of one expert where there are several."""
    bias: bool = False
    """Biases on every projection of the MLP, of experts too."""
    experts: Size = 1
    """Routed experts; 1 is a dense MLP."""
    top_k: Size = 1
    """Routed experts that each token visits."""
    shared_width: int = Field(default=0, ge=0, lt=2**31)
    """Inner width of the experts that every token visits, summed; 0 for none."""
    shared_gate: bool = False
    """A gate over the shared experts' output: h parameters (qwen2_moe)."""
    router_bias: bool = False
    """A trained bias of the router's logits: one parameter an expert (gpt-oss). DeepSeek's, which balances, is not trained."""
    capacity: float | None = Field(default=None, gt=0)
    """Slots of an expert over its even share of tokens, padded; dropless when left out."""
    imbalance: float = Field(default=1.0, ge=1)
    """Tokens of the busiest rank's experts over the mean: what routing leaves after its balancing loss."""

    @model_validator(mode="after")
    def _routing_is_possible(self) -> Mlp:
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} exceeds the {self.experts} experts")
        if self.experts == 1 and (self.shared_width or self.capacity or self.router_bias or self.imbalance > 1):
            raise ValueError("shared_width, capacity, router_bias and imbalance need more than one expert")
        if self.shared_gate and not self.shared_width:
            raise ValueError("shared_gate needs shared experts: set shared_width")
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


class FrontEnd(Spec):
    """An encoder before the language model: its own width and tokens, patches in, a projector out.

    Its layers are layer groups of the model that carry it; groups of one encoder repeat the same front end.
    """

    name: str = Field(default="vision", min_length=1)
    hidden: Size
    """Width of the encoder."""
    tokens: Size
    """Encoder tokens that one training sequence brings: images times patches of an image."""
    patch: Size
    """Values of one patch: 3 * 14 * 14 for 14-pixel patches of colour images."""
    patch_bias: bool = False
    """Bias of the patch embedding."""
    positions: int = Field(default=0, ge=0, lt=2**31)
    """Rows of its learned position embedding; 0 for none."""
    class_token: bool = False
    """One learned token more: h parameters."""
    extra_norms: int = Field(default=0, ge=0, le=8)
    """Norms outside its layers."""
    norm_bias: bool = True
    """Whether its norms have biases (LayerNorm)."""
    merge: Size = 1
    """Encoder tokens joined into one before the projector."""
    projector: list[Size] = Field(default_factory=list)
    """Inner widths of the projector, between hidden * merge and the model's hidden: one matrix more than entries."""
    projector_bias: bool = True

    def projector_shapes(self, model_hidden: int) -> list[tuple[int, int]]:
        """(inputs, outputs) of each matrix of the projector."""
        widths = [self.hidden * self.merge, *self.projector, model_hidden]
        return list(itertools.pairwise(widths))

    def params(self, model_hidden: int) -> int:
        """Parameters outside its layers: patch embedding, positions, norms, projector."""
        rows = self.positions + int(self.class_token) + int(self.patch_bias) + self.patch
        norms = self.extra_norms * (2 if self.norm_bias else 1)
        projector = sum(n * m + (m if self.projector_bias else 0) for n, m in self.projector_shapes(model_hidden))
        return self.hidden * (rows + norms) + projector


class LayerGroup(Spec):
    """`count` identical transformer layers in a row: attention and MLP, each with a residual and norms."""

    count: int = Field(gt=0, le=10_000)
    attention: Attention
    mlp: Mlp
    norms: Literal["pre", "post", "both", "shared"] = "pre"
    """Before each of the two (pre), after each inside the residual (post, olmo2), both (gemma2: four), or one before a
    parallel block (shared, falcon-7b)."""
    parallel: bool = False
    """Attention and MLP read the same input and are summed (gpt_neox, falcon)."""
    front: FrontEnd | None = None
    """The encoder that these layers belong to; the language model itself when left out."""

    @model_validator(mode="after")
    def _shared_norm_is_parallel(self) -> LayerGroup:
        if self.norms == "shared" and not self.parallel:
            raise ValueError("norms: shared needs parallel: true")
        return self

    @property
    def n_norms(self) -> int:
        """Norms over the hidden width in one layer."""
        return {"pre": 2, "post": 2, "both": 4, "shared": 1}[self.norms]
