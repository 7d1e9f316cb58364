"""What low-rank adapters add to a layer on one rank, and what their frozen base costs: parameters, bytes, products, kernels.

A column-parallel matrix has a whole A and a B split like its outputs; a row-parallel one an A split like its inputs and a
whole B. So A's output is rank wide on every rank, and the layer's tensor-parallel collectives stay as they are.
LoRA: arXiv 2106.09685; QLoRA: arXiv 2305.14314.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np

from planner.cost.accounting import Saved
from planner.cost.compute import streaming_seconds
from planner.cost.task import Floats, LayoutArray, Task
from planner.specs.projections import Projection, adapted, projections

LAUNCHES = (4.0, 7.0)
"""Kernels of one adapter, forward (A, B, scale, sum) and backward (four products, scale, two sums): counted."""


class Degrees(Protocol):
    """Degrees that split a layer's matrices, arrays of equal length."""

    @property
    def tp(self) -> Any: ...
    @property
    def ep(self) -> Any: ...
    @property
    def etp(self) -> Any: ...


class Rows(Degrees, Protocol):
    """Rows of a micro-batch that one rank processes, besides."""

    @property
    def tokens(self) -> Floats: ...
    @property
    def split(self) -> Floats: ...
    @property
    def routed(self) -> Floats: ...


class Local(NamedTuple):
    """One matrix as one rank holds it, float64 arrays."""

    inputs: Floats
    outputs: Floats
    many: Floats
    """Of routed experts: those of the rank."""


def local(p: Projection, x: Degrees) -> Local:
    """The part of a matrix that one rank holds."""
    degree = x.etp if p.target == "experts" else x.tp
    inputs, outputs = np.full(len(degree), float(p.inputs)), np.full(len(degree), float(p.outputs))
    if p.split == "column":
        outputs = outputs / degree
    if p.split == "row":
        inputs = inputs / degree
    return Local(inputs, outputs, p.experts / x.ep if p.experts > 1 else np.ones(len(degree)))


def _adapted(task: Task) -> list[Projection]:
    """The adapted matrices of the task's one kind of layers; none without an adapter."""
    adapter = task.job.adapter
    return [] if adapter is None else adapted(task.model, task.model.layer, adapter)


# ---- parameters and bytes of one layer ---------------------------------------------------------------------------------


def adapter_params(task: Task, x: Degrees) -> dict[str, Floats]:
    """Parameters of one layer's adapters on a rank: `layer` (without routed experts), its `experts`, and one `expert`."""
    found = {name: np.zeros(len(x.tp)) for name in ("layer", "experts", "expert")}
    rank = task.job.adapter.rank if task.job.adapter else 0
    for p in _adapted(task):
        here = local(p, x)
        one = rank * (here.inputs + here.outputs)
        if p.target == "experts":
            found["experts"], found["expert"] = found["experts"] + here.many * one, found["expert"] + one
        else:
            found["layer"] = found["layer"] + one
    return found


def matrices(task: Task, x: Degrees, experts: bool) -> tuple[Floats, Floats]:
    """(weights, bytes as stored) of one layer's matrices on a rank: of its routed experts, or of all else."""
    weights, stored = np.zeros(len(x.tp)), np.zeros(len(x.tp))
    adapter = task.job.adapter
    for p in projections(task.model, task.model.layer):
        if adapter is not None and (p.target == "experts") == experts:
            here = local(p, x)
            weights = weights + here.many * here.inputs * here.outputs
            scales = adapter.output_bytes * here.many * here.outputs
            stored = stored + adapter.weight_bytes(task.job.compute_bytes) * here.many * here.inputs * here.outputs + scales
    return weights, stored


def dequantised(task: Task) -> bool:
    """Whether products read a copy of the base in the compute type: not where it has it, and not where they run in fp8."""
    adapter = task.job.adapter
    return adapter is not None and adapter.base not in ("same", task.job.linears)


def dequantised_bytes(task: Task, x: Degrees) -> Floats:
    """Bytes of the largest dequantised matrix: one at a time exists, while its product runs; a layer's experts are one."""
    if not dequantised(task):
        return np.zeros(len(x.tp))
    sizes = [local(p, x) for p in projections(task.model, task.model.layer)]
    return np.max([task.job.compute_bytes * here.many * here.inputs * here.outputs for here in sizes], axis=0)


# ---- saved activations -------------------------------------------------------------------------------------------------


def kept_rows(task: Task, item: Saved) -> float:
    """Rows of a saved tensor that stay: the input of a frozen matrix without an adapter is needed by no gradient."""
    adapter = task.job.adapter
    if adapter is None:
        return item.count
    if task.model.layer.norms == "shared" and any(target in adapter.targets for target, _ in item.feeds):
        return item.count  # attention and MLP read one tensor
    return item.count - sum(rows for target, rows in item.feeds if target not in adapter.targets)


def saved_bytes(task: Task, mode: str, combos: LayoutArray, routed: Floats | float) -> Floats:
    """Bytes of A's outputs that one layer keeps for a token under a recompute mode; they are repeated with the products.

    `routed`: rows of its experts for a token.
    """
    sequence = np.where(combos.sequence_parallel == 1, combos.tp.astype(float), 1.0)
    kept = 1.0 - task.accounting.recomputed.get(mode, {}).get("gemm", 0.0)
    total = np.zeros(len(combos))
    for p in _adapted(task):
        if p.target == "experts":
            total = total + routed * combos.etp / sequence
        else:
            total = total + (1.0 if p.split == "column" else 1.0 / sequence)
    return total * kept * (task.job.adapter.rank if task.job.adapter else 0) * task.job.compute_bytes


# ---- time ----------------------------------------------------------------------------------------------------------------


class Thin(NamedTuple):
    """One of the two thin products of an adapter: C[m, n] = A[m, k] B[k, n]."""

    part: str
    name: str
    m: Floats
    n: Floats
    k: Floats
    groups: Floats


def thin_products(task: Task, s: Rows) -> list[Thin]:
    """A and B of every adapter of one layer, forward."""
    found = []
    rank = np.full(len(s.tp), float(task.job.adapter.rank if task.job.adapter else 0))
    for p in _adapted(task):
        here, (into, out) = local(p, s), _rows(p, s)
        part = "experts" if p.target == "experts" else "gemm"
        found.append(Thin(part, f"{p.name}, adapter A", into / here.many, rank, here.inputs, here.many))
        found.append(Thin(part, f"{p.name}, adapter B", out / here.many, here.outputs, rank, here.many))
    return found


def _rows(p: Projection, s: Rows) -> tuple[Floats, Floats]:
    """Rows that A and B process on a rank: B of a row-parallel matrix follows the reduction, after which rows are split."""
    if p.target == "experts":
        return s.routed, s.routed
    own = s.tokens / s.split
    return (own if p.split == "whole" else s.tokens), (s.tokens if p.split == "column" else own)


def added_bytes(task: Task, s: Rows, direction: int) -> Floats:
    """Bytes moved to add B's output to the base's forward (0), and A's input gradient to the base's backward (1): two
    tensors read, one written."""
    total = np.zeros(len(s.tp))
    for p in _adapted(task):
        here, rows = local(p, s), _rows(p, s)
        total = total + 3.0 * (rows[1] * here.outputs if direction == 0 else rows[0] * here.inputs)
    return total * task.job.compute_bytes


def dequantise_seconds(task: Task, s: Degrees, experts: bool) -> Floats:
    """Time of dequantising one layer's matrices for one pass: stored bytes read, bytes of the compute type written."""
    if not dequantised(task):
        return np.zeros(len(s.tp))
    weights, stored = matrices(task, s, experts)
    moved = stored + task.job.compute_bytes * weights
    return task.constant("elementwise") * streaming_seconds(moved, task.hardware.device)


def launches(task: Task, direction: int) -> float:
    """Kernels of one layer's adapters and dequantisation, forward (0) or backward (1)."""
    base = len(projections(task.model, task.model.layer)) if dequantised(task) else 0
    return LAUNCHES[direction] * len(_adapted(task)) + base
