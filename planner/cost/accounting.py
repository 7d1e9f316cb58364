"""How an engine keeps bytes and moves data, as data: the cost functions take it as an argument.

Two engines run "the same" layout with different memory and traffic. Everything in which they differ is a field here;
`engines/<name>.py` fills it in, with the origin of each value. Symbols: e bytes of a compute element, T tokens of one
micro-batch on one rank, D = dp * cp, "unit" one transformer layer as the engine gathers and reduces it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

COMPUTE: Literal["compute"] = "compute"
"""Stands for the bytes of one element of the job's compute type."""
Size = float | Literal["compute"]
Width = Literal[
    "hidden",
    "q",
    "kv",
    "v",
    "mlp",
    "heads",
    "one",
    "scores",
    "q_latent",
    "kv_latent",
    "routed",
    "routed_mlp",
    "experts",
    "returned",
    "routes",
    "arrivals",
]
"""Widths of a token's row. `mlp` is the dense or shared width; `scores` is one head's row of attention scores, for all heads.
Rows come once for every expert that a token visits: `returned` (h wide), `routed` (the same, gathered where tensor
parallelism splits experts: once for each of its ranks), `routed_mlp` (expert width). `routes` and `arrivals` are one element of
each of the rows of `returned` and `routed`."""
Split = Literal["sequence", "tensor", "none"]
Part = Literal["params", "grads", "optimizer"]
When = Literal["always", "accumulating", "single", "single_sharded", "sharded", "copied"]


ALONE = -1
"""Key of the rule, among those of ZeRO stages, of a rank that shares its parameters with no other; see `memory.alone`."""
BY_ENGINES = 10
"""What the key of a stage's rule is more where copy engines gather and reduce; see `memory.by_engines`. They take nothing from
products beside them, and leave nothing exposed that compute can hide."""

EAGER_KERNELS = (175.0, 325.0)
"""Launches of one eager PyTorch layer, forward and backward, at the 5 us a launch of a current host: 2.5 ms a layer measured
with the bundled runtime beside an H200 (torch 2.11). Other eager engines are taken to be alike."""


SPLIT_KERNELS = (290.0, 480.0)
"""Launches of the backward of one eager PyTorch layer for inputs, and of that for weights, when they run apart: 1.4 and 2.4 ms
of host time measured with torch.distributed.pipelining's two functions beside an H200 (torch 2.11; the whole backward 1.5 ms).
The latter walks the graph once for each matrix and norm."""


SPLIT_BYTES = 20.0
"""Bytes moved for each weight of a layer beyond the whole backward when weight gradients are computed apart: 1.0 ms of a 218M
layer on an H200, the same with 4,096 and 8,192 tokens (torch 2.11)."""


TP_CALL = 60e-6
"""Seconds that a tensor-parallel collective takes beyond its transfer where Python calls it between eager kernels: measured
for small messages between two H200 (torch 2.11)."""


@dataclass(frozen=True)
class Saved:
    """A tensor that one layer keeps for backward: `count` rows of `width`, a token.

    `split`: over the tp group always ("tensor"), only under sequence parallelism ("sequence"), or never ("none").
    `kept`: the recompute modes under which it stays. `only`: kinds of model or layout that have it at all.
    """

    name: str
    width: Width
    count: float
    split: Split
    size: Size = COMPUTE
    kept: tuple[str, ...] = ("none",)
    only: tuple[str, ...] = ()
    feeds: tuple[tuple[Literal["attention", "mlp", "experts"], float], ...] = ()
    """Rows among `count` that are kept only as inputs of the matrices of a target (`Adapter.targets`)."""


@dataclass(frozen=True)
class Held:
    """Bytes kept for every parameter of a rank; divided by D when `shard`.

    `when`: "accumulating" only with more than one micro-batch, "single" only with one, "sharded" only when D > 1,
    "copied" only when D > 1 or the compute type is not fp32.
    """

    part: Part
    size: Size
    shard: bool
    when: When = "always"
    host: bool = False
    """Whether it lives in host memory with optimizer offload; optimizer states always do."""


@dataclass(frozen=True)
class Traffic:
    """One collective over the D ranks that share a parameter's states, for all parameters of a rank."""

    op: Literal["all_gather", "reduce_scatter", "all_reduce"]
    size: Size
    per: Literal["step", "microbatch"]
    under: Literal["forward", "backward", "nothing"]
    """The compute that it may hide under; step-wise traffic alone may have none."""
    over: Literal["shard", "replicas"] = "shard"
    """The ranks that share one copy of the states, or those that hold the same part of its copies (hybrid sharding)."""


@dataclass(frozen=True)
class ZeroRule:
    """What one ZeRO stage holds and moves."""

    backward: tuple[Held, ...]
    """While micro-batches run."""
    update: tuple[Held, ...]
    """While the optimizer runs."""
    traffic: tuple[Traffic, ...]
    pooled: tuple[Held, ...] = ()
    """Beside `backward`, not allocated but kept by the allocator: memory of a stream of its own, which no other gets."""
    resident: tuple[Held, ...] = ()
    """A parameter of one layer, and of the head on its rank: buffers that exist once, for as long as the process."""
    received: tuple[Held, ...] = ()
    """A parameter of one layer that others share, from each of the other ranks: buffers that exist once as well."""
    unit: tuple[Held, ...] = ()
    """A parameter of the layer whose backward runs: gathered copies, its gradient before reduction."""
    unit_reduction: tuple[Held, ...] = ()
    """A parameter of the layer whose gradients are being reduced, beside `unit`: its activations are gone by then."""
    carried: tuple[Held, ...] = ()
    """A parameter of the last unit of a micro-batch, into the next one: its reduction's input is freed only then."""
    head: tuple[Held, ...] = ()
    """A parameter of the head's unit while the loss runs backward."""
    head_reduction: tuple[Held, ...] = ()
    """A parameter of the head's unit while the last layer's backward runs."""
    last_reduction: tuple[Held, ...] = ()
    """A parameter of the layer before the last unit, when backward ends."""
    last_unit: tuple[Held, ...] = ()
    """A parameter of the last unit when backward ends: the embedding on the first rank, a layer elsewhere."""
    own: tuple[Held, ...] = ()
    """A parameter of the unit whose backward runs: its gradient. A layer's come matrix by matrix: at the peak of its
    temporaries, the product before the MLP's last matrix, only that one's exists."""
    finish: tuple[Held, ...] = ()
    """A parameter of the unit whose backward ends: its gradient and reduction, its activations gone."""
    reduced: tuple[Held, ...] = ()
    """The part of `finish` that is made when the unit's own gradient is gone, but for one that its last operation still has."""
    released: tuple[Held, ...] = ()
    """A parameter of a unit in reduction: what `backward` counts of it and is freed by then."""
    ahead: tuple[Held, ...] = ()
    """The part of `unit` that is of the next layer, gathered ahead."""
    again: tuple[Held, ...] = ()
    """A parameter of the embedding when the next micro-batch's forward gathers it beside what the last backward left."""


@dataclass(frozen=True)
class Elementwise:
    """Bytes that norms, activations, rotary and residuals move in one layer, a token (e = 2; scaled for others)."""

    hidden: float
    mlp: float
    """Rows of the dense or shared width, and of the expert width of routed tokens."""
    q: float
    kv: float
    routed: float = 8.0
    """Rows of h for each expert that a token visits: permutation, its inverse, and the weighted sum."""
    experts: float = 1.0
    """Rows of the expert width over those of the dense one (`mlp`): less where products and activation are fused."""
    norm: float = 0.0
    """Rows of h more where norms are not fused, split like `hidden`."""


@dataclass(frozen=True)
class TpTraffic:
    """Collectives of one layer over the tp group, each of T * h * e bytes, counted by kind."""

    forward: dict[str, int]
    backward: dict[str, int]
    recompute: dict[str, dict[str, int]]
    """Repeated ones by recompute mode."""
    stops_early: bool = False
    """Recompute stops at the last tensor that backward reads: `recompute` is without a layer's last sum, and where backward
    reads that too all of `forward` is repeated (`operators.repeated`)."""


@dataclass(frozen=True)
class Accounting:
    """One engine's memory and traffic."""

    name: str
    """Engine, and its recipe where it has several: `megatron`, `megatron+2021`."""
    saved: tuple[Saved, ...]
    zero: dict[int, ZeroRule]
    tp_sequence: TpTraffic
    """With sequence parallelism."""
    tp_plain: TpTraffic
    """Without."""
    elementwise_forward: dict[str, Elementwise]
    """By MLP kind, `gelu` or `gated`."""
    elementwise_backward: dict[str, Elementwise]
    recomputed: dict[str, dict[str, float]]
    """Share of each operator that backward repeats, by recompute mode; of `gemm`, `attention`, `elementwise`, `experts`."""
    logit_bytes: float
    """Peak bytes of the loss for each token and vocabulary entry, at e = 2."""
    logit_bytes_fp32: float
    """The same at e = 4."""
    logits_split: bool
    """The logits are split over the tp group (vocabulary-parallel loss)."""
    logit_bytes_split: float
    """More of them when the loss runs over logits split over tp, at any e."""
    pipeline_logits: float
    """Elements of each token and vocabulary entry that a pipeline's last rank keeps besides: its stage's output."""
    logits_wait: float
    """Bytes of the loss that each waiting micro-batch keeps for a token and vocabulary entry, at e = 2 (GPipe)."""
    loss_in_pieces: bool = field(default=False, kw_only=True)
    """Head, loss and their gradients are made piece by piece of the tokens (`specs.pieces`): `logit_bytes` are of a piece."""
    ends_exchanged: bool = field(default=False, kw_only=True)
    """The exchanges of the embedding over tp, and of embedding and head with every micro-batch (ZeRO 2 and 3), are charged.
    Engines whose published runs the model was compared with do without: there they are part of what was measured."""
    positions_split: bool = field(default=False, kw_only=True)
    """Learned positions are split over the tp group like the vocabulary."""
    embedding_gradient_whole: bool
    """The embedding's gradient is made, and accumulated, for the whole vocabulary before it is split over tp."""
    head_hidden: float
    """Rows of h elements kept for the head, a token, split like the sequence."""
    head_gathered: float
    """Rows of h elements kept for the head when tp > 1, a token, never split."""
    loss_traffic: float
    """Bytes moved by the loss for each token and vocabulary entry, forward and backward."""
    backward_mlp: float
    """Temporary rows of f elements in a layer's backward, a token, split over tp."""
    backward_hidden: float
    """Temporary rows of h elements in a layer's backward, a token, never split."""
    receive_all_microbatches: bool
    """Pipeline receive buffers exist for every micro-batch; otherwise for `receive_count`."""
    receive_count: int
    gradients_as_made: bool = field(default=False, kw_only=True)
    """Gradients take memory from the first backward of a step on, not for as long as the process."""
    symmetric_sends: bool = field(default=False, kw_only=True)
    """On the GPUs of one node receive buffers are symmetric memory, which every rank of a pipeline has equally much of."""
    keeps_stage_output: bool
    """Each micro-batch in flight holds its stage's output too."""
    boundary_copies: float = field(default=1.0, kw_only=True)
    """Boundary tensors kept for each micro-batch in flight where `keeps_stage_output`."""
    pp_exposed: dict[str, float]
    """Share of the pipeline's point-to-point time that is not hidden, by schedule."""
    tp_call: float = field(default=0.0, kw_only=True)
    """Fixed seconds of each tensor-parallel collective besides: the call and the streams' synchronisation."""
    tp_overlap: float
    """Share of tp collectives that hides under compute."""
    dp_window: float
    """Share of one micro-batch's stage time under which step-wise traffic hides."""
    dp_floor: float
    """Share of dp traffic that is exposed even when it would fit."""
    step_floor: float = field(default=0.0, kw_only=True)
    """The same of step-wise traffic where that is more: what its kernels take from compute beside them."""
    kernels_forward: float
    """Kernels that the host launches for one layer forward: the floor under small layers."""
    kernels_backward: float
    kernels_tp: tuple[float, float]
    """More of them with tp > 1, forward and backward: dispatch of distributed tensors."""
    kernels_gather: tuple[float, float]
    """More of them where every micro-batch gathers parameters (ZeRO 3), forward and backward."""
    optimizer_bytes: float
    """Bytes that clipping and the optimizer move for each parameter they own."""
    optimizer_whole_bytes: float
    """Bytes moved for each parameter of the rank, sharded or not."""
    step_seconds: float
    """Fixed host time of one step."""
    reserved_ratio: float
    """Reserved over allocated memory."""
    context: Literal["ring", "ulysses"] = "ring"
    """How a cp group shares attention: keys and values around a ring under it (Liu 2023, arXiv 2310.01889), or heads exchanged
    for tokens before and after it (Jacobs 2023, arXiv 2309.14509)."""
    ring_gradients: Size = COMPUTE
    """Type of the gradients of keys and values that go around a ring."""
    ring_counted: bool = False
    """Whether a ring is priced send by send: gradients also go the last step home, full recompute repeats forward's sends.
    Otherwise backward sends twice what forward does, and recompute nothing."""
    ring_merge: tuple[tuple[float, float], tuple[float, float]] = ((0.0, 0.0), (0.0, 0.0))
    """Bytes moved for each block but a rank's own, a token, at e = 2: (an element of its queries, of its keys and values) for
    merging outputs forward, and for adding up gradients backward."""
    kernels_ring: tuple[float, float] = (0.0, 0.0)
    """More kernels for each block but a rank's own, forward and backward."""
    attention: Literal["fused", "unfused"] = "fused"
    """Whether attention keeps its scores on chip (FlashAttention) or writes them."""
    attention_rate: float = 1.0
    """Rate of its attention kernels over those of the device's profile."""
    ring_rate: tuple[float, float] | None = None
    """Most FLOP/s of a compute unit of its attention around a ring, forward and backward, where that has kernels of its own."""
    windows: bool = True
    """Whether attention kernels skip the keys outside a sliding window."""
    mask_elements: float = 0.0
    """Elements of the compute type kept for each pair of tokens of a sequence where attention is local by a mask."""
    score_bytes: tuple[float, float] = (9.0, 11.0)
    """Bytes moved for each score of unfused attention, forward and backward: fused scale, mask and softmax, and dropout."""
    backward_scores: float = 0.0
    """Temporary bytes of each score in the backward of unfused attention."""
    wgrad: float = 1.05
    """Time of a weight gradient's product over that of an input gradient's of the same size: it also accumulates."""
    product_times: float = 1.0
    """Time of products on a GPU over what they take back to back: between kernels that wait for memory clocks are higher."""
    gather_copies: tuple[float, float] = (0.0, 0.0)
    """Bytes moved around each gather of parameters: for each that the rank owns, and for each of the whole."""
    reduce_copies: tuple[float, float] = (0.0, 0.0)
    """Bytes moved for each gradient around a reduction; and for each of the rank's share where several are added up."""
    engine_copies: tuple[float, float] = (0.0, 0.0)
    """Bytes moved for each gradient around a reduction by copy engines, in place of the first of these; and for each of the
    rank's share, which the rank adds up by itself."""
    whole_sums: float = 0.0
    """Bytes moved for each gradient of a micro-batch where they are added up before they are reduced."""
    tp_copies: tuple[float, float] = (0.0, 0.0)
    """Bytes moved for each element of the hidden states beside an all-gather and a reduce-scatter over tp, which put sequences
    together and apart."""
    loss_traffic_split: float = 0.0
    """Bytes that the loss moves more for each element of logits that are split over tp."""
    kernels_narrow: tuple[float, float] = (0.0, 0.0)
    """More launches of a layer, or the host's work as so many, where products are in a narrow type, forward and backward."""
    pp_split: bool = False
    """Boundary tensors are split over tp on the wire even without sequence parallelism (scatter-gather)."""
    pp_slot: float = 0.0
    """Fixed seconds of a stage for each micro-batch of a pipeline: host and synchronisation."""
    ep_overlap: float = 0.0
    """Share of expert-parallel exchanges that hides under compute."""
    ep_once: bool = False
    """A token goes to a rank, or over the network to a node, only once however many of its experts live there
    (DeepEP, HybridEP)."""
    kernels_routed: tuple[float, float] = (40.0, 60.0)
    """More kernels where tokens are routed, forward and backward."""
    kernels_expert: tuple[float, float] = (0.0, 0.0)
    """More for each expert of a rank where grouped products are loops over experts, forward and backward: launches, and the
    host's work for each expert's parameters as so many launches."""
    kernels_padded: float = 1.6
    """Factor on `kernels_expert` in narrow types: the rows of each expert are padded, cast and scaled apart."""
    deferred: tuple[Saved, ...] = ()
    """Output gradients that one layer keeps from its backward for inputs to that for weights, where these run apart."""
    kernels_split: tuple[float, float] = SPLIT_KERNELS
    """Kernels of these two, in place of `kernels_backward`."""
    split_bytes: float = SPLIT_BYTES
    """Bytes that they move for each weight beyond the whole backward."""
    padding_bytes: float = 0.0
    """Bytes moved for each element of a routed row, forward and again backward, where rows of narrow products are padded
    before the experts and cut after them in passes of their own."""
    experts_join: bool = False
    """Experts on the same ranks as the rest of their layer are gathered and reduced with it, in one collective."""
    etp_op: Literal["all_gather", "all_to_all"] = "all_gather"
    """How rows reach, and leave, the ranks that split experts."""
    expert_slots: float = 1.0
    """Rows of the experts' buffers over those they get, where kernels run over whole buffers."""
    pipeline_zero: int | None = None
    """ZeRO stage that the engine uses under a pipeline in place of 3: it keeps parameters gathered between micro-batches."""
    balanced_stages: bool = False
    """Layers are spread over stages by cost, the head counted in."""
    outside_bytes: float = 0.0
    """Held outside the allocator besides context and communicators."""
    origin: dict[str, str] = field(default_factory=dict)
    """Where values come from, by field."""

    def size(self, size: Size, compute_bytes: int) -> float:
        """Bytes of a `Size` at a compute type."""
        return float(compute_bytes) if isinstance(size, str) else float(size)
