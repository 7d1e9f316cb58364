"""The declared space again: which values the README's rules give each axis, every outer row, and the rules one by one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from planner.cost.task import INTERLEAVED, INTERLEAVED_ZB, V_CODES, LayoutArray, Task
from planner.engines.base import Engine, schedule_codes
from planner.planfile import Declared, Inputs
from planner.specs.layout import CONTEXTS, OFFLOADS, RANK_ORDERS, RECOMPUTE_MODES, SCHEDULES, SPLIT_BACKWARD, TYPE_ORDERS

_SHORT = {"mbs": "micro_batch", "sp": "sequence_parallel", "vpp": "virtual_stages", "v": "virtual_stages"}
_WORLD = "world = tp cp pp dp"
_COLUMNS = (
    "tp", "cp", "pp", "ep", "etp", "micro_batch", "zero", "sequence_parallel", "offload", "order", "type_order", "context",
)  # fmt: skip


# ---- axes ----------------------------------------------------------------------------------------------------------


def documented_axes(task: Task, engine: Engine, inputs: Inputs) -> Declared:
    """The space that the README declares for a task, with the plan's pins and forbids applied."""
    fast = min(h.network[0].size or h.node_size for h in task.profiles)
    n, experts = task.model.n_layers, [m.experts for m in task.model.routed_mlps]
    degrees = [d for d in range(1, task.gpus + 1) if task.gpus % d == 0]
    spread = bool(experts) and engine.expert_parallel
    width = math.gcd(*(m.width for m in task.model.routed_mlps))
    codes = schedule_codes(engine)
    schedules = {"none": [1]} | {SCHEDULES[c]: [1] for c in codes}
    every = "virtual_stages" in {_SHORT.get(name, name) for name in inputs.pins}
    for c in codes:
        if c in (INTERLEAVED, INTERLEAVED_ZB):
            chunks = [v for v in range(2, min(16, n) + 1) if every or n % v == 0 or v in (2, 4, 8, 16)]
            schedules[SCHEDULES[c]] = chunks
        elif c in V_CODES:
            schedules[SCHEDULES[c]] = [2] if n >= 2 else []
    declared = Declared(
        tp=[d for d in degrees if d <= fast],
        cp=[d for d in degrees if d in (1, 2, 4, 8, 16, 32, 64)] if engine.context_parallel else [1],
        pp=[d for d in degrees if d <= n],
        dp=[],
        ep=[d for d in range(1, task.gpus + 1) if math.gcd(*experts) % d == 0] if spread else [1],
        etp=[d for d in degrees if d <= fast and width % d == 0] if spread and width else [1],
        any_etp="etp" in inputs.pins,
        micro_batch=[1, 2, 4, 8, 16],
        zero=list(engine.zero_stages),
        schedules={name: chunks for name, chunks in schedules.items() if chunks},
        sequence_parallel=[bool(v) for v in sorted({0, *engine.sequence_parallel})],
        recompute=list(RECOMPUTE_MODES),
        offload=["none"] if engine.offload_on_request and "offload" not in inputs.pins else list(engine.offloads),
        order=list(engine.rank_orders),
        type_order=list(TYPE_ORDERS if task.types else TYPE_ORDERS[:1]),
        context=list(engine.contexts),
    )
    for axis, wanted, pinned in _limits(inputs):
        declared = declared.model_copy(update=_limited(declared, axis, wanted, pinned, degrees))
    if "none" not in declared.recompute:  # nothing is recomputed under a split backward
        left = {s: chunks for s, chunks in declared.schedules.items() if s not in SPLIT_BACKWARD}
        declared = declared.model_copy(update={"schedules": left})
    return declared


def _limits(inputs: Inputs) -> Iterable[tuple[str, list[str], bool]]:
    """(axis, allowed values as text, whether it was pinned): pins, then forbids, which leave an axis its neutral value."""
    for name, values in inputs.pins.items():
        yield _SHORT.get(name, name), [str(v).lower() for v in values], True
    for name in inputs.forbidden:
        axis = _SHORT.get(name, name)
        if axis in SCHEDULES[1:]:
            yield "schedule", [s for s in SCHEDULES if s != axis], False
        elif axis in RECOMPUTE_MODES[1:]:
            yield "recompute", [m for m in RECOMPUTE_MODES if m != axis], False
        else:
            others = {"offload": "none", "order": RANK_ORDERS[0], "type_order": TYPE_ORDERS[0], "context": CONTEXTS[0]}
            neutral = ({"recompute": "none", "sequence_parallel": "false", "zero": "0"} | others).get(axis, "1")
            yield axis, [neutral], False


def _limited(d: Declared, axis: str, wanted: Sequence[str], pinned: bool, degrees: list[int]) -> dict[str, object]:
    """What one limit makes of the space."""
    if axis == "schedule":
        return {"schedules": {s: chunks for s, chunks in d.schedules.items() if s in wanted}}
    if axis == "virtual_stages":
        left = {s: [v for v in chunks if v in {int(w) for w in wanted}] for s, chunks in d.schedules.items()}
        return {"schedules": {s: chunks for s, chunks in left.items() if chunks}}
    if axis in ("recompute", "offload", "order", "type_order", "context"):
        return {axis: [m for m in getattr(d, axis) if m in wanted]}
    if axis == "sequence_parallel":
        flags = {w in ("true", "1", "on") for w in wanted}
        return {axis: [v for v in d.sequence_parallel if v in flags]}
    numbers = sorted({int(w) for w in wanted})
    if axis == "micro_batch":
        return {axis: numbers}  # any size may be pinned, and a forbid leaves 1
    before = getattr(d, axis) or degrees
    return {axis: [v for v in before if v in numbers]}


# ---- rows ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Enumeration:
    """Every outer row of a declared space, settled by the rules."""

    layouts: LayoutArray
    """Those that obey every rule."""
    enumerated: int
    rejected: dict[str, int]
    """Rows by the name of the first rule that they break."""


def enumerate_space(task: Task, engine: Engine, d: Declared) -> Enumeration:
    """Combine all values of all axes and apply the engine's rules one after the other, each to what the last ones left."""
    kept, rejected, enumerated = [], dict[str, int](), 0
    for tp in d.tp:
        every = _combined(task, d, tp)
        enumerated += len(every)
        placed = every.tp * every.cp * every.pp * every.dp == task.gpus
        if d.dp:
            placed &= np.isin(every.dp, d.dp)
        if lost := int(np.count_nonzero(~placed)):
            rejected[_WORLD] = rejected.get(_WORLD, 0) + lost
        rows = every.take(placed)
        for rule in engine.all_rules:
            if not len(rows):
                break
            broken = rule.violated(task, rows)
            if lost := int(np.count_nonzero(broken)):
                rejected[rule.name] = rejected.get(rule.name, 0) + lost
                rows = rows.take(~broken)
        kept.append(rows)
    joined = {f.name: np.concatenate([getattr(rows, f.name) for rows in kept]) for f in fields(LayoutArray)}
    return Enumeration(LayoutArray(**joined), enumerated, rejected)


def _combined(task: Task, d: Declared, tp: int) -> LayoutArray:
    """All rows with one tp."""
    pairs = [(SCHEDULES.index(name), v) for name, chunks in d.schedules.items() for v in chunks]
    etp = d.etp if d.any_etp else [v for v in d.etp if v in (1, tp)]
    axes: list[Sequence[int]] = [
        [tp], d.cp, d.pp, d.ep, etp, d.micro_batch, d.zero, [int(v) for v in d.sequence_parallel],
        [OFFLOADS.index(v) for v in d.offload], [RANK_ORDERS.index(v) for v in d.order],
        [TYPE_ORDERS.index(v) for v in d.type_order], [CONTEXTS.index(v) for v in d.context], range(len(pairs)),
    ]  # fmt: skip
    grid = np.meshgrid(*(np.array(axis, dtype=np.int64) for axis in axes), indexing="ij")
    columns = dict(zip((*_COLUMNS, "pair"), (g.ravel() for g in grid), strict=True))
    pair = columns.pop("pair")
    schedule, chunks = (np.array([each[i] for each in pairs], dtype=np.int64)[pair] for i in range(2))
    dp = task.gpus // (columns["tp"] * columns["cp"] * columns["pp"])
    each = np.maximum(dp * columns["micro_batch"], 1)
    m = np.maximum(task.job.global_batch // each, 1)
    return LayoutArray(**columns, dp=dp, schedule=schedule, virtual_stages=chunks, microbatches=m)
