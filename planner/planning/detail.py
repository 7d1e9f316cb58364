"""What an estimate is made of: every term of the step, every byte, every collective, and the figures behind them.

Comes in: a plan with its estimate. Goes out: plain tables (`Detail`) that `report.detail` prints. Numbers come from the cost
functions themselves, and the lines of a table add up to the estimate; what the cost model's rounding to whole nanoseconds
and bytes leaves is a line of its own. Each line names its formula, its inputs, and the least certain figure among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, get_args

import numpy as np

from planner.cost import memory, operators, primitives, step
from planner.cost.accounting import Accounting, Elementwise, Traffic, ZeroRule
from planner.cost.collectives import collective_seconds, neighbour_seconds
from planner.cost.compute import gemm_seconds
from planner.cost.primitives import Primitives
from planner.cost.schedules import in_flight, in_flight_layers
from planner.cost.task import Floats, Ints, LayoutArray, StageArray, Task
from planner.engines.registry import accounting_named, engine_named
from planner.engines.traits import TRAITS
from planner.planfile import Plan
from planner.planning.request import task_of_plan
from planner.specs.calibration import CONSTANTS
from planner.specs.figures import Figure, Provenance
from planner.specs.hardware import Tier
from planner.specs.layout import RECOMPUTE_MODES, Layout
from planner.units import GIB

KINDS = ("time", "memory", "comm", "source")
"""What can be asked for."""

Value = float | int | str
Inputs = dict[str, Value]


@dataclass(frozen=True)
class Source:
    """One figure that an estimate used."""

    name: str
    """`device...`, `network...` (the profile), `engine...` (accounting), `constant...` (fitted), `code...` (in the source)."""
    value: Value
    provenance: Provenance
    source: str


@dataclass(frozen=True)
class Term:
    """One line of the step time."""

    part: str
    """The line of `Estimate.breakdown` that it belongs to, or `rounding`."""
    name: str
    seconds: float
    """Of one call: of one layer and micro-batch where `times` counts those."""
    times: float
    total: float
    share: float
    """Of the step."""
    formula: str
    inputs: Inputs
    bound: str
    """`device` or `host`, for a layer's compute."""
    provenance: str
    least_certain: str
    """The figure that `provenance` is about."""
    figures: tuple[str, ...]


@dataclass(frozen=True)
class Bytes:
    """One line of a rank's memory."""

    part: str
    name: str
    n_bytes: float
    inputs: Inputs
    provenance: str
    least_certain: str
    figures: tuple[str, ...]


@dataclass(frozen=True)
class Rank:
    """Memory of equal neighbouring pipeline ranks at their peak."""

    ranks: str
    moment: str
    cause: str
    parts: tuple[Bytes, ...]
    """They add up to `allocated`."""
    allocated: int
    reserved_ratio: float
    reserved: float
    outside: tuple[Bytes, ...]
    total: float
    limit: float
    headroom: float


@dataclass(frozen=True)
class Collective:
    """One kind of collective on the slowest rank."""

    part: str
    where: str
    group: str
    op: str
    ranks: int
    stride: int
    """Distance of neighbours in the group."""
    tiers: tuple[str, ...]
    """Network tiers that it crosses, the inner one first."""
    bytes_per_call: float
    """The full (gathered) tensor."""
    calls: float
    """A step."""
    seconds_per_call: float
    busy: float
    exposed: float
    bandwidth: float
    """Bus bandwidth, bytes/s: what each rank sends in a ring, over the call's time."""
    hides: str
    """What hides it."""
    figures: tuple[str, ...]


@dataclass(frozen=True)
class Detail:
    """The tables that were asked for; the others are None."""

    step_time_s: float
    slowest_rank: int
    growth: float
    """Factor in all times: what large clusters lose (`constant.scale`)."""
    time: tuple[Term, ...] | None = None
    memory: tuple[Rank, ...] | None = None
    comm: tuple[Collective, ...] | None = None
    source: tuple[Source, ...] | None = None

    def to_data(self) -> dict[str, Any]:
        """Plain data: the tables that were asked for."""
        return {k: _plain(v) for k, v in asdict(self).items() if v is not None}


def _plain(value: Any) -> Any:
    """Tuples as lists, NumPy scalars as numbers, so that JSON and YAML take it."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value


def detail_of(plan: Plan, kinds: Iterable[str] = KINDS, engine: str | None = None) -> Detail:
    """The tables of a plan's estimate. `engine` names its accounting with traits where `plan.engine` leaves them out."""
    task, _ = task_of_plan(plan if engine is None else plan.model_copy(update={"engine": engine}))
    c, wanted = _case(task, plan), set(kinds)
    collectives = _collectives(c)
    terms = _terms(c, collectives)
    ranks = _ranks(c)
    return Detail(
        step_time_s=plan.estimate.step_time_s,
        slowest_rank=c.slowest,
        growth=task.growth,
        time=terms if "time" in wanted else None,
        memory=_folded(ranks) if "memory" in wanted else None,
        comm=collectives if "comm" in wanted else None,
        source=c.book.used(_names(terms, ranks, collectives)) if "source" in wanted else None,
    )


def _names(terms: Sequence[Term], ranks: Sequence[Rank], collectives: Sequence[Collective]) -> set[str]:
    lines: list[Term | Bytes | Collective] = [*terms, *collectives]
    for rank in ranks:
        lines += [*rank.parts, *rank.outside]
    return {name for line in lines for name in line.figures}


# ---- the layout, priced -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    """One kind of layers, priced for the layout."""

    task: Task
    label: str
    shapes: operators._Shapes
    seconds: operators.LayerSeconds
    compute: tuple[Floats, Floats]
    traffic: primitives._DpTraffic
    params: dict[str, Floats]
    p: Primitives


@dataclass(frozen=True)
class _Case:
    """One layout with all that was computed for it."""

    task: Task
    plan: Plan
    x: LayoutArray
    stages: StageArray
    kinds: tuple[_Kind, ...]
    counts: Ints
    """Layers by kind of each rank, shape (ranks, kinds)."""
    q: Primitives
    """Primitives of each rank."""
    cost: step.StageCost
    book: _Book

    @property
    def layout(self) -> Layout:
        return self.plan.layout

    @cached_property
    def m(self) -> int:
        """Micro-batches."""
        return int(self.x.microbatches[0])

    @cached_property
    def slowest(self) -> int:
        """The rank that all others wait for."""
        return int(np.argmax(self.cost.time))

    @cached_property
    def updating(self) -> int:
        """The rank whose traffic and optimizer take longest."""
        return int(np.argmax(self.cost.once))

    def ns(self, name: str, rank: int = 0) -> float:
        """A time of the integer model, seconds."""
        return float(getattr(self.q, name)[rank]) / 1e9

    def ends(self, rank: int) -> tuple[bool, bool]:
        """Whether a rank is the first one, the last one."""
        return rank == 0, rank == self.layout.pp - 1


def _case(task: Task, plan: Plan) -> _Case:
    x, stages = LayoutArray.of([plan.layout], task.job), StageArray.of([plan.layout])
    mixed = len(task.model.kinds) > 1
    kinds = [_kind(task.only(k) if mixed else task, x, f"kind {k}: " if mixed else "") for k in range(len(task.model.kinds))]
    priced = [k.p.take(stages.row) for k in kinds]
    counts, blended = stages.layers[:, None], None
    if mixed:
        from planner.validation.predict import _kind_counts

        counts = _kind_counts(task, plan.layout)
        blended = step.blend(priced, counts)
    cost = step.stage_cost(kinds[0].p, x, stages, blended)
    return _Case(task, plan, x, stages, tuple(kinds), counts, blended or priced[0], cost, _Book(task, plan.layout.zero))


def _kind(task: Task, x: LayoutArray, label: str) -> _Kind:
    seconds, here = operators.layer_seconds(task, x), np.zeros(1, dtype=np.int64)
    compute = primitives._compute(task, x, seconds, here)
    traffic = primitives._dp_traffic(task, x, compute)
    shapes, params = operators._shapes(task, x), memory.rank_params(task, x)
    return _Kind(task, label, shapes, seconds, compute, traffic, params, primitives.price(task, x))


# ---- figures and their provenance ---------------------------------------------------------------------------------

_TRUST = get_args(Provenance)
_NO_ORIGIN = "not stated by the engine's accounting"
_PRIOR = "prior: not fitted for this engine on this machine"


class _Book:
    """All figures of a task by name."""

    def __init__(self, task: Task, zero: int):
        self.figures = _hardware_figures(task) | _engine_figures(task.accounting, zero) | _constants(task)

    def used(self, names: set[str]) -> tuple[Source, ...]:
        """The figures with these names, in a fixed order."""
        return tuple(f for name, f in self.figures.items() if name in names)

    def least(self, names: Iterable[str]) -> tuple[str, str]:
        """(provenance, name) of the least certain figure; factors left at 1 do not count, nor does what grows all times."""
        known = [self.figures[n] for n in names if n in self.figures and n != "constant.scale"]
        known = [f for f in known if not (f.source == _PRIOR and f.value == 1.0)]
        if not known:
            return "", ""
        worst = max(known, key=lambda f: _TRUST.index(f.provenance))
        return worst.provenance, worst.name


def _hardware_figures(task: Task) -> dict[str, Source]:
    h, d = task.hardware, task.hardware.device
    plain: dict[str, Figure] = {f"device.peak.{name}": figure for name, figure in d.peak.items()}
    names = ("memory", "memory_bandwidth", "memory_efficiency", "context", "communicator", "workspace", "launch", "sustained")
    plain |= {f"device.{name}": getattr(d, name) for name in names} | {"overlap_slowdown": h.overlap_slowdown}
    found = {n: Source(n, f.value, f.provenance, f.source) for n, f in plain.items()}
    for name, model in (("gemm", d.gemm), ("attention", d.attention)):
        values = model.model_dump(exclude={"provenance", "source"})
        text = ", ".join(f"{k} {v}" for k, v in values.items())
        found[f"device.{name}"] = Source(f"device.{name}", text, model.provenance, model.source)
    for tier in h.network:
        found |= _tier_figures(tier)
    for name, value, provenance, source in _IN_CODE:
        found[name] = Source(name, value, provenance, source)
    return found


_IN_CODE: tuple[tuple[str, str, Provenance, str], ...] = (
    ("code.NARROW_SHARE", "fp8 0.91, fp4 0.80", "fitted", "planner.cost.task: published runs of the Transformer Engine stack"),
    ("code.UNFUSED_RATE", "0.55, 0.08 unaligned", "assumed", "planner.cost.compute: batched products of unfused attention"),
)


def _tier_figures(tier: Tier) -> dict[str, Source]:
    place = f"network.{tier.name}"
    found = {}
    for name in ("bandwidth", "latency", "all_reduce"):
        figure = getattr(tier, name)
        if figure is not None:
            found[f"{place}.{name}"] = Source(f"{place}.{name}", figure.value, figure.provenance, figure.source)
    for name in ("efficiency", "by_domains"):
        curve = getattr(tier, name)
        if curve is not None:
            text = ", ".join(f"{size:g}: {value:g}" for size, value in curve.points)
            found[f"{place}.{name}"] = Source(f"{place}.{name}", text, curve.provenance, curve.source)
    return found


def _engine_figures(accounting: Accounting, zero: int) -> dict[str, Source]:
    """Values of the engine's accounting at a ZeRO stage; a field that a trait replaced has the trait's source."""
    base, *traits = accounting.name.split("+")
    origins = dict(accounting.origin)
    before = engine_named(base).accounting
    for i, name in enumerate(traits, start=1):
        after = accounting_named("+".join([base, *traits[:i]]))
        changed = [k for k in vars(after) if k not in ("name", "origin") and getattr(after, k) != getattr(before, k)]
        origins |= dict.fromkeys(changed, f"trait {name}, {TRAITS[name].what}: {TRAITS[name].source}")
        before = after
    found = {}
    for key, value in vars(accounting).items():
        if key not in ("name", "origin"):
            origin = origins.get(key) or origins.get(_SAME_ORIGIN.get(key, ""), "")
            short = _short(value.get(zero) if key == "zero" else value)
            found[f"engine.{key}"] = Source(f"engine.{key}", short, _trust_of(origin), origin or _NO_ORIGIN)
    return found


_SAME_ORIGIN = {
    "elementwise_backward": "elementwise_forward", "kernels_backward": "kernels_forward", "kernels_tp": "kernels_forward",
    "kernels_gather": "kernels_forward", "logit_bytes_split": "logit_bytes", "logit_bytes_fp32": "logit_bytes",
    "optimizer_whole_bytes": "optimizer_bytes",
}  # fmt: skip
"""Fields whose origin another one's text covers."""

_WORDS: tuple[tuple[str, Provenance], ...] = (
    ("assumed", "assumed"), ("fitted", "fitted"), ("published run", "fitted"), ("regression", "fitted"),
    ("measured", "measured"), ("median", "measured"),
)  # fmt: skip


def _trust_of(origin: str) -> Provenance:
    """How far to trust an accounting value, from the words of its origin; a documented or counted one is a `datasheet`."""
    if not origin:
        return "assumed"
    return next((kind for word, kind in _WORDS if word in origin), "datasheet")


def _short(value: Any) -> Value:
    """An accounting value as a number or short text."""
    if isinstance(value, (bool, str)):
        return str(value)
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, ZeroRule):
        return ", ".join(f"{h.part} {h.size}{' / D' if h.shard else ''}" for h in value.backward) + " bytes a parameter"
    if isinstance(value, tuple):
        numbers = all(isinstance(v, (int, float)) for v in value)
        return ", ".join(f"{v:g}" for v in value) if numbers else f"{len(value)} tensors"
    if isinstance(value, dict):
        nested = any(isinstance(v, (dict, Elementwise)) for v in value.values())
        return "; ".join(f"{k}: {_short(v)}" for k, v in value.items()) if nested else _pairs(value)
    return _pairs(vars(value)) if isinstance(value, Elementwise) else " ".join(str(value).split())


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in values.items()) or "nothing"


def _constants(task: Task) -> dict[str, Source]:
    fitted = task.calibration.constants
    found = {}
    for name, constant in CONSTANTS.items():
        key = f"constant.{name}"
        figure = fitted.get(name)
        found[key] = (
            Source(key, figure.base, figure.provenance, figure.source)
            if figure is not None
            else Source(key, constant.prior, "assumed", _PRIOR)
        )
    return found


def _growth(task: Task) -> tuple[str, ...]:
    """All times grow with the cluster beyond one node."""
    return ("constant.scale",) if task.growth != 1.0 else ()


# ---- collectives ---------------------------------------------------------------------------------------------------


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


_MOVED = {"all_reduce": 2.0}
"""Passes of the tensor through a link that bus bandwidth counts."""

_HIDE = "{:.0%} hides under compute, by the engine's share"


def _collectives(c: _Case) -> tuple[Collective, ...]:
    """Every kind of collective on the slowest rank (step-wise ones: on the rank that they hold up longest)."""
    rows: list[Collective] = []
    s, g = c.slowest, c.task.growth
    n = max(int(c.stages.layers[s]), 1)
    again = [int(c.stages.selective[s]), int(c.stages.full[s])]
    for i, kind in enumerate(c.kinds):
        layers, t = c.m * float(c.counts[s, i]), kind.seconds
        share = float(c.counts[s, i]) / n
        for k, where in enumerate(("forward", "backward")):
            tp, cp, ep = ((getattr(t, f"{axis}_{where}")[0]) for axis in ("tp", "cp", "ep"))
            rows += _tensor_rows(c, kind, where, layers, g * layers * float(tp))
            rows += _context_rows(c, kind, where, layers, g * layers * float(cp))
            rows += _expert_rows(c, kind, where, layers, 1.0, g * layers * float(ep))
            zero = float(getattr(kind.traffic, where)[0])
            rows += _zero_rows(c, kind, where, layers, g * layers * zero)
            mode, times = RECOMPUTE_MODES[k + 1], c.m * share * again[k]
            rows += _tensor_rows(c, kind, mode, times, g * times * float(t.tp_recompute[k][0]))
            repeated = c.task.accounting.recomputed[mode].get("experts", 0.0)
            rows += _expert_rows(c, kind, mode, times, repeated, g * times * float(t.ep_recompute[k][0]))
    if c.ends(s)[1]:
        rows += _head_rows(c, g * c.m * float(c.kinds[0].seconds.head_tp[0]))
    rows += _pipeline_rows(c)
    return tuple(rows + _step_rows(c))


def _priced(
    c: _Case, part: str, where: str, calls: Sequence[_Call], exposed: float, hides: str, figures: tuple[str, ...]
) -> list[Collective]:
    """Rows of calls that expose `exposed` seconds together, each in proportion to its busy time."""
    h, g, one = c.task.hardware, c.task.growth, np.ones(1)
    made = [x for x in calls if x.calls > 0 and x.n > 1]
    seconds = [
        g * x.factor * float(collective_seconds(x.op, x.n * one, x.stride * one, x.n_bytes * one, h, x.copies)[0]) for x in made
    ]
    busy = [x.calls * t for x, t in zip(made, seconds, strict=True)]
    total = sum(busy)
    rows = []
    for x, each, all_calls in zip(made, seconds, busy, strict=True):
        tiers = _tiers_crossed(c.task, x.n, x.stride)
        moved = _MOVED.get(x.op, 1.0) * (x.n - 1.0) / x.n * x.n_bytes
        names = tuple(n for tier in tiers for n in _tier_figures(tier) if x.op == "all_reduce" or "all_reduce" not in n)
        rows.append(
            Collective(
                part, where, x.group, x.op, int(x.n), int(x.stride), tuple(t.name for t in tiers), x.n_bytes, x.calls, each,
                all_calls, exposed * all_calls / total if total else 0.0, moved / each if each else 0.0, hides,
                (*figures, *names, *_growth(c.task)),
            )
        )  # fmt: skip
    return rows


def _tiers_crossed(task: Task, n: float, stride: float) -> list[Tier]:
    """The tiers that `collective_seconds` charges a group for."""
    inner, crossed = 1.0, []
    for tier in task.hardware.network:
        if n > 1 and n * stride > inner:
            crossed.append(tier)
        inner = float(tier.size) if tier.size is not None else np.inf
    return crossed


def _tensor_rows(c: _Case, kind: _Kind, where: str, times: float, exposed: float) -> list[Collective]:
    """Collectives of the layers over the tp group."""
    a, s, task = kind.task.accounting, kind.shapes, kind.task
    traffic = a.tp_sequence if c.layout.sequence_parallel else a.tp_plain
    counts = {"forward": traffic.forward, "backward": traffic.backward}.get(where, traffic.recompute.get(where, {}))
    layers = times * (1.0 if task.model.layer.mlp.dense_width else 0.5)
    n_bytes = float(s.tokens[0]) * task.model.hidden * task.job.compute_bytes
    tp, factor = float(c.layout.tp), task.constant("tp")
    calls = [_Call("tp", op, tp, 1.0, n_bytes, count * layers, factor) for op, count in counts.items()]
    place = f"{kind.label}layers, {where if where in ('forward', 'backward') else where + ' recompute'}"
    hides = _HIDE.format(a.tp_overlap)
    return _priced(c, "tp_comm", place, calls, exposed, hides, ("engine.tp_overlap", "constant.tp"))


def _context_rows(c: _Case, kind: _Kind, where: str, times: float, exposed: float) -> list[Collective]:
    """Keys and values around the cp ring, their gradients too in backward."""
    s, task = kind.shapes, kind.task
    n_bytes = float(s.tokens[0]) * 2.0 * task.model.kv_width / c.layout.tp * task.job.compute_bytes * c.layout.cp
    calls = [_Call("cp", "all_gather", c.layout.cp, c.layout.tp, n_bytes, times * (1.0 if where == "forward" else 2.0))]
    hides = "hides under attention, all but the engine's floor"
    return _priced(c, "cp_comm", f"{kind.label}keys and values, {where}", calls, exposed, hides, _OVERLAPPED)


_OVERLAPPED = ("engine.dp_floor", "overlap_slowdown")


def _expert_rows(c: _Case, kind: _Kind, where: str, times: float, repeated: float, exposed: float) -> list[Collective]:
    """Routed tokens to their experts and back."""
    task, a, s, mlp = kind.task, kind.task.accounting, kind.shapes, kind.task.model.layer.mlp
    if not mlp.routed:
        return []
    sent = float(s.routed[0]) / c.layout.etp * task.model.hidden * task.job.compute_bytes
    factor, copies = task.constant("ep"), mlp.top_k if a.ep_once else 1
    ep, etp, both = float(c.layout.ep), float(c.layout.etp), 2.0 * times * repeated
    calls = [
        _Call("ep", "all_to_all", ep, etp, sent, both, factor, copies),
        _Call("etp", "all_gather", etp, 1.0, sent * etp, both, factor),
    ]
    place = f"{kind.label}routed tokens, {where if where in ('forward', 'backward') else where + ' recompute'}"
    hides = _HIDE.format(a.ep_overlap)
    return _priced(c, "ep_comm", place, calls, exposed, hides, ("engine.ep_overlap", "constant.ep"))


def _state_calls(c: _Case, kind: _Kind, item: Traffic, times: dict[str, float]) -> list[_Call]:
    """Calls of one collective over the ranks that share parameters, by place; `times` a step."""
    size = kind.task.accounting.size(item.size, kind.task.job.compute_bytes)
    x, factor, p = c.x, kind.task.constant("dp"), kind.params
    dense = {k: size * float(v[0]) for k, v in primitives._places(p).items()}
    shard, stride = float(x.shard[0]), float(x.tp[0])
    calls = [_Call("dp x cp", item.op, shard, stride, dense[k], n, factor) for k, n in times.items() if dense[k]]
    if float(p["experts"][0]):
        routed, apart = size * float(p["experts"][0]), float((x.ep * x.etp)[0])
        calls.append(_Call("expert dp", item.op, float(x.expert_shard[0]), apart, routed, times["layer"], factor))
    return calls


def _zero_rows(c: _Case, kind: _Kind, where: str, times: float, exposed: float) -> list[Collective]:
    """Gathers and reductions of every micro-batch (ZeRO 2 and 3)."""
    rule = kind.task.accounting.zero[c.layout.zero]
    items = [t for t in rule.traffic if t.per == "microbatch" and t.under == where]
    calls = [call for item in items for call in _state_calls(c, kind, item, {"layer": times})]
    hides = f"hides under the layer's {where}, all but the engine's floor"
    figures = ("engine.dp_floor", "overlap_slowdown", "engine.zero", "constant.dp")
    return _priced(c, "zero_comm", f"{kind.label}layers, {where}", calls, exposed, hides, figures)


def _step_rows(c: _Case) -> list[Collective]:
    """Gathers and reductions once a step, on the rank that they hold up longest."""
    d = c.updating
    first, last = c.ends(d)
    calls: list[_Call] = []
    for i, kind in enumerate(c.kinds):
        times = {"layer": float(c.counts[d, i])} | ({"first": float(first), "last": float(last)} if i == 0 else {})
        for item in kind.task.accounting.zero[c.layout.zero].traffic:
            if item.per == "step":
                calls += _state_calls(c, kind, item, times)
    hidden = int(c.stages.layers[d]) * c.ns("hide", d)
    hides = f"{hidden:.4g} s hide under backward, all but the engine's floor"
    figures = ("engine.dp_window", "engine.dp_floor", "engine.zero", "constant.dp")
    exposed = float(c.cost.once[d]) / 1e9 - _update_seconds(c, d)
    rows = _priced(c, "dp_comm", f"once a step, rank {d}", calls, exposed, hides, figures)
    return _joined(rows)


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


def _update_seconds(c: _Case, rank: int) -> float:
    """The optimizer's time on a rank."""
    first, last = c.ends(rank)
    layers = int(c.stages.layers[rank]) * c.ns("update", rank)
    return layers + first * c.ns("update_first", rank) + last * c.ns("update_last", rank)


def _head_rows(c: _Case, exposed: float) -> list[Collective]:
    """The head's collectives over tp."""
    task, s = c.task, c.kinds[0].shapes
    n_bytes = float(s.tokens[0]) * task.model.hidden * task.job.compute_bytes
    op, count = ("all_gather", 2.0) if c.layout.sequence_parallel else ("all_reduce", 1.0)
    calls = [_Call("tp", op, c.layout.tp, 1.0, n_bytes, c.m * count, task.constant("tp"))]
    return _priced(c, "tp_comm", "head, forward and backward", calls, exposed, "nothing", ("constant.tp",))


def _pipeline_rows(c: _Case) -> list[Collective]:
    """Activations to the next rank and gradients back."""
    task, layout, g = c.task, c.layout, c.task.growth
    if layout.pp == 1:
        return []
    boundary = memory.activation_bytes(c.kinds[0].task, c.x).boundary.astype(float)
    sent = boundary / layout.tp if task.accounting.pp_split and not layout.sequence_parallel else boundary
    hops = neighbour_seconds(sent, task.hardware)
    depth = sum(layout.world_size > (tier.size or np.inf) for tier in task.hardware.network[: len(hops) - 1])
    tier, each = task.hardware.network[depth], g * task.constant("pp") * (float(hops[depth][0]) + task.accounting.pp_slot)
    calls, stride = 2.0 * c.m * layout.virtual_stages, layout.tp * layout.cp * layout.dp
    names = tuple(n for n in _tier_figures(tier) if n.endswith(("bandwidth", "latency", "efficiency")))
    hides = _HIDE.format(1.0 - task.accounting.pp_exposed.get(layout.schedule, 1.0))
    return [
        Collective(
            "pp_comm", "activations and gradients", "pp", "send and receive", layout.pp, stride, (tier.name,), float(sent[0]),
            calls, each, calls * each, c.m * c.ns("p2p"), float(sent[0]) / each, hides,
            ("engine.pp_exposed", "constant.pp", *names, *_growth(task)),
        )
    ]  # fmt: skip


# ---- time ----------------------------------------------------------------------------------------------------------

_GEMM = "tiles and waves under a memory roofline (planner.cost.compute.gemm_seconds)"
_STREAM = "bytes over reached memory bandwidth (planner.cost.compute.streaming_seconds)"
_STREAMED = ("device.memory_efficiency", "device.memory_bandwidth")
_RING = "ring with measured efficiency (planner.cost.collectives.collective_seconds)"
_FORMULAS = {
    "fused": "2 b q k h d FLOPs at the kernel's share of the peak, backward 2.5 times as many (Dao 2023; "
    "planner.cost.compute.fused_attention_seconds)",
    "unfused": "batched products and passes over the scores (planner.cost.compute.unfused_attention_seconds)",
    "host": "what launching takes beyond the device's time (planner.cost.operators.bound_by_host)",
    "recompute": "the engine's share of each operator of forward (planner.cost.operators.layer_seconds)",
    "tp_comm": _RING + "; exposed: 1 - overlap",
    "ep_comm": _RING + "; exposed: 1 - overlap",
    "cp_comm": _RING + "; exposed beside attention (planner.cost.compute.overlapped; Liu 2023)",
    "zero_comm": _RING + "; exposed beside a layer's compute (planner.cost.compute.overlapped)",
    "dp_comm": _RING + "; exposed: max(traffic - hidden, floor) (planner.cost.step.stage_once)",
    "pp_comm": "latency and bytes over bandwidth of the outermost tier (planner.cost.collectives.neighbour_seconds)",
    "gpipe": "GPipe: (m - 1) max R + sum R, less the slowest rank's own m R (planner.cost.step.combine)",
    "1f1b": "1F1B: (v m - 1) max R + sum R, less the slowest rank's own v m R (Narayanan 2021, 2.2; planner.cost.step.combine)",
    "interleaved": "interleaved: ((v m - 1) max R + sum R) / v, less the slowest rank's own m R (Narayanan 2021, 2.2; "
    "planner.cost.step.combine)",
    "fixed": "fixed host time of a step (engine's accounting)",
    "rounding": "whole nanoseconds, rounded up (planner.cost.step)",
}


@dataclass
class _Lines:
    """Terms as they are found."""

    c: _Case
    found: list[Term] = field(default_factory=list)

    def add(
        self, part: str, name: str, seconds: float, times: float, formula: str, inputs: Inputs, figures: tuple[str, ...],
        bound: str = "",
    ) -> None:  # fmt: skip
        """One line; `seconds` without the growth of the cluster."""
        seconds *= self.c.task.growth
        names = figures + tuple(n for n in _growth(self.c.task) if n not in figures)
        self.put(part, name, seconds, times, formula, inputs, names, bound)

    def put(
        self, part: str, name: str, seconds: float, times: float, formula: str, inputs: Inputs, figures: tuple[str, ...],
        bound: str = "",
    ) -> None:  # fmt: skip
        """One line of final seconds."""
        total = seconds * times
        provenance, least = self.c.book.least(figures)
        share = total / self.c.plan.estimate.step_time_s
        self.found.append(Term(part, name, seconds, times, total, share, formula, inputs, bound, provenance, least, figures))


def _terms(c: _Case, collectives: Sequence[Collective]) -> tuple[Term, ...]:
    """Every line of the step time on the slowest rank; they add up to the estimate."""
    lines, s = _Lines(c), c.slowest
    n = max(int(c.stages.layers[s]), 1)
    for i, kind in enumerate(c.kinds):
        count = float(c.counts[s, i])
        if not count:
            continue
        for direction in (0, 1):
            _layer_lines(lines, kind, direction, c.m * count)
        for k, again in enumerate((c.stages.selective[s], c.stages.full[s])):
            if again:
                _recompute_lines(lines, kind, k, c.m * float(again) * count / n)
    _end_lines(lines)
    for row in collectives:
        inputs: Inputs = {
            "bytes": row.bytes_per_call, "ranks": row.ranks, "stride": row.stride, "tiers": ", ".join(row.tiers),
            "busy s a call": row.seconds_per_call, "hides": row.hides,
        }  # fmt: skip
        name = f"{row.op} over {row.group}: {row.where}"
        lines.put(row.part, name, row.exposed / row.calls, row.calls, _FORMULAS[row.part], inputs, row.figures)
    _pipeline_line(lines)
    _once_lines(lines)
    return tuple(lines.found)


@dataclass(frozen=True)
class _Product:
    """One projection of a layer: C[m, n] = A[m, k] B[k, n], `groups` of them in a launch."""

    part: str
    name: str
    m: Floats
    n: Floats
    k: Floats
    groups: Floats | float = 1.0


def _products(task: Task, s: operators._Shapes) -> list[_Product]:
    """The projections of one layer by name, in the shapes of `operators._gemms` and `operators._experts`."""
    a, mlp = task.model.layer.attention, task.model.layer.mlp
    h = np.full_like(s.tp, float(task.model.hidden))
    names = ["query, key, value", "attention output"]
    if a.kind == "latent":
        query = ["query down", "query up"] if a.q_lora_rank else ["query"]
        names = ["key/value down", "key/value up", *query, "attention output"]
    found = [_Product("gemm", name, *shape) for name, shape in zip(names, operators._attention_shapes(task, s), strict=True)]
    up, shared = ("gate, up" if mlp.matrices == 3 else "up"), "shared experts' " if mlp.routed else "MLP "
    if mlp.dense_width:
        inner = np.full_like(h, float(mlp.dense_width)) / s.tp
        found += [_Product("gemm", shared + up, s.tokens, (mlp.matrices - 1.0) * inner, h)]
        found += [_Product("gemm", shared + "down", s.tokens, h, inner)]
    if mlp.routed:
        found.append(_Product("gemm", "router", s.tokens / s.split, np.full_like(h, float(mlp.experts)), h))
        groups, width = np.maximum(mlp.experts / s.ep, 1.0), mlp.width / s.etp
        rows = s.routed / groups
        found += [_Product("experts", "experts' " + up, rows, (mlp.matrices - 1.0) * width, h, groups)]
        found += [_Product("experts", "experts' down", rows, h, width, groups)]
    return found


def _product_figures(task: Task) -> tuple[str, ...]:
    peak = f"device.peak.{task.job.precision}"
    base = ("device.gemm", "device.sustained", peak, "device.memory_bandwidth", "constant.compute")
    if task.job.linears == "same":
        return base
    return (*base, f"device.peak.{task.job.linears}", "code.NARROW_SHARE", "constant.narrow")


def _layer_lines(lines: _Lines, kind: _Kind, direction: int, times: float) -> None:
    """The compute of one layer, forward (0) or backward (1)."""
    task, s, word = kind.task, kind.shapes, ("forward", "backward")[direction]
    parts = operators._parts(task, s, direction)
    listed = {"gemm": 0.0, "experts": 0.0}
    bound = _bound(kind, direction)
    for product in _products(task, s):
        listed[product.part] += _product_lines(lines, kind, product, direction, times, bound)
    for part, seconds in listed.items():
        rest = float(parts[part][0]) - seconds
        if abs(rest) > 1e-9 * max(seconds, 1e-12):
            name = f"{kind.label}other products ({part}): {word}"
            lines.add("compute", name, rest, times, _GEMM, {}, _product_figures(task), bound)
    seconds = float(parts["attention"][0])
    figures, inputs = _attention_inputs(task, s)
    name = f"{kind.label}attention: {word}"
    lines.add("compute", name, seconds, times, _FORMULAS[task.accounting.attention], inputs, figures, bound)
    seconds = float(parts["elementwise"][0])
    d = task.hardware.device
    moved = seconds / task.constant("elementwise") * d.memory_bandwidth.base * d.memory_efficiency.base
    figures = (*_STREAMED, f"engine.elementwise_{word}", "constant.elementwise")
    name = f"{kind.label}norms, activations, residuals: {word}"
    lines.add("compute", name, seconds, times, _STREAM, {"bytes": moved, "tokens": float(s.tokens[0])}, figures, bound)
    _host_line(lines, kind, direction, times)


def _product_lines(lines: _Lines, kind: _Kind, p: _Product, direction: int, times: float, bound: str) -> float:
    """Forward of a projection, or its two products of backward; the seconds of both."""
    task = kind.task
    shapes = [("forward", p.m, p.n, p.k, 1.0)]
    if direction:
        wgrad = task.accounting.wgrad
        shapes = [("input gradient", p.m, p.k, p.n, 1.0), ("weight gradient", p.k, p.n, p.m, wgrad)]
    slow, total = task.hardware.device.sustained.base * task.constant("compute"), 0.0
    for word, m, n, k, factor in shapes:
        seconds = factor * slow * float(operators._linear(task, m, n, k, p.groups)[0])
        inputs = _product_inputs(task, m, n, k, p.groups, seconds) | ({"slower": factor} if factor != 1.0 else {})
        figures = _product_figures(task) + (("engine.wgrad",) if factor != 1.0 else ())
        lines.add("compute", f"{kind.label}{p.name}: {word}", seconds, times, _GEMM, inputs, figures, bound)
        total += seconds
    return total


def _product_inputs(task: Task, m: Floats, n: Floats, k: Floats, groups: Floats | float, seconds: float) -> Inputs:
    sizes = [float(np.ravel(v)[0]) for v in (m, n, k, groups)]
    work = 2.0 * sizes[0] * sizes[1] * sizes[2] * sizes[3]
    names = ("M", "N", "K", "count")
    shape: Inputs = {name: round(v, 3) for name, v in zip(names, sizes, strict=True)}
    return shape | {"FLOP/s reached": work / seconds}


def _attention_inputs(task: Task, s: operators._Shapes) -> tuple[tuple[str, ...], Inputs]:
    a, model, length = task.accounting, task.model, task.job.seq_len
    inputs: Inputs = {
        "sequences": float(s.micro_batch[0]), "queries": length / float(s.cp[0]), "keys": length,
        "heads": model.heads / float(s.tp[0]), "head_dim": model.attention_dim_of(model.layer),
    }  # fmt: skip
    if window := model.layer.attention.sliding_window:
        inputs["window"] = window
    figures = ["device.sustained", f"device.peak.{task.job.precision}", "constant.compute"]
    if a.attention == "unfused":
        figures += ["code.UNFUSED_RATE", "engine.score_bytes", *_STREAMED]
        return tuple(figures), inputs
    if a.attention_rate != 1.0:
        figures.append("engine.attention_rate")
        inputs["rate over the profile's"] = a.attention_rate
    return ("device.attention", *figures), inputs


def _bound(kind: _Kind, direction: int) -> str:
    """Whether the device or the host decides how long a layer takes."""
    device = (kind.seconds.forward, kind.seconds.backward)[direction]
    return "host" if float(kind.compute[direction][0]) > float(device[0]) else "device"


def _host_line(lines: _Lines, kind: _Kind, direction: int, times: float) -> None:
    """What the host adds to a layer that it cannot launch as fast as the device runs it."""
    t, task, word = kind.seconds, kind.task, ("forward", "backward")[direction]
    device, host = float(getattr(t, word)[0]), float(getattr(t, f"host_{word}")[0])
    beside = float((getattr(t, f"tp_{word}") + getattr(t, f"cp_{word}"))[0])
    figures = ["device.launch", f"engine.kernels_{word}", "constant.host"]
    rule = task.accounting.zero[lines.c.layout.zero]
    if any(x.op == "all_gather" and x.per == "microbatch" for x in rule.traffic):
        host += task.accounting.kernels_gather[direction] * task.hardware.device.launch.base * task.constant("host")
        figures.append("engine.kernels_gather")
    if lines.c.layout.tp > 1:
        figures.append("engine.kernels_tp")
    if task.model.layer.mlp.routed:
        figures.append("engine.kernels_routed")
    inputs: Inputs = {"device s": device, "host s": host, "traffic beside it s": beside}
    name, rest = f"{kind.label}host floor: {word}", float(kind.compute[direction][0]) - device
    lines.add("compute", name, rest, times, _FORMULAS["host"], inputs, tuple(figures), _bound(kind, direction))


def _recompute_lines(lines: _Lines, kind: _Kind, k: int, times: float) -> None:
    """Compute that a recompute mode repeats."""
    task, mode = kind.task, RECOMPUTE_MODES[k + 1]
    parts, words = operators._parts(task, kind.shapes, 0), {"gemm": "products", "experts": "experts' products"}
    compute, streamed = _product_figures(task), (*_STREAMED, "engine.elementwise_forward", "constant.elementwise")
    attention = _attention_inputs(task, kind.shapes)[0]
    figures = {"gemm": compute, "experts": compute, "attention": attention, "elementwise": streamed}
    listed = 0.0
    for part, share in task.accounting.recomputed[mode].items():
        seconds = share * float(parts[part][0])
        listed += seconds
        if seconds:
            name = f"{kind.label}{mode} recompute: {words.get(part, part)}"
            inputs: Inputs = {"share of forward": share}
            lines.add("recompute", name, seconds, times, _FORMULAS["recompute"], inputs, (*figures[part], "engine.recomputed"))
    rest = float(kind.seconds.recompute[k][0]) - listed
    host = ("device.launch", "engine.kernels_forward", "constant.host")
    bound = "host" if rest > 1e-12 else "device"
    lines.add("recompute", f"{kind.label}{mode} recompute: host floor", rest, times, _FORMULAS["host"], {}, host, bound)


def _end_lines(lines: _Lines) -> None:
    """Embedding and head, where the slowest rank has them."""
    c, kind = lines.c, lines.c.kinds[0]
    task, s, d = kind.task, kind.shapes, kind.task.hardware.device
    first, last = c.ends(c.slowest)
    if first:
        rows: Inputs = {"tokens": float(s.tokens[0]), "hidden": task.model.hidden}
        lines.add("compute", "embedding", float(kind.seconds.embedding[0]), c.m, _STREAM, rows, _STREAMED)
    if not last:
        return
    vocab, h = task.model.vocab / s.tp, np.full_like(s.tp, float(task.model.hidden))
    slow, listed, e = d.sustained.base * task.constant("compute"), 0.0, task.job.compute_bytes
    shapes = {"forward": (s.tokens, vocab, h), "input gradient": (s.tokens, h, vocab), "weight gradient": (h, vocab, s.tokens)}
    figures = ("device.gemm", "device.sustained", f"device.peak.{task.job.precision}", "device.memory_bandwidth")
    for word, shape in shapes.items():
        seconds = slow * float(gemm_seconds(*shape, d, task.peak, e)[0])
        inputs = _product_inputs(task, *shape, 1.0, seconds)
        lines.add("compute", f"head: {word}", seconds, c.m, _GEMM, inputs, (*figures, "constant.compute"))
        listed += seconds
    a = task.accounting
    inputs = {"tokens": float(s.tokens[0]), "vocabulary": float(vocab[0]) if a.logits_split else task.model.vocab,
              "bytes each": a.loss_traffic * e / 2.0}  # fmt: skip
    names = (*_STREAMED, "engine.loss_traffic", "constant.elementwise")
    lines.add("compute", "loss", float(kind.seconds.head[0]) - listed, c.m, _STREAM, inputs, names)


def _pipeline_line(lines: _Lines) -> None:
    """Waiting for the other ranks."""
    c, time = lines.c, lines.c.cost.time
    if c.layout.pp == 1:
        return
    v = c.layout.virtual_stages
    bubble = (int(time.sum()) - int(time[c.slowest])) / v / 1e9
    inputs: Inputs = {
        "max R s": float(time.max()) / 1e9, "sum R s": float(time.sum()) / 1e9, "m": c.m, "v": v, "slowest rank": c.slowest,
    }  # fmt: skip
    behind = sorted({name for term in lines.found for name in term.figures if term.part != "dp_comm"})
    lines.put("bubble", "waiting for other ranks", bubble, 1, _FORMULAS[c.layout.schedule], inputs, tuple(behind))


def _once_lines(lines: _Lines) -> None:
    """The optimizer, the fixed time of a step, and what rounding leaves."""
    c, a, d = lines.c, lines.c.task.accounting, lines.c.updating
    figures = (*_STREAMED, "engine.optimizer_bytes", "engine.optimizer_whole_bytes")
    first, last = c.ends(d)
    each: Inputs = {"rank": d, "bytes an owned parameter": a.optimizer_bytes, "bytes a parameter": a.optimizer_whole_bytes}
    places = (("layers", "update", int(c.stages.layers[d])), ("embedding", "update_first", int(first)),
              ("head and final norm", "update_last", int(last)))  # fmt: skip
    for name, key, times in places:
        if times and c.ns(key, d):
            lines.put("optimizer", f"optimizer: {name}", c.ns(key, d), times, _STREAM, each, (*figures, *_growth(c.task)))
    fixed = ("engine.step_seconds",)
    lines.add("other", "fixed time of a step", a.step_seconds, 1, _FORMULAS["fixed"], {}, fixed)
    rest = c.plan.estimate.step_time_s - sum(t.total for t in lines.found)
    lines.put("rounding", "rounding", rest, 1, _FORMULAS["rounding"], {}, ())


# ---- memory --------------------------------------------------------------------------------------------------------


@dataclass
class _Held:
    """Lines of one rank's memory as they are found."""

    c: _Case
    rank: int
    found: list[Bytes] = field(default_factory=list)

    def add(self, part: str, name: str, n_bytes: float, inputs: Inputs, *figures: str) -> None:
        """One line, unless it is empty: less than a byte is rounding."""
        if n_bytes and (part == "rounding" or abs(n_bytes) >= 1):
            self.found.append(Bytes(part, name, float(n_bytes), inputs, *self.c.book.least(figures), figures))

    @property
    def kinds(self) -> list[tuple[_Kind, int]]:
        """The kinds of layers that the rank holds, with their counts."""
        return [(k, int(n)) for k, n in zip(self.c.kinds, self.c.counts[self.rank], strict=True) if n]

    def largest(self, name: str) -> _Kind:
        """The kind of layers whose primitive `name` is the largest: it decides a peak."""
        present = [k for k, _ in self.kinds] or [self.c.kinds[0]]
        return max(present, key=lambda k: int(getattr(k.p, name)[0]))


def _ranks(c: _Case) -> tuple[Rank, ...]:
    return tuple(_rank(c, s) for s in range(c.layout.pp))


def _rank(c: _Case, s: int) -> Rank:
    """One pipeline rank at its peak."""
    held = _Held(c, s)
    updating = int(c.cost.update_bytes[s]) > int(c.cost.backward_bytes[s])
    moment = "optimizer update" if updating else "backward"
    _state_lines(held, updating)
    if updating:
        cause = _update_lines(held)
    else:
        _saved_lines(held)
        cause = _peak_lines(held)
    _buffer_lines(held, updating)
    allocated, ratio = int(c.cost.allocated[s]), c.task.reserved_ratio
    held.add("rounding", "rounding", allocated - sum(b.n_bytes for b in held.found), {})
    outside = _outside(c)
    reserved = allocated * ratio
    total = reserved + int(c.q.outside[s])
    limit = c.plan.estimate.memory.limit_gib * GIB
    parts = tuple(held.found)
    return Rank(str(s), moment, cause, parts, allocated, ratio, reserved, outside, total, limit, limit - total)


def _folded(ranks: Sequence[Rank]) -> tuple[Rank, ...]:
    """Equal neighbours as one entry."""
    runs: list[tuple[Rank, int]] = []
    for rank in ranks:
        if runs and replace(runs[-1][0], ranks=rank.ranks) == rank:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((rank, 1))
    return tuple(replace(r, ranks=r.ranks if n == 1 else f"{r.ranks}-{int(r.ranks) + n - 1}") for r, n in runs)


def _state_lines(held: _Held, updating: bool) -> None:
    """Parameters, gradients and optimizer states."""
    c, x = held.c, held.c.x
    first, last = c.ends(held.rank)
    for part in memory.PARTS:
        for kind, count in held.kinds:
            task = kind.task
            dense, routed = (memory.state_bytes(task, x.zero, d, x.microbatches) for d in (x.shard, x.expert_shard))
            per, routed_per = (float((b.update if updating else b.backward)[part][0]) for b in (dense, routed))
            layer, experts = float(kind.params["layer"][0]), float(kind.params["experts"][0])
            inputs: Inputs = {"layers": count, "parameters a layer": layer, "bytes a parameter": per}
            held.add(part, f"{kind.label}{part} of layers", count * layer * per, inputs, "engine.zero")
            inputs = {"layers": count, "parameters a layer": experts, "bytes a parameter": routed_per}
            held.add(part, f"{kind.label}{part} of routed experts", count * experts * routed_per, inputs, "engine.zero")
        base = c.kinds[0]
        states = memory.state_bytes(base.task, x.zero, x.shard, x.microbatches)
        per = float((states.update if updating else states.backward)[part][0])
        ends = primitives._places(base.params)
        for there, key, name in ((first, "first", "embedding"), (last, "last", "head and final norm")):
            count_ = float(ends[key][0])
            inputs = {"parameters": count_, "bytes a parameter": per}
            held.add(part, f"{part} of {name}", there * count_ * per, inputs, "engine.zero")


def _saved_lines(held: _Held) -> None:
    """Saved activations by tensor."""
    c, s = held.c, held.rank
    place = (c.x.schedule, c.x.pp, c.x.virtual_stages, c.x.microbatches, np.array([s]))
    n, n1, n2 = (int(a[s]) for a in (c.stages.layers, c.stages.selective, c.stages.full))
    weight = int(in_flight_layers(*place, np.array([n]))[0])
    flight = int(in_flight(*place)[0])
    whole = c.layout.virtual_stages > 1  # a rank with chunks is recomputed as a whole or not at all
    weights = [0, (weight if n1 else 0) if whole else flight * n1, (weight if n2 else 0) if whole else flight * n2]
    weights[0] = weight - weights[1] - weights[2]
    for kind, count in held.kinds:
        for name, (n_bytes, inputs) in _saved_tensors(c, kind, [w * count / n for w in weights]).items():
            inputs["chunks and micro-batches in flight"] = flight
            held.add("activations", f"{kind.label}saved: {name}", n_bytes, inputs, "engine.saved")


def _saved_tensors(c: _Case, kind: _Kind, weights: Sequence[float]) -> dict[str, tuple[float, Inputs]]:
    """Bytes of each saved tensor by name; `weights` are (layer, micro-batch) pairs held, by recompute mode."""
    rows: dict[str, tuple[float, Inputs]] = {}
    tokens, several = float(kind.shapes.tokens[0]), sum(w > 0 for w in weights) > 1
    for item in kind.task.accounting.saved:
        for mode, pairs in zip(RECOMPUTE_MODES, weights, strict=True):
            each = float(memory._saved(kind.task, [item], mode, c.x)[0])
            if each and pairs:
                n_bytes, inputs = rows.get(item.name, (0.0, {"tokens": tokens}))
                key, suffix = "bytes a token and layer", f" ({mode})" if several else ""
                inputs[key + suffix] = float(inputs.get(key + suffix, 0.0)) + each
                inputs["layers x in flight" + suffix] = pairs
                rows[item.name] = (n_bytes + tokens * each * pairs, inputs)
    return rows


def _peak_lines(held: _Held) -> str:
    """What lives only at the peak of backward; the peak in words. The moments are those of `step.stage_transient`."""
    c, s = held.c, held.rank
    first, last = c.ends(s)
    q, modes = c.q.take(np.array([s])), (c.stages.full[s], c.stages.selective[s])
    mode = 2 if modes[0] else 1 if modes[1] else 0
    act = int((q.act0, q.act1, q.act2)[mode][0])
    layer = int(q.transient[0]) + int(q.act0[0]) - act
    carried_name = "carried_first" if first else "carried"
    carried, reduction = int(getattr(q, carried_name)[0]), max(int(q.reduction[0]) - act, 0)
    moments = {"reduction": layer + reduction}
    if last:
        moments |= {"head": int(q.head_transient[0]) + carried, "head reduction": layer + int(q.head_reduction[0])}
    else:
        moments["layer"] = layer + carried
    peak = max(moments, key=lambda k: moments[k])
    if peak == "head":
        _head_lines(held)
    else:
        _layer_bytes(held, int(q.act0[0]) - act)
    zero, rank = "engine.zero", "last rank" if last else "first rank" if first else "middle rank"
    if peak in ("head", "layer"):
        held.add("transient", "reduction buffer carried from the micro-batch before", carried, {}, zero)
    elif peak == "reduction":
        held.add("transient", "reduction of the layer before, beyond its freed activations", reduction, {}, zero)
    else:
        held.add("transient", "reduction of the head's unit", int(q.head_reduction[0]), {}, zero)
    words = {"head": f"backward of the head, logits in {_logits_kind(c.task)}", "layer": "backward of a layer"}
    what = words.get(peak, f"backward of a layer beside the reduction of {'the head' if 'head' in peak else 'the one before'}")
    again = f", {RECOMPUTE_MODES[mode]} recompute" if mode else ""
    place = (c.x.schedule, c.x.pp, c.x.virtual_stages, c.x.microbatches, np.array([s]))
    return f"{rank}, {what}{again}, {int(in_flight(*place)[0])} in flight"


def _logits_kind(task: Task) -> str:
    """The type that the loss works in."""
    return "fp32" if task.accounting.logit_bytes > 4 else task.job.precision


def _head_lines(held: _Held) -> None:
    c, kind = held.c, held.c.kinds[0]
    heads = int(memory.activation_bytes(kind.task, c.x).head[0])
    a, s = kind.task.accounting, kind.shapes
    logit = a.logit_bytes if kind.task.job.compute_bytes == 2 else a.logit_bytes_fp32
    inputs: Inputs = {
        "tokens": float(s.tokens[0]), "bytes a logit": logit,
        "more where split over tp": a.logit_bytes_split if c.layout.tp > 1 else 0.0,
        "vocabulary": kind.task.model.vocab / (c.layout.tp if a.logits_split else 1),
    }  # fmt: skip
    figures = ("engine.logit_bytes", "engine.logit_bytes_split", "engine.head_hidden", "engine.head_gathered")
    held.add("transient", f"logits, loss and head inputs ({_logits_kind(kind.task)})", heads, inputs, *figures)
    rest = int(kind.p.head_transient[0]) - heads
    held.add("transient", "gathered parameters and gradient of the head", rest, {}, "engine.zero")


def _layer_bytes(held: _Held, again: int) -> None:
    """Temporaries of one layer's backward."""
    kind = held.largest("transient")
    temporaries = int(memory.activation_bytes(kind.task, held.c.x).backward[0])
    a, rest = kind.task.accounting, int(kind.p.transient[0]) - temporaries
    inputs: Inputs = {"rows of the MLP width": a.backward_mlp, "rows of hidden": a.backward_hidden}
    figures = ("engine.backward_mlp", "engine.backward_hidden")
    held.add("transient", "temporaries of a layer's backward", temporaries, inputs, *figures)
    held.add("transient", "gathered parameters and gradients of a layer", rest, {}, "engine.zero")
    held.add("transient", "recomputed activations of a layer", again, {}, "engine.saved")


def _update_lines(held: _Held) -> str:
    """What lives beside the states when backward ends; the moment in words."""
    p, zero = held.c.q.take(np.array([held.rank])), "engine.zero"
    last = "last_embedding" if held.rank == 0 else "last_layer"
    unit = "embedding" if held.rank == 0 else "last layer"
    held.add("transient", "reduction buffer of the unit before the last", int(p.last_reduction[0]), {}, zero)
    held.add("transient", f"gradients and reduction of the {unit}", int(getattr(p, last)[0]), {}, zero)
    return "end of backward and optimizer update"


def _buffer_lines(held: _Held, updating: bool) -> None:
    """Buffers between ranks, resident ones, workspaces, and what the last rank keeps of the loss."""
    c, s, x = held.c, held.rank, held.c.x
    first, last = c.ends(s)
    p, a = c.q.take(np.array([s])), c.task.accounting
    ends = (np.array([int(first)]), np.array([int(last)]))
    received = int(step.receive_bytes(p, *ends)[0])
    inputs: Inputs = {"buffers": int(2 * c.layout.virtual_stages - first - last), "bytes each": int(p.receive[0])}
    held.add("buffers", "receive buffers", received, inputs, "engine.receive_all_microbatches", "engine.receive_count")
    if not updating:
        flight = int(in_flight(x.schedule, x.pp, x.virtual_stages, x.microbatches, np.array([s]))[0])
        sends = 1 if c.layout.virtual_stages > 1 else 1 - int(last)
        inputs = {"in flight": flight, "bytes each": int(p.boundary[0])}
        held.add("buffers", "stage outputs in flight", sends * flight * int(p.boundary[0]), inputs, "engine.keeps_stage_output")
        waiting, figures = int(last) * int(p.waiting[0]), ("engine.logits_wait", "engine.pipeline_logits")
        held.add("buffers", "logits of waiting micro-batches, stage output", waiting, {}, *figures)
    workspace = c.task.hardware.device.workspace.base
    held.add("buffers", "library workspaces", workspace, {}, "device.workspace")
    held.add("buffers", "resident gradient buffers of a layer", int(p.fixed[0]) - workspace, {}, "engine.zero")
    base = c.kinds[0]
    states = memory.state_bytes(base.task, x.zero, x.shard, x.microbatches)
    if last:
        beside = float(states.resident[0] * base.params["head"][0])
        held.add("buffers", "resident gradient buffer of the head", beside, {}, "engine.zero")
    if first and not updating and a.embedding_gradient_whole:
        model = base.task.model
        rest = (model.embedding_params - model.embedding_params / c.layout.tp) * float(states.whole_gradients[0])
        name = "gradient of the whole embedding, before it is split over tp"
        held.add("grads", name, rest, {}, "engine.embedding_gradient_whole")


def _outside(c: _Case) -> tuple[Bytes, ...]:
    """What the device holds outside the allocator."""
    d, a, held = c.task.hardware.device, c.task.accounting, _Held(c, 0)
    factor, groups = c.task.constant("outside"), int(memory.communicators(c.x)[0])
    once: Inputs = {} if factor == 1.0 else {"times, fitted": factor}
    held.add("outside", "driver context and kernels", factor * d.context.base, once, "device.context", "constant.outside")
    inputs: Inputs = {"process groups": groups, "bytes each": d.communicator.base, **once}
    names = ("device.communicator", "constant.outside")
    held.add("outside", "communicators", factor * groups * d.communicator.base, inputs, *names)
    held.add("outside", "others", factor * a.outside_bytes, once, "engine.outside_bytes", "constant.outside")
    held.add("rounding", "rounding", int(c.q.outside[0]) - sum(b.n_bytes for b in held.found), {})
    return tuple(held.found)
