"""Memory of every pipeline rank at its peak: states, saved activations, buffers, and what lies outside the allocator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np

from planner.cost import memory, peaks, step
from planner.cost.schedules import chunk_moments
from planner.cost.states import embedding_rest, params_by_place
from planner.cost.task import Floats
from planner.planning.detail.case import Case, Kind
from planner.planning.detail.held import Held
from planner.planning.detail.peak import embedding_lines, peak_lines, update_lines
from planner.planning.detail.tables import Bytes, Inputs, Rank
from planner.specs.layout import RECOMPUTE_MODES
from planner.units import GIB


def ranks_of(c: Case) -> tuple[Rank, ...]:
    """Every rank at its peak."""
    return tuple(_rank(c, s) for s in range(c.layout.pp))


def _rank(c: Case, s: int) -> Rank:
    """One pipeline rank at its peak."""
    held = Held(c, s)
    _state_lines(held)
    if held.updating:
        cause = update_lines(held)
    else:
        if held.flight:  # none at the end of the step
            _saved_lines(held)
        cause = embedding_lines(held) if held.ending else peak_lines(held)
    _boundary_lines(held)
    _resident_lines(held)
    allocated, ratio = int(c.cost.allocated[s]), c.task.reserved_ratio
    held.add("rounding", "rounding", allocated - sum(b.n_bytes for b in held.found), {})
    kept = max(int(c.cost.backward_bytes[s]), int(c.cost.ending_bytes[s])) + int(c.pooled[s])
    pooled = max(kept - allocated, 0)
    reserved = (allocated + pooled) * ratio
    total, limit = reserved + int(c.q.outside[s]), c.plan.estimate.memory.limit_gib * GIB
    return Rank(
        str(s), "optimizer update" if held.updating else "backward", cause, tuple(held.found), allocated, pooled, ratio,
        reserved, _outside(c), total, limit, limit - total,
    )  # fmt: skip


def folded(ranks: Sequence[Rank]) -> tuple[Rank, ...]:
    """Equal neighbours as one entry."""
    runs = [list(run) for _, run in groupby(ranks, key=lambda rank: replace(rank, ranks=""))]
    return tuple(run[0] if len(run) == 1 else replace(run[0], ranks=f"{run[0].ranks}-{run[-1].ranks}") for run in runs)


# ---- states and saved activations ---------------------------------------------------------------------------------


def _state_lines(held: Held) -> None:
    """Parameters, gradients and optimizer states."""
    for part in memory.PARTS:
        for i in range(len(held.c.kinds[0].sources)):
            for name, count, each, per in _states(held, part, i):
                what, unit = ("bytes as stored", "times held") if i else ("parameters", "bytes a parameter")
                inputs: Inputs = {} if count is None else {"layers": count}
                inputs |= {what if count is None else f"{what} a layer": each, unit: per}
                held.add(part, name, (1 if count is None else count) * each * per, inputs, "engine.zero")
    held.add("grads", "gradients that no backward has made yet", -held.peak.missing, {}, "engine.gradients_as_made")


def _states(held: Held, part: str, source: int) -> Iterator[tuple[str, int | None, float, float]]:
    """(name, layers, parameters of one, bytes a parameter) of trained (0) or frozen (1) ones; without layers for the ends of
    the model."""
    c, x = held.c, held.c.x
    moment, prefix = "update" if held.updating else "backward", "frozen " if source else ""
    for kind, count in held.kinds:
        task, params, _ = kind.sources[source]
        for key, shard, what in (("layer", x.shard, "layers"), ("experts", x.expert_shard, "routed experts")):
            states = memory.state_bytes(task, x, shard)
            each, per = float(params[key][0]), float(getattr(states, moment)[part][0])
            yield f"{kind.label}{prefix}{part} of {what}", count, each, per
    (task, params, _), (first, last) = c.base.sources[source], c.ends(held.rank)
    states, places = memory.state_bytes(task, x, x.shard), params_by_place(params)
    for there, key, name in ((first, "first", "embedding"), (last, "last", "head and final norm")):
        if there:
            yield f"{prefix}{part} of {name}", None, float(places[key][0]), float(getattr(states, moment)[part][0])


def _saved_lines(held: Held) -> None:
    """Saved activations by tensor: of all micro-batches in flight, or of those left between two of them."""
    c, s = held.c, held.rank
    pairs, selective, full = (int(weights[s]) for weights in (c.held.layers, c.held.selective, c.held.full))
    there = [weight * held.peak.share for weight in (pairs - selective - full, selective, full)]
    there[int(c.stages.strongest[s])] -= held.peak.beyond
    n, shares = int(c.stages.layers[s]), [_shares(c, s, mode) for mode in range(3)]
    for kind, count in held.kinds:
        at = next(i for i, k in enumerate(c.kinds) if k is kind)
        own = [w * float(share[at]) for w, share in zip(there, shares, strict=True)]
        for name, (n_bytes, inputs) in _saved_tensors(c, kind, own).items():
            inputs["in flight"] = held.flight
            held.add("activations", f"{kind.label}saved: {name}", n_bytes, inputs, "engine.saved")
        late, tokens = int(c.held.deferred[s]) * count / n, float(kind.shapes.tokens[0])
        for item in kind.task.accounting.deferred if late else ():
            each = float(memory.saved_bytes(kind.task, [item], "none", c.x, norms=False)[0])
            inputs = {"tokens": tokens, "bytes a token and layer": each, "layers x waiting": late}
            held.add(
                "activations", f"{kind.label}output gradients {item.name}", tokens * each * late, inputs, "engine.deferred"
            )


def _shares(c: Case, s: int, mode: int) -> Floats:
    """Each kind's share of the (layer, micro-batch) pairs that rank s holds when activations under a mode take the most.

    With chunks of different layers it is that of the chunks in flight at that moment (`schedules.chunk_moments`).
    """
    chunks = step.chunks_by_kind(c.task, c.layout)[s]
    if len(c.kinds) == 1 or np.all(chunks == chunks[:1]):
        return np.asarray(c.counts[s] / max(int(c.stages.layers[s]), 1), dtype=float)
    moments = chunk_moments(c.layout.pp, c.layout.virtual_stages, c.x.microbatches)[0, s]
    saved = moments @ (chunks @ np.array([int(getattr(k.p, f"act{mode}")[0]) for k in c.kinds]))
    pairs = int((moments @ chunks.sum(axis=1)).max())
    return np.asarray((moments[int(saved.argmax())] @ chunks) / max(pairs, 1), dtype=float)


def _saved_tensors(c: Case, kind: Kind, weights: Sequence[float]) -> dict[str, tuple[float, Inputs]]:
    """Bytes of each saved tensor by name; `weights` are (layer, micro-batch) pairs held, by recompute mode."""
    rows: dict[str, tuple[float, Inputs]] = {}
    tokens, several = float(kind.shapes.tokens[0]), sum(w > 0 for w in weights) > 1
    for name, mode, each in _saved_rows(c, kind):
        pairs = weights[RECOMPUTE_MODES.index(mode)]
        if each and pairs:
            n_bytes, inputs = rows.get(name, (0.0, {"tokens": tokens}))
            key, suffix = "bytes a token and layer", f" ({mode})" if several else ""
            inputs[key + suffix] = float(inputs.get(key + suffix, 0.0)) + each
            inputs["layers x in flight" + suffix] = pairs
            rows[name] = (n_bytes + tokens * each * pairs, inputs)
    return rows


def _saved_rows(c: Case, kind: Kind) -> Iterator[tuple[str, str, float]]:
    """(tensor, recompute mode, bytes that a layer saves of it for a token)."""
    for item in kind.task.accounting.saved:
        for mode in RECOMPUTE_MODES:
            yield item.name, mode, float(memory.saved_bytes(kind.task, [item], mode, c.x)[0])
    for mode in RECOMPUTE_MODES:
        yield "outputs of adapters' A", mode, float(memory.adapter_bytes(kind.task, mode, c.x)[0])


# ---- buffers, and what lies outside the allocator -----------------------------------------------------------------


def _boundary_lines(held: Held) -> None:
    """Buffers between ranks, and what the last rank keeps of the loss."""
    c, s = held.c, held.rank
    p, first, last = c.at(s)
    inputs: Inputs = {"buffers": int(peaks.buffers_held(p, first, last)[0]), "bytes each": int(p.receive[0])}
    shared = 0 if held.ending else int(peaks.shared_inputs(p, first, np.array([held.most]))[0])
    inputs |= {"bytes counted as saved activations": shared} if shared else {}
    received = int(peaks.receive_bytes(p, first, last)[0]) - shared
    held.add("buffers", "receive buffers", received, inputs, "engine.receive_all_microbatches", "engine.receive_count")
    if held.updating:
        return
    sends = int(p.chunks[0] > 1 or not last[0] or held.ending is not None)
    flight = 0 if held.ending == "closing" else held.most  # the output goes after its backward
    inputs = {"in flight": flight, "bytes each": int(p.boundary[0])}
    held.add("buffers", "stage outputs in flight", sends * flight * int(p.boundary[0]), inputs, "engine.keeps_stage_output")
    carried, chunks = int(p.carried[0]), int(p.chunks[0])
    if held.ending != "closing":
        held.add("buffers", "reduction buffers carried by the other chunks", (chunks - 1) * carried, {}, "engine.zero")
    if held.ending:
        return
    waiting, figures = int(last[0] * p.waiting[0]), ("engine.logits_wait", "engine.pipeline_logits")
    held.add("buffers", "logits of waiting micro-batches, stage output", waiting, {}, *figures)


def _resident_lines(held: Held) -> None:
    """Workspaces, and gradient buffers that stay."""
    c, x, base = held.c, held.c.x, held.c.base
    first, last = c.ends(held.rank)
    workspace = c.task.hardware.device.workspace.base
    held.add("buffers", "library workspaces", workspace, {}, "device.workspace")
    fixed = int(c.q.fixed[held.rank])
    held.add("buffers", "resident gradient buffers of a layer", fixed - workspace, {}, "engine.zero")
    states = memory.state_bytes(base.task, x, x.shard)
    if last:
        beside = float(states.resident[0] * base.params["head"][0])
        held.add("buffers", "resident gradient buffer of the head", beside, {}, "engine.zero")
    if first and not held.updating:
        rest = float(embedding_rest(base.task, x)[0] * states.whole_gradients[0])
        name = "gradient of the whole embedding, before it is split over tp"
        held.add("grads", name, rest, {}, "engine.embedding_gradient_whole")


def _outside(c: Case) -> tuple[Bytes, ...]:
    """What the device holds outside the allocator."""
    d, a, held = c.task.hardware.device, c.task.accounting, Held(c, 0)
    factor, groups = c.task.constant("outside"), int(memory.communicators(c.x)[0])
    once: Inputs = {} if factor == 1.0 else {"times, fitted": factor}
    held.add("outside", "driver context and kernels", factor * d.context.base, once, "device.context", "constant.outside")
    inputs: Inputs = {"process groups": groups, "bytes each": d.communicator.base, **once}
    names = ("device.communicator", "constant.outside")
    held.add("outside", "communicators", factor * groups * d.communicator.base, inputs, *names)
    held.add("outside", "others", factor * a.outside_bytes, once, "engine.outside_bytes", "constant.outside")
    held.add("rounding", "rounding", int(c.q.outside[0]) - sum(b.n_bytes for b in held.found), {})
    return tuple(held.found)
