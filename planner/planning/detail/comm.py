"""Every kind of collective on the slowest rank: its group, bytes, time, and what of it is exposed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from planner.cost import memory, operators, p2p, step
from planner.cost.accounting import Traffic
from planner.cost.collectives import collective_seconds, crossed_tiers
from planner.cost.frozen import Source
from planner.cost.states import params_by_place
from planner.cost.task import Task
from planner.cost.traffic import end_share, exchanged_at_ends, sharing
from planner.planning.detail.case import OVERLAPPED, Case, Kind
from planner.planning.detail.source import growth_figures, tier_figures
from planner.planning.detail.tables import Collective
from planner.specs.hardware import Tier
from planner.specs.layout import RECOMPUTE_MODES


@dataclass(frozen=True)
class _Call:
    """One kind of call before its exposed time is known; group of n ranks at a stride."""

    group: str
    op: str
    n: float
    stride: float
    n_bytes: float
    calls: float
    factor: float = 1.0
    """The fitted constant of its time."""
    copies: int = 1
    fixed: float = 0.0
    """Seconds of a call besides its transfer, before the constant."""


_RING = "send and receive"
"""One step of a ring: a block to the next rank, another from the last."""
_PASSES = {"all_reduce": 2.0}
"""Passes of the tensor through a link that bus bandwidth counts."""

_HIDE = "{:.0%} hides under compute, by the engine's share"
_BUT_FLOOR = ", all but the engine's floor"


def collectives_of(c: Case) -> tuple[Collective, ...]:
    """Every kind of collective on the slowest rank (step-wise ones: on the rank that they hold up longest)."""
    rows: list[Collective] = []
    for i, kind in enumerate(c.kinds):
        count = float(c.counts[c.slowest, i])
        for k in (0, 1):
            rows += _layer_rows(c, kind, k, count)
            rows += _recompute_rows(c, kind, k, count)
    first, last = c.ends(c.slowest)
    if first:
        rows += [*_embedding_rows(c), *_end_zero_rows(c, "first", "embedding")]
    if last:
        rows += [*_head_rows(c, c.task.growth * c.m * float(c.base.seconds.head_tp[0])), *_end_zero_rows(c, "last", "head")]
    return (*rows, *_pipeline_rows(c), *_step_rows(c))


def _layer_rows(c: Case, kind: Kind, direction: int, count: float) -> list[Collective]:
    """Collectives of `count` layers, forward (0) or backward (1)."""
    where, layers, t = ("forward", "backward")[direction], c.m * count, kind.seconds
    tp, cp, ep = (c.task.growth * layers * float(getattr(t, f"{axis}_{where}")[0]) for axis in ("tp", "cp", "ep"))
    zero = c.task.growth * layers * float(getattr(kind.traffic, where)[0])
    return [
        *_tensor_rows(c, kind, where, layers, tp),
        *_context_rows(c, kind, where, layers, cp),
        *_expert_rows(c, kind, where, layers, ep),
        *_zero_rows(c, kind, where, layers, zero),
    ]


def _recompute_rows(c: Case, kind: Kind, k: int, count: float) -> list[Collective]:
    """Collectives that selective (0) or full (1) recompute repeats, where `count` of the rank's layers are of this kind."""
    mode, again = RECOMPUTE_MODES[k + 1], int((c.stages.selective, c.stages.full)[k][c.slowest])
    times = c.m * again * count / max(int(c.stages.layers[c.slowest]), 1)
    t = kind.seconds
    tp, cp, ep = (c.task.growth * times * float(r[k][0]) for r in (t.tp_recompute, t.cp_recompute, t.ep_recompute))
    repeated = c.task.accounting.recomputed[mode].get("experts", 0.0)
    exchanged = [] if _in_a_ring(kind) and mode == "selective" else _context_rows(c, kind, mode, times, cp)
    return _tensor_rows(c, kind, mode, times, tp) + exchanged + _expert_rows(c, kind, mode, times * repeated, ep)


def _priced(
    c: Case, part: str, where: str, calls: Sequence[_Call], exposed: float, hides: str, figures: tuple[str, ...]
) -> list[Collective]:
    """Rows of calls that expose `exposed` seconds together, each in proportion to its busy time."""
    made = [(x, _seconds(c.task, x)) for x in calls if x.calls > 0 and x.n > 1]
    total = sum(x.calls * each for x, each in made)
    rows = []
    for x, each in made:
        passes = 1.0 if x.op == _RING else _PASSES.get(x.op, 1.0) * (x.n - 1.0) / x.n
        busy, moved = x.calls * each, passes * x.n_bytes
        tiers = _tiers(c.task, x.n, x.stride)
        names = tuple(n for tier in tiers for n in tier_figures(tier) if x.op == "all_reduce" or "all_reduce" not in n)
        rows.append(
            Collective(
                part, where, x.group, x.op, int(x.n), int(x.stride), tuple(t.name for t in tiers), x.n_bytes, x.calls, each,
                busy, exposed * busy / total if total else 0.0, moved / each if each else 0.0, hides,
                (*figures, *names, *growth_figures(c.task)),
            )
        )  # fmt: skip
    return rows


def _seconds(task: Task, x: _Call) -> float:
    """Time of one call."""
    n, stride, n_bytes = (np.array([v], dtype=float) for v in (x.n, x.stride, x.n_bytes))
    if x.op == _RING:  # n - 1 steps gather all blocks
        transfer = float(collective_seconds("all_gather", n, stride, n * n_bytes, task.hardware)[0]) / (x.n - 1.0)
    else:
        transfer = float(collective_seconds(x.op, n, stride, n_bytes, task.hardware, x.copies)[0])
    return task.growth * x.factor * (transfer + x.fixed)


def _tiers(task: Task, n: float, stride: float) -> list[Tier]:
    """The tiers that a group pays for."""
    return [t.tier for t in crossed_tiers(np.array([float(n)]), np.array([float(stride)]), task.hardware) if t.crosses[0]]


def _place(where: str) -> str:
    """`forward`, `backward`, or the recompute mode in words."""
    return where if where in ("forward", "backward") else f"{where} recompute"


def _tensor_rows(c: Case, kind: Kind, where: str, times: float, exposed: float) -> list[Collective]:
    """Collectives of the layers over the tp group."""
    a, task = kind.task.accounting, kind.task
    traffic = a.tp_sequence if c.layout.sequence_parallel else a.tp_plain
    counts = {"forward": traffic.forward, "backward": traffic.backward}.get(where) or operators.repeated(task, traffic, where)
    n_bytes = float(operators.hidden_bytes(task, kind.shapes)[0])
    tp, factor, layers = float(c.layout.tp), task.constant("tp"), times * operators.tp_share(task)
    fixed = {op: float(operators.tp_beside(task, kind.shapes, op)[0]) for op in counts}
    calls = [_Call("tp", op, tp, 1.0, n_bytes, count * layers, factor, fixed=fixed[op]) for op, count in counts.items()]
    hides = _HIDE.format(a.tp_overlap)
    figures = ("engine.tp_overlap", *(("engine.tp_copies",) if any(a.tp_copies) else ()), "constant.tp")
    return _priced(c, "tp_comm", f"{kind.label}layers, {_place(where)}", calls, exposed, hides, figures)


def _context_rows(c: Case, kind: Kind, where: str, times: float, exposed: float) -> list[Collective]:
    """Keys and values around the cp ring, their gradients too in backward; or heads exchanged for tokens."""
    if not _in_a_ring(kind):
        return _exchange_rows(c, kind, where, times, exposed)
    task, s, cp, tp = kind.task, kind.shapes, float(c.layout.cp), float(c.layout.tp)
    n_bytes, gradients = (float(f(task, s)[0]) for f in (operators.key_value_bytes, operators.ring_gradient_bytes))
    if task.accounting.ring_counted:
        calls = [_Call("cp", _RING, cp, tp, n_bytes / cp, times * (cp - 1.0))]
        calls += [_Call("cp", _RING, cp, tp, gradients / cp, times * cp)] if where == "backward" else []
    else:
        both = {"forward": 1.0, "backward": 2.0}.get(where, 0.0)  # recompute repeats none
        calls = [_Call("cp", "all_gather", cp, tp, n_bytes, times * both)]
    hides = "hides under attention, all but the engine's floor"
    return _priced(c, "cp_comm", f"{kind.label}keys and values, {_place(where)}", calls, exposed, hides, OVERLAPPED)


def _in_a_ring(kind: Kind) -> bool:
    """Whether the cp group sends keys and values around a ring."""
    return bool(kind.shapes.ring[0])


def _exchange_rows(c: Case, kind: Kind, where: str, times: float, exposed: float) -> list[Collective]:
    """Heads exchanged for tokens around attention."""
    sent = {name: float(n[0]) for name, n in operators.exchanged_bytes(kind.task, kind.shapes).items()}
    calls = [_Call("cp", "all_to_all", c.layout.cp, c.layout.tp, n_bytes, times) for n_bytes in sent.values()]
    return _priced(c, "cp_comm", f"{kind.label}heads for tokens, {_place(where)}", calls, exposed, "attention waits for it", ())


def _expert_rows(c: Case, kind: Kind, where: str, times: float, exposed: float) -> list[Collective]:
    """Routed tokens to their experts and back."""
    task, a, mlp = kind.task, kind.task.accounting, kind.task.model.layer.mlp
    if not mlp.routed:
        return []
    sent = float(operators.routed_bytes(task, kind.shapes)[0])
    factor, copies = task.constant("ep"), mlp.top_k if a.ep_once else 1
    ep, etp, both = float(c.layout.ep), float(c.layout.etp), 2.0 * times
    calls = [
        _Call("ep", "all_to_all", ep, etp, sent, both, factor, copies),
        _Call("etp", a.etp_op, etp, 1.0, sent * etp, both, factor),
    ]
    hides = _HIDE.format(a.ep_overlap)
    figures = ("engine.ep_overlap", "constant.ep")
    return _priced(c, "ep_comm", f"{kind.label}routed tokens, {_place(where)}", calls, exposed, hides, figures)


def _state_calls(c: Case, source: Source, item: Traffic, times: dict[str, float]) -> list[_Call]:
    """Calls of one collective over the ranks that share parameters, by place; `times` a step."""
    size = source.task.accounting.size(item.size, source.task.job.compute_bytes)
    x, factor, p = c.x, source.task.constant("dp"), source.counts
    dense, routed = {k: size * float(v[0]) for k, v in params_by_place(p).items()}, size * float(p["experts"][0])
    if item.over == "shard" and bool(memory.joined(source.task.accounting, x)[0]):
        dense["layer"], routed = dense["layer"] + routed, 0.0
    shard, stride, part = (float(v[0]) for v in sharing(x, item))
    group = "replicas" if item.over == "replicas" else "dp x cp" if x.replicas[0] == 1 else "shard"
    calls = [_Call(group, item.op, shard, stride, dense[k] / part, n, factor) for k, n in times.items() if dense[k]]
    if item.over == "shard" and routed and "layer" in times:
        apart = float((x.ep * x.etp)[0])
        calls.append(_Call("expert dp", item.op, float(x.expert_shard[0]), apart, routed, times["layer"], factor))
    return calls


def _traffic(c: Case, source: Source, per: str) -> list[Traffic]:
    """Collectives of the parameters under one rule, of every micro-batch or of a step."""
    return [t for t in source.task.accounting.zero[c.rule].traffic if t.per == per]


def _zero_rows(c: Case, kind: Kind, where: str, times: float, exposed: float) -> list[Collective]:
    """Gathers and reductions of every micro-batch (ZeRO 2 and 3)."""
    items = [(s, t) for s in kind.sources for t in _traffic(c, s, "microbatch") if t.under == where]
    calls = [call for source, item in items for call in _state_calls(c, source, item, {"layer": times})]
    hides = f"hides under the layer's {where}" + _BUT_FLOOR * (not c.engines)
    figures = (*c.overlapped, "engine.zero", "constant.dp")
    return _priced(c, "zero_comm", f"{kind.label}layers, {where}", calls, exposed, hides, figures)


def _step_rows(c: Case) -> list[Collective]:
    """Gathers and reductions once a step, on the rank that they hold up longest."""
    d = c.updating
    (first, last), at = c.ends(d), c.at(d)
    calls: list[_Call] = []
    for i, kind in enumerate(c.kinds):
        times = {"layer": float(c.counts[d, i])} | ({"first": float(first), "last": float(last)} if i == 0 else {})
        for source in kind.sources:
            for item in _traffic(c, source, "step"):
                calls += _state_calls(c, source, item, times)
    hidden = int(c.stages.layers[d]) * c.ns("hide", d)
    hides = f"{hidden:.4g} s hide under backward" + _BUT_FLOOR * (not c.engines)
    if c.engines and first:
        hides += ", the embedding's under nothing"
    if any(t.under == "nothing" for kind in c.kinds for s in kind.sources for t in _traffic(c, s, "step")):
        hides += "; gathers after the optimizer's step hide under nothing"
    floor = "engine.step_floor" if c.task.accounting.step_floor else "engine.dp_floor"
    figures = ("engine.dp_window", *(() if c.engines else (floor,)), "engine.zero", "constant.dp")
    exposed = int(c.cost.once[d]) - int(step.stage_update(*at, c.stages.layers[d : d + 1])[0])
    return _joined(_priced(c, "dp_comm", f"once a step, rank {d}", calls, exposed / 1e9, hides, figures))


def _joined(rows: list[Collective]) -> list[Collective]:
    """Rows of equal group and operation as one: bytes a call are their mean."""
    done: dict[tuple[str, str], Collective] = {}
    for r in rows:
        seen = done.get((r.group, r.op))
        if seen is None:
            done[r.group, r.op] = r
            continue
        calls, busy = seen.calls + r.calls, seen.busy + r.busy
        done[r.group, r.op] = replace(
            seen, calls=calls, busy=busy, exposed=seen.exposed + r.exposed, seconds_per_call=busy / calls,
            bytes_per_call=(seen.bytes_per_call * seen.calls + r.bytes_per_call * r.calls) / calls,
            bandwidth=(seen.bandwidth * seen.busy + r.bandwidth * r.busy) / busy if busy else 0.0,
        )  # fmt: skip
    return list(done.values())


def _head_rows(c: Case, exposed: float) -> list[Collective]:
    """The head's collectives over tp."""
    n_bytes = float(operators.hidden_bytes(c.task, c.base.shapes)[0])
    ops = ("all_gather", "reduce_scatter") if c.layout.sequence_parallel else ("all_reduce",)
    calls = [_Call("tp", op, c.layout.tp, 1.0, n_bytes, c.m, c.task.constant("tp")) for op in ops]
    return _priced(c, "tp_comm", "head, forward and backward", calls, exposed, "nothing", ("constant.tp",))


def _embedding_rows(c: Case) -> list[Collective]:
    """The embedding's collectives over tp, where they are charged."""
    if not (c.task.accounting.ends_exchanged and c.layout.sequence_parallel):
        return []
    n_bytes, exposed = float(operators.hidden_bytes(c.task, c.base.shapes)[0]), float(c.base.seconds.embedding_tp[0])
    each = c.m * operators.tables(c.task)
    calls = [_Call("tp", op, c.layout.tp, 1.0, n_bytes, each, c.task.constant("tp")) for op in ("reduce_scatter", "all_gather")]
    where = "embedding, forward and backward"
    return _priced(c, "tp_comm", where, calls, c.task.growth * c.m * exposed, "nothing", ("constant.tp",))


def _end_zero_rows(c: Case, place: str, name: str) -> list[Collective]:
    """Gathers and reductions of the embedding or the head with every micro-batch, where they are charged."""
    rows: list[Collective] = []
    figures = (*c.overlapped, "engine.zero", "constant.dp")
    for source in c.base.sources:
        for item in _traffic(c, source, "microbatch"):
            share = end_share(c.task.accounting, c.rule, item, place)
            charged = share or (c.engines and exchanged_at_ends(item))
            calls = [x for x in _state_calls(c, source, item, {place: float(c.m)}) if charged]
            exposed = share * sum(x.calls * _seconds(c.task, x) for x in calls)
            hides = "nothing" if share == 1.0 else "hides under layers" + _BUT_FLOOR * (share > 0)
            rows += _priced(c, "zero_comm", f"{name}, {item.under}", calls, exposed, hides, figures)
    return rows


def _pipeline_rows(c: Case) -> list[Collective]:
    """Activations to the next rank and gradients back; they pay for the outermost tier that the pipeline crosses."""
    task, layout = c.task, c.layout
    if layout.pp == 1:
        return []
    sent = p2p.sent_bytes(task, c.x, memory.activation_bytes(c.base.task, c.x).boundary)
    hops = p2p.hop_seconds(task, sent)
    tiers = _tiers(task, int(c.x.span[0]), 1.0)
    tier, each = tiers[-1], task.growth * float(hops[len(tiers) - 1][0])
    # Every chunk sends on and back, but the model's first and last stage.
    first, last = c.ends(c.slowest)
    calls, stride = (
        float(c.m * (2 * layout.virtual_stages - first - last)),
        layout.tp * layout.cp * (1 if layout.order == "tp-cp-pp-dp" else layout.dp),
    )
    names = tuple(n for n in tier_figures(tier) if n.endswith(("bandwidth", "latency", "efficiency")))
    hides = _HIDE.format(1.0 - task.accounting.pp_exposed.get(layout.schedule, 1.0))
    return [
        Collective(
            "pp_comm", "activations and gradients", "pp", "send and receive", layout.pp, stride, (tier.name,), float(sent[0]),
            calls, each, calls * each, c.m * c.ns("p2p"), float(sent[0]) / each, hides,
            ("engine.pp_exposed", "constant.pp", *names, *growth_figures(task)),
        )
    ]  # fmt: skip
