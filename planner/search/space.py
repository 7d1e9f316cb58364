"""The declared space: which values each axis may take, pinned and forbidden ones, and the outer rows that obey the rules.

An outer row is a layout without its stages. Every row of the grid is counted: kept, or excluded by the first rule that
it breaks.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from planner import stopping
from planner.cost.task import INTERLEAVED, INTERLEAVED_ZB, NONE, SPLIT_CODES, V_CODES, Bools, Ints, LayoutArray, Task
from planner.engines.base import Engine, schedule_codes
from planner.engines.rule import Rule
from planner.errors import input_error
from planner.search.bounds import same_pipeline
from planner.specs.layout import CONTEXTS, OFFLOADS, RANK_ORDERS, RECOMPUTE_MODES, SCHEDULES, TYPE_ORDERS

MAX_MICRO_BATCH = 16
MAX_CHUNKS = 16
"""Chunks a rank, at most: Llama 3 used 8 or fewer; beyond, per-chunk overheads that the model lacks dominate."""
AXES = ("tp", "cp", "pp", "dp", "ep", "etp", "zero", "micro_batch", "virtual_stages")
"""Integer axes that can be pinned."""
NAMED = {"offload": OFFLOADS, "order": RANK_ORDERS, "type_order": TYPE_ORDERS, "context": CONTEXTS}
"""Axes whose values have names, in the order of their codes."""
SHORT = {"mbs": "micro_batch", "sp": "sequence_parallel", "vpp": "virtual_stages", "v": "virtual_stages"}
"""Short names of axes."""


@dataclass(frozen=True)
class Space:
    """Values of each axis. `modes` are the recompute modes that a layer may have."""

    tp: tuple[int, ...]
    cp: tuple[int, ...]
    pp: tuple[int, ...]
    micro_batch: tuple[int, ...]
    zero: tuple[int, ...]
    schedules: tuple[tuple[int, int], ...]
    """(schedule code, virtual stages)."""
    sequence_parallel: tuple[int, ...]
    dp: tuple[int, ...] = ()
    """Allowed dp degrees; empty for any."""
    ep: tuple[int, ...] = (1,)
    etp: tuple[int, ...] = (1,)
    """Of these a row takes 1 or its tp; any of them when pinned (`any_etp`)."""
    any_etp: bool = False
    modes: tuple[int, ...] = (0, 1, 2)
    offload: tuple[int, ...] = (0,)
    """Codes of what lives in host memory."""
    order: tuple[int, ...] = (0,)
    """Codes of rank orders."""
    type_order: tuple[int, ...] = (0,)
    """Codes of which device type holds the first stages."""
    context: tuple[int, ...] = (0,)
    """Codes of how cp groups share attention."""


@dataclass(frozen=True)
class Rows:
    """The rows that obey every rule, and the counts."""

    layouts: LayoutArray
    enumerated: int
    rejected: dict[str, int] = field(default_factory=dict)
    """Rows by the name of the first rule they break."""

    @property
    def by_rule(self) -> int:
        """Rows that some rule excluded."""
        return sum(self.rejected.values())


def declared_space(task: Task, engine: Engine, pins: Mapping[str, Sequence[object]], forbid: Sequence[str]) -> Space:
    """The space for a task: divisors of the device count for the degrees, powers of two for the micro-batch.

    tp stays inside the fastest domain of the network. Pins restrict an axis to values, forbids to its neutral one.
    Raises InputError for an unknown axis or value.
    """
    fast = min(h.network[0].size or h.node_size for h in task.profiles)
    divisors = _divisors(task.gpus)
    layers = task.model.n_layers
    chunks = interleaved_chunks(layers, any(SHORT.get(name, name) == "virtual_stages" for name in pins))
    codes_run = sorted(schedule_codes(engine), key=lambda code: code in (INTERLEAVED, INTERLEAVED_ZB))
    schedules = [(NONE, 1), *((code, v) for code in codes_run for v in _chunk_choices(code, chunks))]
    values: dict[str, tuple[int, ...]] = {
        "tp": tuple(d for d in divisors if d <= fast),
        "cp": tuple(d for d in divisors if d & (d - 1) == 0 and d <= 64) if engine.context_parallel else (1,),
        "pp": tuple(d for d in divisors if d <= layers),
        "dp": (), "ep": _expert_degrees(task, engine),
        "etp": _expert_tensor_degrees(task, engine, fast),
        "micro_batch": tuple(2**i for i in range(MAX_MICRO_BATCH.bit_length())),
        "zero": engine.zero_stages,
    }  # fmt: skip
    modes: tuple[int, ...] = (0, 1, 2)
    sequence: tuple[int, ...] = tuple(sorted({0, *engine.sequence_parallel}))
    named = {
        "offload": (0,) if engine.offload_on_request and "offload" not in pins else tuple(map(OFFLOADS.index, engine.offloads)),
        "order": tuple(map(RANK_ORDERS.index, engine.rank_orders)),
        "type_order": (0, 1) if task.types else (0,),
        "context": tuple(map(CONTEXTS.index, engine.contexts)),
    }
    for flag, axis, wanted in _restrictions(pins, forbid):
        if axis == "schedule":
            codes = _codes(axis, wanted, SCHEDULES)
            schedules = _kept(flag, schedules, [s for s in schedules if s[0] in codes])
        elif axis == "virtual_stages":
            chosen = _integers(axis, wanted)
            schedules = _kept(flag, schedules, [(c, v) for c, v in schedules if v in chosen])
        elif axis == "recompute":
            codes = _codes(axis, wanted, RECOMPUTE_MODES)
            modes = _kept(flag, modes, tuple(m for m in modes if m in codes))
        elif axis in named:
            codes = _codes(axis, wanted, NAMED[axis])
            named[axis] = _kept(flag, named[axis], tuple(c for c in named[axis] if c in codes))
        elif axis == "sequence_parallel":
            sequence = _kept(flag, sequence, tuple(v for v in sequence if v in _flags(axis, wanted)))
        elif axis == "dp":
            chosen = _integers(axis, wanted)
            before = values["dp"] or tuple(divisors)
            values["dp"] = _kept(flag, before, tuple(v for v in before if v in chosen))
        elif axis == "micro_batch":
            values[axis] = _integers(axis, wanted)  # any size may be pinned, powers of two are only the default
        else:
            chosen = _integers(axis, wanted)
            values[axis] = _kept(flag, values[axis], tuple(v for v in values[axis] if v in chosen))
    if 0 not in modes:  # a split backward recomputes nothing (a rule)
        schedules = [s for s in schedules if s[0] not in SPLIT_CODES]
    return Space(
        **values, schedules=tuple(schedules), sequence_parallel=sequence, modes=modes, any_etp="etp" in pins, **named,
    )  # fmt: skip


def _chunk_choices(code: int, chunks: Sequence[int]) -> Sequence[int]:
    """Chunks that a rank may hold under a schedule, of those in the declared range."""
    return chunks if code in (INTERLEAVED, INTERLEAVED_ZB) else [v for v in (2,) if v in chunks] if code in V_CODES else (1,)


def interleaved_chunks(layers: int, pinned: bool) -> list[int]:
    """Chunks a rank of interleaved pipelines: divisors of the layers and powers of two; any number where they are pinned.

    Others leave the last rank's chunks unequal all the same, and take no bottleneck away that these do not.
    """
    every = range(2, min(MAX_CHUNKS, layers) + 1)
    return [v for v in every if pinned or layers % v == 0 or v & (v - 1) == 0]


def _expert_degrees(task: Task, engine: Engine) -> tuple[int, ...]:
    """Divisors of the experts that fit the cluster; 1 for dense models and engines that do not spread experts."""
    experts = math.gcd(*(m.experts for m in task.model.routed_mlps))
    if not (experts and engine.expert_parallel):
        return (1,)
    return tuple(d for d in _divisors(experts) if d <= task.gpus)


def _expert_tensor_degrees(task: Task, engine: Engine, fast: int) -> tuple[int, ...]:
    """Divisors of the experts' width inside the fastest domain; rows take 1 or tp of them (`enumerate_rows`)."""
    width = math.gcd(*(m.width for m in task.model.routed_mlps))
    if not (width and engine.expert_parallel):
        return (1,)
    return tuple(d for d in _divisors(task.gpus) if d <= fast and width % d == 0)


def _divisors(n: int) -> list[int]:
    """All divisors, ascending."""
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return low + [n // d for d in reversed(low) if d * d != n]


C = TypeVar("C", bound=Sequence[object])


def _kept(flag: str, before: C, after: C) -> C:
    """The values that a flag leaves. Raises InputError when it leaves none: no cluster or job could change that."""
    if not after:
        shown = ", ".join(str(v) for v in before[:12])
        raise input_error(
            "PLN123", f"{flag} leaves no choice", f"the values for this task and engine are {shown}", "change the flag"
        )
    return after


def axis_named(name: str, flag: str = "--pin") -> str:
    """The axis called `name` or its short form. Raises InputError for an unknown one."""
    axis, known = SHORT.get(name, name), (*AXES, "schedule", "recompute", "sequence_parallel", *NAMED)
    if axis not in known:
        raise input_error("PLN121", f"{flag} {name}: no such axis", f"axes are {', '.join(known)}", "")
    return axis


def axis_forbidden(name: str) -> str:
    """The axis that forbidding `name` restricts: an axis, a schedule, or a recompute mode."""
    axis = SHORT.get(name, name)
    return "schedule" if axis in SCHEDULES[1:] else "recompute" if axis in RECOMPUTE_MODES[1:] else axis


def with_pins(space: Space, pins: Mapping[str, Sequence[object]], flag: str = "--pin") -> Space:
    """`space` with axes at exactly these values, inside what it declares or not: what a person asks about.

    Raises InputError for an unknown axis, or for a value that is none of its kind.
    """
    changes: dict[str, Any] = {}
    schedules, chunks = None, None
    for name, wanted in pins.items():
        axis = axis_named(name, flag)
        if axis == "schedule":
            schedules = sorted(_codes(axis, wanted, SCHEDULES, flag))
        elif axis == "virtual_stages":
            chunks = _integers(axis, wanted, flag)
        elif axis == "recompute":
            changes["modes"] = tuple(sorted(_codes(axis, wanted, RECOMPUTE_MODES, flag)))
        elif axis in NAMED:
            changes[axis] = tuple(sorted(_codes(axis, wanted, NAMED[axis], flag)))
        elif axis == "sequence_parallel":
            changes[axis] = tuple(sorted(_flags(axis, wanted, flag)))
        else:
            changes[axis] = _integers(axis, wanted, flag)
    if "etp" in changes:
        changes["any_etp"] = True
    if schedules is not None or chunks is not None:
        changes["schedules"] = _pinned_schedules(space, schedules, chunks)
    return replace(space, **changes)


def _pinned_schedules(space: Space, codes: Sequence[int] | None, chunks: Sequence[int] | None) -> tuple[tuple[int, int], ...]:
    """(schedule, virtual stages) of a space under pins of one of them or both."""
    if codes is None:
        own = dict.fromkeys([*(c for c, _ in space.schedules), INTERLEAVED])
        return tuple((c, v) for v in chunks or () for c in own if v in _chunk_choices(c, [w for w in chunks or () if w > 1]))
    if chunks is not None:
        return tuple((c, v) for c in codes for v in chunks)
    declared = tuple(dict.fromkeys(v for _, v in space.schedules if v > 1)) or (2,)
    return tuple((c, v) for c in codes for v in _chunk_choices(c, declared))


def _restrictions(pins: Mapping[str, Sequence[object]], forbid: Sequence[str]) -> list[tuple[str, str, Sequence[object]]]:
    """Pins and forbids as (flag, axis, allowed values)."""
    result: list[tuple[str, str, Sequence[object]]] = []
    for name, wanted in pins.items():
        result.append((f"--pin {name}={','.join(map(str, wanted))}", axis_named(name), wanted))
    neutral: dict[str, Sequence[object]] = {a: [1] for a in AXES} | {"zero": [0], "recompute": ["none"]}
    neutral |= {"sequence_parallel": ["false"], "offload": ["none"], "order": [RANK_ORDERS[0]]}
    neutral |= {"type_order": [TYPE_ORDERS[0]], "context": [CONTEXTS[0]]}
    for name in forbid:
        axis, flag = SHORT.get(name, name), f"--forbid {name}"
        if axis in SCHEDULES and axis != "none":
            result.append((flag, "schedule", [s for s in SCHEDULES if s != axis]))
        elif axis in RECOMPUTE_MODES and axis != "none":
            result.append((flag, "recompute", [m for m in RECOMPUTE_MODES if m != axis]))
        elif axis in neutral:
            result.append((flag, axis, neutral[axis]))
        else:
            choices = ", ".join([*neutral, *SCHEDULES[1:], *RECOMPUTE_MODES[1:]])
            raise input_error("PLN121", f"--forbid {name}: no such axis or choice", f"one of {choices}", "")
    return result


def _integers(axis: str, wanted: Sequence[object], flag: str = "--pin") -> tuple[int, ...]:
    values = []
    for item in wanted:
        text = str(item)
        low = 0 if axis == "zero" else 1
        if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < low:
            raise input_error(
                "PLN122", f"{flag} {axis}={text}: not a whole number >= {low}", "", f"write {flag} {axis}=8 or {axis}=4,8"
            )
        values.append(int(text))
    return tuple(sorted(set(values)))


def _codes(axis: str, wanted: Sequence[object], names: Sequence[str], flag: str = "--pin") -> set[int]:
    unknown = [str(w) for w in wanted if str(w) not in names]
    if unknown:
        raise input_error("PLN122", f"{flag} {axis}={unknown[0]}: not a choice", f"one of {', '.join(names)}", "")
    return {names.index(str(w)) for w in wanted}


def _flags(axis: str, wanted: Sequence[object], flag: str = "--pin") -> set[int]:
    table = {"true": 1, "1": 1, "on": 1, "false": 0, "0": 0, "off": 0}
    unknown = [str(w) for w in wanted if str(w).lower() not in table]
    if unknown:
        raise input_error("PLN122", f"{flag} {axis}={unknown[0]}: not true or false", "", "")
    return {table[str(w).lower()] for w in wanted}


def enumerate_rows(task: Task, engine: Engine, space: Space) -> Rows:
    """All rows of the space that obey the rules, in a fixed order, and how many each rule excluded.

    dp follows from the others, so the grid has no dp axis: rows whose degrees do not divide the device count, or whose
    dp is not among the allowed ones, break the rule `world = tp cp pp dp`.
    """
    pipeline, row = _inner_axes(space)
    degrees, schedules, inner = _degrees(space), len(space.schedules), len(row["zero"])
    enumerated = inner * schedules * len(degrees)
    dp, whole = _what_is_left(task, degrees)
    allowed = whole & np.isin(dp, space.dp) if space.dp else whole
    rejected: dict[str, int] = {}
    if lost := int(np.count_nonzero(~allowed)) * inner * schedules:
        rejected["world = tp cp pp dp"] = lost
    # Rules are asked before the grid grows by the axes that they do not look at; what they exclude counts for all of it.
    layouts = _first(degrees[allowed], dp[allowed])
    steps: list[tuple[str, dict[str, Sequence[int]], int]] = [
        ("degrees", {}, schedules * inner), ("pipeline", pipeline, inner), ("row", row, 1),
    ]  # fmt: skip
    for on, axes, weight in steps:
        layouts = _grown(task, layouts, axes)
        for rule in [r for r in engine.all_rules if r.on == on] if len(layouts) else []:
            stopping.check()
            layouts, lost = _apply(task, rule, layouts)
            if lost:
                rejected[rule.name] = rejected.get(rule.name, 0) + lost * weight
    # Rows that are priced and bounded together follow each other: a group of them is a view.
    groups = same_pipeline(layouts, np.arange(len(layouts)), task.model)
    return Rows(layouts.take(np.concatenate(groups)) if groups else layouts, enumerated, rejected)


def unruled_rows(task: Task, space: Space) -> LayoutArray:
    """The rows of the grid whether they obey the rules or not; dp is what the devices leave, or each allowed one."""
    degrees = _degrees(space)
    dp = np.maximum(_what_is_left(task, degrees)[0], 1)
    if space.dp:
        degrees, dp = degrees.repeat(len(space.dp), axis=0), np.tile(space.dp, len(degrees))
    layouts = _first(degrees, dp)
    for axes in _inner_axes(space):
        layouts = _grown(task, layouts, axes)
    return layouts


def _degrees(space: Space) -> Ints:
    """(tp, cp, pp, ep, etp, order, context) combinations, shape (combinations, 7), in the order of a product."""
    axes = np.meshgrid(*(space.tp, space.cp, space.pp, space.ep, space.etp, space.order, space.context), indexing="ij")
    every = np.stack(axes, axis=-1).astype(np.int64).reshape(-1, len(axes))
    return every if space.any_etp else every[(every[:, 4] == 1) | (every[:, 4] == every[:, 0])]


def _what_is_left(task: Task, degrees: Ints) -> tuple[Ints, Bools]:
    """(dp that the devices leave for (tp, cp, pp, ...), rounded down, whether it is whole); no product can overflow."""
    dp = task.gpus // degrees[:, 0] // degrees[:, 1] // degrees[:, 2]
    return dp, (dp > 0) & (degrees[:, :3].prod(axis=1) * dp == task.gpus)


def _inner_axes(space: Space) -> tuple[dict[str, Sequence[int]], dict[str, Sequence[int]]]:
    """What the grid grows by beyond the degrees: (schedule, virtual stages), then the other choices of a row."""
    rest = ("micro_batch", "zero", "sequence_parallel", "offload", "type_order")
    inner = list(itertools.product(*(getattr(space, name) for name in rest)))
    schedules, chunks = ([pair[k] for pair in space.schedules] for k in (0, 1))
    pipeline: dict[str, Sequence[int]] = {"schedule": schedules, "virtual_stages": chunks}
    return pipeline, {n: [i[k] for i in inner] for k, n in enumerate(rest)}


def _first(degrees: Ints, dp: Ints) -> LayoutArray:
    """The placed degrees, with neutral values on the other axes."""
    tp, cp, pp, ep, etp, order, context = degrees.T.copy()
    one, zero = np.ones_like(dp), np.zeros_like(dp)
    return LayoutArray(tp, cp, pp, dp, ep, etp, zero, one, zero, one, zero, one, zero, order, context=context)


def _grown(task: Task, layouts: LayoutArray, axes: dict[str, Sequence[int]]) -> LayoutArray:
    """Every layout with every choice on some axes, which are chosen together."""
    if not axes:
        return layouts
    choices = {name: np.array(values, dtype=np.int64) for name, values in axes.items()}
    many = len(next(iter(choices.values())))
    grown = layouts.take(np.repeat(np.arange(len(layouts)), many))
    grown = replace(grown, **{name: np.tile(values, len(layouts)) for name, values in choices.items()})
    return replace(grown, microbatches=np.maximum(task.job.global_batch // (grown.dp * grown.micro_batch), 1))


def _apply(task: Task, rule: Rule, layouts: LayoutArray) -> tuple[LayoutArray, int]:
    bad = rule.violated(task, layouts)
    lost = int(np.count_nonzero(bad))
    return (layouts.take(~bad) if lost else layouts), lost
