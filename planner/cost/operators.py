"""The operators of one layer, the embedding and the head: shapes after tp and cp, their compute and their traffic.

Everything here depends on (tp, cp, micro_batch, sequence_parallel) only, a few hundred combinations at most; `step`
evaluates those once and spreads the result over all layouts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.cost.accounting import TpTraffic
from planner.cost.collectives import collective_seconds
from planner.cost.compute import attention_seconds, gemm_seconds, overlapped, streaming_seconds
from planner.cost.task import Floats, LayoutArray, Task


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
    embedding: Floats
    head: Floats
    """Output head and loss, forward and backward."""
    head_tp: Floats


@dataclass(frozen=True)
class _Shapes:
    """Sizes of one combination, float64 arrays."""

    tokens: Floats
    tp: Floats
    cp: Floats
    micro_batch: Floats
    split: Floats
    """What sequence parallelism divides by: tp with it, 1 without."""


def layer_seconds(task: Task, combos: LayoutArray) -> LayerSeconds:
    """Costs of one layer for each combination."""
    s = _shapes(task, combos)
    gemm_f, gemm_b = _gemms(task, s)
    attention_f, attention_b = _attention(task, s)
    streams_f = _elementwise(task, s, forward=True)
    streams_b = _elementwise(task, s, forward=False)
    slow = task.hardware.device.sustained.base
    traffic = combos.sequence_parallel == 1
    head, head_tp = _head(task, s, traffic)
    tp_f, tp_b, tp_r = _tp_traffic(task, s, traffic)
    cp_f, cp_b = _cp_traffic(task, s, attention_f, attention_b)
    host_f, host_b = _host(task, s, 0), _host(task, s, 1)
    parts = {"gemm": gemm_f, "attention": attention_f, "elementwise": streams_f}
    again = [_recompute(task, parts, mode, host_f, tp) for mode, tp in zip(("selective", "full"), tp_r, strict=True)]
    moved = 3.0 * s.tokens * task.model.hidden * task.job.compute_bytes / s.split
    return LayerSeconds(
        slow * (gemm_f + attention_f + streams_f), slow * (gemm_b + attention_b + streams_b), host_f, host_b,
        (again[0], again[1]), tp_f, tp_b, tp_r, cp_f, cp_b,
        streaming_seconds(moved, task.hardware.device), head, head_tp,
    )  # fmt: skip


def bound_by_host(task: Task, seconds: Floats, beside: Floats, host: Floats) -> Floats:
    """Compute time of a layer whose device takes `seconds`, and `beside` for traffic: bound by device or by host.

    On a CPU the host is the device, and launching adds to the time.
    """
    if task.hardware.device.kind == "cpu":
        return seconds + host
    return np.maximum(seconds, host - beside)


def _host(task: Task, s: _Shapes, direction: int) -> Floats:
    """Host time of one layer, forward (0) or backward (1)."""
    a = task.accounting
    kernels = (a.kernels_forward, a.kernels_backward)[direction] + np.where(s.tp > 1, a.kernels_tp[direction], 0.0)
    return kernels * task.hardware.device.launch.base


def _shapes(task: Task, combos: LayoutArray) -> _Shapes:
    tp, cp, micro = (getattr(combos, name).astype(float) for name in ("tp", "cp", "micro_batch"))
    split = np.where(combos.sequence_parallel == 1, tp, 1.0)
    return _Shapes(micro * task.job.seq_len / cp, tp, cp, micro, split)


def _recompute(task: Task, parts: dict[str, Floats], mode: str, host: Floats, tp: Floats) -> Floats:
    """Compute time of what a recompute mode repeats."""
    names = task.accounting.recomputed[mode]
    if not names:
        return np.zeros_like(host)
    device = task.hardware.device.sustained.base * sum((parts[n] for n in names), np.zeros_like(host))
    return bound_by_host(task, device, tp, host * len(names) / len(parts))


def _gemms(task: Task, s: _Shapes) -> tuple[Floats, Floats]:
    """(forward, backward) time of the four projections; backward is one product for inputs and one for weights."""
    model = task.model
    kv = np.maximum(model.kv_heads / s.tp, 1.0) * model.head_dim  # kv heads are replicated when tp exceeds them
    up = (2.0 if model.layer.mlp.kind == "gated" else 1.0) * model.mlp_width / s.tp
    q = model.q_width / s.tp
    h = np.full_like(q, float(model.hidden))
    shapes = [(q + 2.0 * kv, h), (h, q), (up, h), (h, np.full_like(q, float(model.mlp_width)) / s.tp)]
    forward, backward = np.zeros_like(q), np.zeros_like(q)
    for n, k in shapes:
        forward = forward + _gemm(task, s.tokens, n, k)
        backward = backward + _gemm(task, s.tokens, k, n) + _gemm(task, k, n, s.tokens)
    return forward, backward


def _gemm(task: Task, m: Floats, n: Floats, k: Floats) -> Floats:
    return gemm_seconds(m, n, k, task.hardware.device, task.peak, task.job.compute_bytes)


def _attention(task: Task, s: _Shapes) -> tuple[Floats, Floats]:
    model, length = task.model, float(task.job.seq_len)
    window = float(min(model.layer.attention.sliding_window or length, length))
    # A window w of a sequence s sees w (1 - w / 2s) keys on average, a full causal one s / 2.
    visible = 2.0 * window * (1.0 - window / (2.0 * length))
    return attention_seconds(
        s.micro_batch,
        np.full_like(s.tp, visible),
        length / s.cp,
        model.heads / s.tp,
        model.head_dim,
        task.hardware.device,
        task.peak,
    )


def _elementwise(task: Task, s: _Shapes, forward: bool) -> Floats:
    a, model = task.accounting, task.model
    e = (a.elementwise_forward if forward else a.elementwise_backward)[model.layer.mlp.kind]
    split = e.mlp * model.mlp_width + e.q * model.q_width + e.kv * model.kv_width
    per_token = e.hidden * model.hidden / s.split + split / s.tp
    return streaming_seconds(s.tokens * per_token * task.job.compute_bytes / 2.0, task.hardware.device)


def _tp_traffic(task: Task, s: _Shapes, sequence: np.ndarray) -> tuple[Floats, Floats, tuple[Floats, Floats]]:
    """Exposed time of one layer's tensor-parallel collectives: forward, backward, (selective, full) recompute."""
    a = task.accounting
    n_bytes = s.tokens * task.model.hidden * task.job.compute_bytes
    cost = {
        op: (1.0 - a.tp_overlap) * collective_seconds(op, s.tp, np.ones_like(s.tp), n_bytes, task.hardware)
        for op in ("all_reduce", "all_gather", "reduce_scatter")
    }

    def total(counts: dict[str, int]) -> Floats:
        return sum((k * cost[op] for op, k in counts.items()), np.zeros_like(s.tp))

    def both(pick: TpTraffic, mode: str | None, backward: bool) -> Floats:
        return total(pick.recompute.get(mode, {}) if mode else pick.backward if backward else pick.forward)

    with_sp, plain = a.tp_sequence, a.tp_plain
    values = [
        np.where(sequence, both(with_sp, mode, back), both(plain, mode, back))
        for mode, back in ((None, False), (None, True), ("selective", True), ("full", True))
    ]
    return values[0], values[1], (values[2], values[3])


def _cp_traffic(task: Task, s: _Shapes, forward: Floats, backward: Floats) -> tuple[Floats, Floats]:
    """Exposed time of exchanging keys and values around the cp ring under the attention that they feed.

    Each rank passes its keys and values to cp - 1 others (Liu 2023, arXiv 2310.01889); backward also returns gradients.
    """
    model, slow = task.model, task.hardware.overlap_slowdown.base
    n_bytes = s.tokens * 2.0 * model.kv_width / s.tp * task.job.compute_bytes * s.cp
    once = collective_seconds("all_gather", s.cp, s.tp, n_bytes, task.hardware)
    floor = task.accounting.dp_floor
    return overlapped(forward, once, slow, floor), overlapped(backward, 2.0 * once, slow, floor)


def _head(task: Task, s: _Shapes, sequence: np.ndarray) -> tuple[Floats, Floats]:
    """(compute, tp traffic) of the final projection and the loss, forward and backward."""
    model, a = task.model, task.accounting
    vocab = model.vocab / s.tp if a.logits_split else np.full_like(s.tp, float(model.vocab))
    h = np.full_like(vocab, float(model.hidden))
    gemms = _gemm(task, s.tokens, vocab, h) + _gemm(task, s.tokens, h, vocab) + _gemm(task, h, vocab, s.tokens)
    loss = streaming_seconds(a.loss_traffic * s.tokens * vocab * task.job.compute_bytes / 2.0, task.hardware.device)
    n_bytes = s.tokens * model.hidden * task.job.compute_bytes
    one = np.ones_like(s.tp)
    gather = collective_seconds("all_gather", s.tp, one, n_bytes, task.hardware)
    reduce = collective_seconds("all_reduce", s.tp, one, n_bytes, task.hardware)
    return (gemms + loss) * task.hardware.device.sustained.base, np.where(sequence, 2.0 * gather, reduce)
