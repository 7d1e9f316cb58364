"""The operators of one layer, the embedding and the head: shapes after tp and cp, their compute and their traffic.

Everything here depends on (tp, cp, ep, etp, micro_batch, sequence_parallel) only, a few hundred combinations at most; `step`
evaluates those once and spreads the result over all layouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from planner.cost import adapters, pieces
from planner.cost.accounting import TpTraffic
from planner.cost.collectives import collective_seconds
from planner.cost.compute import (
    AttentionWork,
    fused_attention_seconds,
    gemm_seconds,
    overlapped,
    streaming_seconds,
    unaligned_seconds,
    unfused_attention_seconds,
)
from planner.cost.memory import around_a_ring, slots
from planner.cost.task import Bools, Floats, LayoutArray, Task


@dataclass(frozen=True)
class LayerSeconds:
    """Seconds of one layer and one micro-batch, float64 arrays of equal length. Device time, without the host's floor."""

    forward: Floats
    backward: Floats
    host_forward: Floats
    """Time that the host needs to launch the layer."""
    host_backward: Floats
    recompute: tuple[Floats, Floats]
    """Repeated compute under (selective, full), the host's floor included."""
    tp_forward: Floats
    tp_backward: Floats
    tp_recompute: tuple[Floats, Floats]
    cp_forward: Floats
    cp_backward: Floats
    cp_recompute: tuple[Floats, Floats]
    """Traffic of the cp group that (selective, full) recompute repeats."""
    ep_forward: Floats
    """Exposed exchanges of routed tokens."""
    ep_backward: Floats
    ep_recompute: tuple[Floats, Floats]
    embedding: Floats
    embedding_tp: Floats
    head: Floats
    """Output head and loss, forward and backward."""
    head_tp: Floats
    weight: Floats
    """The part of `backward` that computes weight gradients."""
    host_split: tuple[Floats, Floats]
    """Time that the host needs to launch the backward for inputs, and that for weights, when they run apart."""

    def again(self, k: int) -> Floats:
        """All that selective (0) or full (1) recompute repeats: compute and exposed traffic."""
        return self.recompute[k] + self.tp_recompute[k] + self.cp_recompute[k] + self.ep_recompute[k]


@dataclass(frozen=True)
class Shapes:
    """Sizes of one combination, float64 arrays."""

    tokens: Floats
    tp: Floats
    cp: Floats
    ep: Floats
    etp: Floats
    micro_batch: Floats
    split: Floats
    """What sequence parallelism divides by: tp with it, 1 without."""
    routed: Floats
    """Rows that the experts of one rank get: tokens times top_k (and capacity), over all its experts."""
    slots: Floats
    """Rows that their kernels run over."""
    ring: Bools
    """Whether a cp group sends keys and values around a ring."""


def layer_seconds(task: Task, combos: LayoutArray) -> LayerSeconds:
    """Costs of one layer for each combination; the model's layers are of one kind."""
    s = shapes_of(task, combos)
    parts_f, parts_b = layer_parts(task, s, 0), layer_parts(task, s, 1)
    traffic = combos.sequence_parallel == 1
    head, head_tp = _head(task, s, traffic)
    tp_f, tp_b, tp_r = _tp_traffic(task, s, traffic)
    ep_f, ep_b = _ep_traffic(task, s)
    cp_f, cp_b, cp_r = _cp_traffic(task, s, parts_f["attention"], parts_b["attention"])
    host_f, host_b = _host(task, s, 0), _host(task, s, 1)
    modes = zip(("selective", "full"), tp_r, strict=True)
    again = [_recompute(task, repeated_parts(task, s, mode, parts_f), mode, host_f, tp) for mode, tp in modes]
    ep_r = [ep_f * task.accounting.recomputed[mode].get("experts", 0.0) for mode in ("selective", "full")]
    moved = 3.0 * s.tokens * task.model.hidden * task.job.compute_bytes / s.split
    lookup = streaming_seconds(moved, task.hardware.device) + _front_seconds(task, s)
    zero = np.zeros_like(s.tp)
    return LayerSeconds(
        sum(parts_f.values(), zero), sum(parts_b.values(), zero), host_f, host_b,
        (again[0], again[1]), tp_f, tp_b, tp_r, cp_f, cp_b, cp_r, ep_f, ep_b, (ep_r[0], ep_r[1]),
        lookup, _embedding_tp(task, s, traffic), head, head_tp,
        _weight_seconds(task, s), (_host(task, s, 1, 0), _host(task, s, 1, 1)),
    )  # fmt: skip


def tables(task: Task) -> int:
    """Tables that split over tp: token embeddings, and learned positions where an engine splits them."""
    return 1 + int(task.accounting.positions_split and task.model.position_params > 0)


def _embedding_tp(task: Task, s: Shapes, sequence: np.ndarray) -> Floats:
    """Lookups in split tables are summed over the tokens' owners, and their gradients gathered."""
    if not task.accounting.ends_exchanged:
        return np.zeros_like(s.tp)
    place = (s.tp, np.ones_like(s.tp), hidden_bytes(task, s), task.hardware)
    both = collective_seconds("reduce_scatter", *place) + collective_seconds("all_gather", *place)
    return task.constant("tp") * tables(task) * np.where(sequence, both, 0.0)


def _weight_seconds(task: Task, s: Shapes) -> Floats:
    """Device time of one layer's weight gradients."""
    products = [p for p in layer_products(task, s, 1) if p.name.endswith(WEIGHT_GRADIENT)]
    return sustained(task) * sum((product_seconds(task, p) for p in products), np.zeros_like(s.tp))


def _front_seconds(task: Task, s: Shapes) -> Floats:
    """Patch embeddings and projectors of the front ends, forward and backward; not split over tp."""
    total = np.zeros_like(s.tp)
    for front in task.fronts:
        tokens = s.micro_batch * front.tokens / s.cp
        shapes = [(tokens, front.patch, front.hidden)]
        shapes += [(tokens / front.merge, n, m) for n, m in front.projector_shapes(task.model.hidden)]
        for rows, inputs, outputs in shapes:
            whole = Product("front", front.name, rows, np.full_like(rows, float(outputs)), np.full_like(rows, float(inputs)))
            total = total + sum(product_seconds(task, p) for p in (whole, *_gradients(whole)))
    return total * sustained(task)


def module_seconds(task: Task, tokens: Floats) -> Floats:
    """The projection of a multi-token prediction module from 2 h to h, forward and backward; not split over tp."""
    h = np.full_like(tokens, float(task.model.hidden))
    whole = Product("gemm", "multi-token projection", tokens, h, 2.0 * h)
    return sustained(task) * sum((product_seconds(task, p) for p in (whole, *_gradients(whole))), np.zeros_like(h))


def layer_parts(task: Task, s: Shapes, direction: int) -> dict[str, Floats]:
    """Device time of one layer by kind of operator, forward (0) or backward (1)."""
    slow = sustained(task)
    products = {"gemm": np.zeros_like(s.tp), "experts": np.zeros_like(s.tp)}
    for product in layer_products(task, s, direction):
        products[product.part] = products[product.part] + product_seconds(task, product)
    return {
        "gemm": slow * products["gemm"] + adapters.dequantise_seconds(task, s, experts=False),
        "attention": slow * _attention(task, s)[direction],
        "elementwise": task.constant("elementwise") * _elementwise(task, s, forward=direction == 0),
        "experts": slow * products["experts"] + adapters.dequantise_seconds(task, s, experts=True),
    }


def sustained(task: Task) -> float:
    """Factor on the time of compute: what a device loses under sustained load, and the fitted constant."""
    return task.hardware.device.sustained.base * task.constant("compute")


def bound_by_host(task: Task, seconds: Floats, beside: Floats, host: Floats) -> Floats:
    """Compute time of a layer whose device takes `seconds`, and `beside` for traffic: bound by device or by host.

    On a CPU the host is the device, and launching adds to the time.
    """
    if task.hardware.device.kind == "cpu":
        return seconds + host
    return np.maximum(seconds, host - beside)


def _host(task: Task, s: Shapes, direction: int, half: int | None = None) -> Floats:
    """Host time of one layer, forward (0) or backward (1), or of a half of a split backward: for inputs (0), for weights (1).

    Either half is taken to dispatch distributed tensors, route and pad like the whole.
    """
    a = task.accounting
    own = (a.kernels_forward, a.kernels_backward)[direction] if half is None else a.kernels_split[half]
    kernels = own + np.where(s.tp > 1, a.kernels_tp[direction], 0.0)
    mlp = task.model.layer.mlp
    if mlp.routed:
        each = a.kernels_expert[direction] * (1.0 if task.job.linears == "same" else a.kernels_padded)
        kernels = kernels + a.kernels_routed[direction] + each * np.maximum(mlp.experts / s.ep, 1.0)
    if task.job.linears != "same":
        kernels = kernels + a.kernels_narrow[direction]
    if any(a.kernels_ring):
        kernels = kernels + _other_blocks(s) * a.kernels_ring[direction]
    kernels = kernels + adapters.launches(task, direction)
    return kernels * task.hardware.device.launch.base * task.constant("host")


def shapes_of(task: Task, combos: LayoutArray) -> Shapes:
    """The sizes of each combination."""
    tp, cp, ep, etp, micro = (getattr(combos, name).astype(float) for name in ("tp", "cp", "ep", "etp", "micro_batch"))
    split = np.where(combos.sequence_parallel == 1, tp, 1.0)
    tokens = micro * task.job.seq_len / cp
    mlp = task.model.layer.mlp
    routed = tokens / split * etp * mlp.top_k * slots(mlp, combos.ep)
    return Shapes(tokens, tp, cp, ep, etp, micro, split, routed, routed * task.accounting.expert_slots,
                  around_a_ring(task, combos.context))  # fmt: skip


def repeated_parts(task: Task, s: Shapes, mode: str, forward: dict[str, Floats]) -> dict[str, Floats]:
    """Device time of forward by kind of operator, as a recompute mode may repeat it: selective keeps what a ring has merged."""
    if mode != "selective" or not any(map(any, task.accounting.ring_merge)):
        return forward
    moved = _merged_bytes(task, s, forward=True) * task.job.compute_bytes / 2.0
    merging = task.constant("elementwise") * streaming_seconds(moved, task.hardware.device)
    return forward | {"elementwise": forward["elementwise"] - merging}


def _recompute(task: Task, parts: dict[str, Floats], mode: str, host: Floats, tp: Floats) -> Floats:
    """Compute time of what a recompute mode repeats."""
    shares = task.accounting.recomputed[mode]
    if not shares:
        return np.zeros_like(host)
    device = sum((share * parts[n] for n, share in shares.items()), np.zeros_like(host))
    present = ("gemm", "attention", "elementwise")
    return bound_by_host(task, device, tp, host * sum(shares.get(n, 0.0) for n in present) / len(present))


class Product(NamedTuple):
    """A matrix product C[m, n] = A[m, k] B[k, n] of one layer or of the head."""

    part: str
    """Its kind of operator: `gemm`, `experts`, `head` or `front`."""
    name: str
    m: Floats
    n: Floats
    k: Floats
    groups: Floats | float = 1.0
    """Products in one launch."""
    times: float = 1.0
    """Factor in its time."""
    narrow: bool = True
    """Whether it runs in the job's narrow type where there is one."""


def layer_products(task: Task, s: Shapes, direction: int) -> list[Product]:
    """The projections, MLP, router, experts and adapters of one layer, forward (0) or backward (1).

    A frozen base has no weight gradients.
    """
    base = _attention_products(task, s) + _mlp_products(task, s) + _expert_products(task, s)
    thin = [Product(*p, narrow=False) for p in adapters.thin_products(task, s)]
    if direction == 0:
        return [p._replace(name=f"{p.name}: forward") for p in (*base, *thin)]
    wgrad, frozen = task.accounting.wgrad, task.job.adapter is not None
    whole = [gradient for p in base for gradient in _gradients(p, wgrad)[: 1 if frozen else 2]]
    return whole + [gradient for p in thin for gradient in _gradients(p, wgrad)]


def head_products(task: Task, s: Shapes) -> list[Product]:
    """The final projection: forward, and its two products of backward; a frozen one has no weight gradient."""
    vocab, adapter = task.model.vocab / s.tp, task.job.adapter
    whole = Product("head", "head", s.tokens, vocab, np.full_like(vocab, float(task.model.hidden)), narrow=False)
    backward = _gradients(whole)
    return [whole._replace(name="head: forward"), *(backward if not adapter or adapter.train_embeddings else backward[:1])]


def _gradients(p: Product, wgrad: float = 1.0) -> tuple[Product, Product]:
    """The products of backward: one for inputs, and one for weights, `wgrad` times slower than its size tells."""
    inputs = p._replace(name=f"{p.name}: input gradient", n=p.k, k=p.n)
    return inputs, p._replace(name=f"{p.name}{WEIGHT_GRADIENT}", m=p.k, k=p.m, times=wgrad)


def _attention_products(task: Task, s: Shapes) -> list[Product]:
    """The projections around attention."""
    model = task.model
    a, h = model.layer.attention, np.full_like(s.tp, float(model.hidden))
    if a.kind == "latent":
        return _latent_products(task, s, h)
    kv_rank = np.maximum(model.kv_heads / s.tp, 1.0) * model.head_dim  # kv heads are replicated when tp exceeds them
    q_rank = model.q_width / s.tp
    return [
        Product("gemm", "query, key, value", s.tokens, q_rank * (2.0 if a.output_gate else 1.0) + 2.0 * kv_rank, h),
        Product("gemm", "attention output", s.tokens, h, q_rank),
    ]


def _latent_products(task: Task, s: Shapes, h: Floats) -> list[Product]:
    """The projections around latent attention.

    Down-projections are not split over tp; under sequence parallelism each rank computes them for its tokens.
    """
    model, a = task.model, task.model.layer.attention
    own, q, kv = s.tokens / s.split, float(a.q_lora_rank or 0), float(a.kv_lora_rank or 0)
    query = a.heads * float(model.head_dim) / s.tp
    v = float(model.v_dim_of(model.layer))
    up = a.heads * (model.head_dim - a.rope_dim + v) / s.tp
    found = [
        Product("gemm", "key/value down", own, np.full_like(h, kv + a.rope_dim), h),
        Product("gemm", "key/value up", s.tokens, up, np.full_like(h, kv)),
    ]
    if q:
        found.append(Product("gemm", "query down", own, np.full_like(h, q), h))
        found.append(Product("gemm", "query up", s.tokens, query, np.full_like(h, q)))
    else:
        found.append(Product("gemm", "query", s.tokens, query, h))
    return [*found, Product("gemm", "attention output", s.tokens, h, a.heads * v / s.tp)]


def _mlp_products(task: Task, s: Shapes) -> list[Product]:
    """The dense MLP (or the shared experts), and the router."""
    mlp, h = task.model.layer.mlp, np.full_like(s.tp, float(task.model.hidden))
    found, name = [], "shared experts'" if mlp.routed else "MLP"
    if mlp.dense_width:
        inner = np.full_like(s.tp, float(mlp.dense_width)) / s.tp
        found.append(Product("gemm", f"{name} {_up(task)}", s.tokens, (mlp.matrices - 1.0) * inner, h))
        found.append(Product("gemm", f"{name} down", s.tokens, h, inner))
    if mlp.routed:
        found.append(Product("gemm", "router", s.tokens / s.split, np.full_like(h, float(mlp.experts)), h))
    return found


def _up(task: Task) -> str:
    """Name of the projection into the MLP."""
    return "gate, up" if task.model.layer.mlp.matrices == 3 else "up"


def _expert_products(task: Task, s: Shapes) -> list[Product]:
    """The routed experts: one grouped product for each projection, tokens spread evenly."""
    mlp = task.model.layer.mlp
    if not mlp.routed:
        return []
    groups = np.maximum(mlp.experts / s.ep, 1.0)
    m, h, inner = s.slots / groups, np.full_like(s.tp, float(task.model.hidden)), mlp.width / s.etp
    return [
        Product("experts", f"experts' {_up(task)}", m, (mlp.matrices - 1.0) * inner, h, groups),
        Product("experts", "experts' down", m, h, inner, groups),
    ]


WEIGHT_GRADIENT = ": weight gradient"
"""What names of products of weight gradients end with."""


def product_seconds(task: Task, p: Product) -> Floats:
    """Time of a product; the base's of the layers run in the narrow type where the job has one.

    A vocabulary may have any size, layers do not: the head's products alone are checked for rows that begin unaligned.
    """
    size, peak = float(task.job.compute_bytes), task.peak
    if p.narrow:
        size, peak = {"same": size, "fp8": 1.0, "fp4": 0.5}[task.job.linears], task.linear_peak
    beside = 1.0 if task.hardware.device.kind == "cpu" else task.accounting.product_times
    seconds = beside * p.times * gemm_seconds(p.m, p.n, p.k, task.hardware.device, peak, size, p.groups)
    return np.maximum(seconds, unaligned_head_seconds(task, p)) if p.part == "head" else seconds


def unaligned_head_seconds(task: Task, p: Product) -> Floats:
    """Least time of a product of the head whose rows begin unaligned; 0 of others, and where units do not load 16 bits."""
    device = task.hardware.device
    if p.part != "head" or device.kind == "cpu" or task.job.compute_bytes != 2:
        return np.zeros_like(p.m)
    return unaligned_seconds(p.m, p.n, p.k, device)


def _attention(task: Task, s: Shapes) -> tuple[Floats, Floats]:
    model, length = task.model, float(task.job.seq_len)
    attention = model.layer.attention
    if attention.kind == "linear":  # the state of d keys, and half of the block that is done by scores
        visible = 2.0 * model.head_dim + LINEAR_BLOCK
    elif task.accounting.windows:
        visible = 2.0 * attention.mean_keys_of(task.job.seq_len)
    else:
        visible = length
    width = model.attention_dim_of(model.layer)
    work = AttentionWork(s.micro_batch, length / s.cp, length, visible, model.heads / s.tp, width)
    a, device = task.accounting, task.hardware.device
    if a.attention == "fused" or attention.kind == "linear":
        forward, backward = (t / a.attention_rate for t in fused_attention_seconds(work, device, task.peak))
        if a.ring_rate is None or not np.any(s.ring):
            return forward, backward
        slow = (flops / (device.compute_units * rate) for flops, rate in zip(work.flops(), a.ring_rate, strict=True))
        there, back = (np.where(s.ring, np.maximum(t, own), t) for t, own in zip((forward, backward), slow, strict=True))
        return there, back
    return unfused_attention_seconds(work, device, task.peak, a.score_bytes)


LINEAR_BLOCK = 256
"""Tokens of a block of linear attention, inside which scores are computed (arXiv 2501.08313, section 2.2)."""
EXTRA_NORM = (7.0, 13.0)
"""Bytes that one more norm moves for each element of its input, forward and backward, at e = 2: 4 and 8, times the 1.4 to
2.2 that norms take over the time of their bytes on H200."""


def _elementwise(task: Task, s: Shapes, forward: bool) -> Floats:
    a, model = task.accounting, task.model
    mlp = model.layer.mlp
    norms = (model.layer.n_norms - 2) * EXTRA_NORM[0 if forward else 1]
    e = (a.elementwise_forward if forward else a.elementwise_backward)[mlp.kind]
    split = e.mlp * mlp.dense_width + e.q * model.q_width + e.kv * model.kv_width
    moved = s.tokens * ((e.hidden + e.norm + norms) * model.hidden / s.split + split / s.tp)
    moved = moved + _merged_bytes(task, s, forward)
    if mlp.routed:
        padding = 0.0 if task.job.linears == "same" else a.padding_bytes
        moved = moved + s.slots * ((e.routed + padding) * model.hidden + e.experts * e.mlp * mlp.width / s.etp)
    moved = moved * task.job.compute_bytes / 2.0 + adapters.added_bytes(task, s, 0 if forward else 1)
    seconds = streaming_seconds(moved, task.hardware.device)
    return seconds + _casts(task, s, e.experts) * (1.0 if forward else 2.0)


def _merged_bytes(task: Task, s: Shapes, forward: bool) -> Floats:
    """Bytes that merging what attention makes of the blocks around a ring moves."""
    query, key_value = task.accounting.ring_merge[0 if forward else 1]
    merged = query * task.model.q_width + key_value * 2.0 * task.model.kv_width
    return _other_blocks(s) * s.tokens * merged / s.tp


def _other_blocks(s: Shapes) -> Floats:
    """Blocks of keys and values that a rank gets around a ring."""
    return np.where(s.ring, s.cp - 1.0, 0.0)


def _casts(task: Task, s: Shapes, experts: float) -> Floats:
    """Time of quantising the inputs of narrow products: read two bytes, write one, for each; `experts` of the experts'."""
    if task.job.linears == "same":
        return np.zeros_like(s.tp)
    model, mlp = task.model, task.model.layer.mlp
    split = s.tokens * (2.0 * model.hidden / s.split + (model.q_width + mlp.dense_width) / s.tp)
    routed = experts * s.slots * (model.hidden + mlp.width / s.etp) if mlp.routed else 0.0
    return streaming_seconds(3.0 * (split + routed), task.hardware.device)


def hidden_bytes(task: Task, s: Shapes) -> Floats:
    """The hidden states of a micro-batch, whole over tp."""
    return s.tokens * task.model.hidden * task.job.compute_bytes


def tp_share(task: Task) -> float:
    """Of a layer's two rounds of tp collectives: one where attention and MLP are summed first, and where nothing but routed
    experts follows attention."""
    layer = task.model.layer
    return 1.0 if layer.mlp.dense_width and not layer.parallel else 0.5


def repeated(task: Task, traffic: TpTraffic, mode: str) -> dict[str, int]:
    """Tp collectives of one layer that a recompute mode repeats, where both rounds are there (`tp_share`).

    A layer's last sum is read by a norm after the MLP and by a gate of shared experts; and where nothing but routed experts
    follows attention by the norm before them.
    """
    counts, layer = traffic.recompute.get(mode, {}), task.model.layer
    read = layer.norms in ("post", "both") or layer.mlp.shared_gate or not layer.mlp.dense_width
    return traffic.forward if counts and traffic.stops_early and read else counts


def routed_bytes(task: Task, s: Shapes) -> Floats:
    """Rows that a rank sends to their experts."""
    return s.routed / s.etp * task.model.hidden * task.job.compute_bytes


def key_value_bytes(task: Task, s: Shapes) -> Floats:
    """Keys and values of the cp group."""
    return s.tokens * 2.0 * task.model.kv_width / s.tp * task.job.compute_bytes * s.cp


def ring_gradient_bytes(task: Task, s: Shapes) -> Floats:
    """Gradients of the keys and values of the cp group, as they go around a ring."""
    e = task.job.compute_bytes
    return key_value_bytes(task, s) * task.accounting.size(task.accounting.ring_gradients, e) / e


def tp_beside(task: Task, s: Shapes, op: str) -> Floats:
    """Seconds of a tp collective of hidden states besides its transfer: the call, and the copies around it."""
    a, places = task.accounting, {"all_gather": 0, "reduce_scatter": 1}
    moved = (a.tp_copies[places[op]] if op in places else 0.0) * hidden_bytes(task, s) / 2.0
    return np.where(s.tp > 1, a.tp_call + streaming_seconds(moved, task.hardware.device), 0.0)


def _tp_traffic(task: Task, s: Shapes, sequence: np.ndarray) -> tuple[Floats, Floats, tuple[Floats, Floats]]:
    """Exposed time of one layer's tensor-parallel collectives: forward, backward, (selective, full) recompute."""
    a = task.accounting
    n_bytes = hidden_bytes(task, s)
    share = (1.0 - a.tp_overlap) * task.constant("tp") * tp_share(task)
    cost = {
        op: share * (collective_seconds(op, s.tp, np.ones_like(s.tp), n_bytes, task.hardware) + tp_beside(task, s, op))
        for op in ("all_reduce", "all_gather", "reduce_scatter")
    }

    def total(counts: dict[str, int]) -> Floats:
        return sum((k * cost[op] for op, k in counts.items()), np.zeros_like(s.tp))

    def both(pick: TpTraffic, mode: str | None, backward: bool) -> Floats:
        return total(repeated(task, pick, mode) if mode else pick.backward if backward else pick.forward)

    with_sp, plain = a.tp_sequence, a.tp_plain
    values = [
        np.where(sequence, both(with_sp, mode, back), both(plain, mode, back))
        for mode, back in ((None, False), (None, True), ("selective", True), ("full", True))
    ]
    return values[0], values[1], (values[2], values[3])


def _ep_traffic(task: Task, s: Shapes) -> tuple[Floats, Floats]:
    """Exposed time of sending tokens to their experts and back, forward and backward.

    Two all-to-alls each way over ep; inside the experts' own tensor parallelism tokens are gathered and summed.
    """
    zero = np.zeros_like(s.tp)
    if not task.model.layer.mlp.routed:
        return zero, zero
    sent, device = routed_bytes(task, s), task.hardware
    copies = task.model.layer.mlp.top_k if task.accounting.ep_once else 1
    exchange = collective_seconds("all_to_all", s.ep, s.etp, sent, device, copies)
    inside = collective_seconds(task.accounting.etp_op, s.etp, np.ones_like(s.tp), sent * s.etp, device)
    once = (1.0 - task.accounting.ep_overlap) * task.constant("ep") * 2.0 * (exchange + inside)
    return once, once


def exchanged_bytes(task: Task, s: Shapes) -> dict[str, Floats]:
    """What a rank sends of one layer's heads for tokens, by tensor: queries, keys, values, and what attention makes of them."""
    model, one = task.model, s.tokens / s.tp * task.job.compute_bytes
    kv = one * model.kv_width
    return {"queries": one * model.q_width, "keys": kv, "values": kv, "attention output": one * model.q_width}


def _cp_traffic(task: Task, s: Shapes, forward: Floats, backward: Floats) -> tuple[Floats, Floats, tuple[Floats, Floats]]:
    """Exposed time of sharing attention over the cp group: forward, backward, and (selective, full) recompute.

    Around a ring (see `_ring_traffic`), or by exchanging four tensors by all-to-all, for which attention waits (Ulysses,
    Jacobs 2023, arXiv 2309.14509); any recompute repeats those.
    """
    zero = np.zeros_like(s.tp)
    exchange, ring = zero, (zero, zero, zero)
    if not np.all(s.ring):
        sent = exchanged_bytes(task, s).values()
        exchange = sum((collective_seconds("all_to_all", s.cp, s.tp, n_bytes, task.hardware) for n_bytes in sent), zero)
    if np.any(s.ring):
        ring = _ring_traffic(task, s, forward, backward)
    there, back, again = (np.where(s.ring, each, exchange) for each in ring)
    return there, back, (np.where(s.ring, 0.0, exchange), again)


def _ring_traffic(task: Task, s: Shapes, forward: Floats, backward: Floats) -> tuple[Floats, Floats, Floats]:
    """Exposed time of a ring: forward, backward, and full recompute.

    Keys and values pass to cp - 1 others under the attention that they feed (Liu 2023, arXiv 2310.01889); backward passes them
    again, and their gradients: counted send by send those go the last step home beside nothing.
    """
    a, slow, floor = task.accounting, task.hardware.overlap_slowdown.base, task.accounting.dp_floor
    once, gradients = (
        collective_seconds("all_gather", s.cp, s.tp, n_bytes, task.hardware)
        for n_bytes in (key_value_bytes(task, s), ring_gradient_bytes(task, s))
    )
    there = overlapped(forward, once, slow, floor)
    home = gradients / np.maximum(s.cp - 1.0, 1.0) if a.ring_counted else 0.0
    back = overlapped(backward, once + gradients, slow, floor) + home
    return there, back, there if a.ring_counted else np.zeros_like(once)


def loss_bytes(task: Task, s: Shapes) -> Floats:
    """Bytes that the loss moves, forward and backward."""
    model, a, e = task.model, task.accounting, task.job.compute_bytes
    wide = model.vocab / s.tp if a.logits_split else np.full_like(s.tp, float(model.vocab))
    more = pieces.more_traffic(s.tokens, e * wide, e) * wide * model.hidden if a.loss_in_pieces else 0.0
    each = a.loss_traffic + np.where(s.tp > 1, a.loss_traffic_split, 0.0)
    return each * s.tokens * wide * e / 2.0 + more


def _head(task: Task, s: Shapes, sequence: np.ndarray) -> tuple[Floats, Floats]:
    """(compute, tp traffic) of the final projection and the loss, forward and backward."""
    gemms = sum((product_seconds(task, p) for p in head_products(task, s)), np.zeros_like(s.tp))
    loss = streaming_seconds(loss_bytes(task, s), task.hardware.device) * task.constant("elementwise")
    n_bytes = hidden_bytes(task, s)
    one = np.ones_like(s.tp)
    gather = collective_seconds("all_gather", s.tp, one, n_bytes, task.hardware)
    reduce = collective_seconds("all_reduce", s.tp, one, n_bytes, task.hardware)
    return gemms * sustained(task) + loss, task.constant("tp") * np.where(sequence, 2.0 * gather, reduce)
