"""`planner run --dry-run`: build and step the real job as one rank of a fake process group, on fake tensors.

What comes out is what the runtime would do: peak allocated bytes by what they are for, the cause of the peak, and every
collective with its count and bytes. A few hundred MB of memory suffice for a model and a cluster of any size. Long steps
are shortened: past a number of micro-batches that fills the pipeline, bytes and calls grow by equal amounts with each
further round, so two short runs give the long one exactly (tests compare both).
"""

from __future__ import annotations

import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from planner.planfile import Plan
from planner.runtime import adamw, copies, head, masters, model, norms, scatter
from planner.runtime.fakerank import SMALL, Collective, FakeMeter, FusedRmsNorm, Origin, fake_group, fake_tensors
from planner.runtime.meter import rounded, storages
from planner.runtime.model import Decoder
from planner.runtime.train import Trainer
from planner.specs.layout import Layout
from planner.specs.training import Options
from planner.units import GIB

STATES = ("parameters", "optimizer states", "gradients", "gathered parameters")
"""Categories whose bytes do not depend on the batch."""

_OF_THE_HEAD = ("mm", "_to_copy", "_log_softmax", "_log_softmax_backward_data", "nll_loss_backward", "div", "mul", "sub", "exp")
"""Operations that make logits, their copies and gradients."""


@dataclass(frozen=True)
class Calls:
    """One kind of collective of a rank's step."""

    rank: int
    group: str
    op: str
    ranks: int
    count: int
    bytes_per_call: int
    small: bool
    """Of scalars, of figures of each token, or of gradients of what every tensor parallel rank holds whole (`_is_small`)."""


@dataclass
class RankReport:
    """What one rank does in a step."""

    rank: int
    stage: int
    stands_for: int
    """Ranks of this stage: they hold at most as much."""
    peak_allocated_gib: float
    categories_gib: dict[str, float]
    """At the peak; they add up to it."""
    cause: str
    collectives: list[Calls] = field(default_factory=list)
    microbatches_run: int = 0
    """Micro-batches that were stepped through; the rest is extrapolated."""


class _FakeBatches:
    """Token ids of the right shape."""

    def __init__(self, shape: tuple[int, int]):
        self.shape = shape

    def get(self, step: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(self.shape, dtype=torch.int64), torch.zeros(self.shape, dtype=torch.int64)

    def prepare(self, step: int) -> None:
        """Nothing to read."""


class _FakeTrainer(Trainer):
    """The real trainer; parts are parallelised on the meta device as ever, then given fake memory and no values."""

    def __init__(self, plan: Plan, meter: FakeMeter, mode: Any):
        self._allocation = (mode, meter)
        self.reduction: _FakeReduction | None = None
        super().__init__(plan, torch.device("cpu"), Options())
        rows = plan.job.global_batch // plan.layout.dp
        self.batches = _FakeBatches((rows, plan.job.seq_len // plan.layout.cp))  # type: ignore[assignment]

    def allocate(self, part: Decoder) -> None:
        mode, meter = self._allocation
        with mode, meter, patch.object(model, "fill", lambda *_: None):
            super().allocate(part)
            if by_engines(self.plan):
                shard, job = self.layout.sharded, self.plan.job
                room = (shard - 1, scatter.largest_part(part.blocks(), shard))
                self.reduction = _FakeReduction(copies.gradient_type(self.layout, job), room)
                scatter.use(part, self.reduction)

    def update(self, step: int) -> tuple[Tensor, float]:
        meter = self._allocation[1]
        meter.optimizing = True
        try:
            return super().update(step)
        finally:
            meter.optimizing = False


class _FakeReduction(scatter.Reduction):
    """What copy engines add gradients up with: the memory for those of other ranks, and the call."""

    def __init__(self, dtype: torch.dtype, room: tuple[int, int]):
        super().__init__(dtype)
        self.received = torch.empty(room, dtype=dtype)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        part = output_tensor.view(input_tensor.dtype)[: output_tensor.numel()]  # c10d wants one type
        return dist.reduce_scatter_tensor(part, input_tensor, op, group, async_op)


def by_engines(plan: Plan) -> bool:
    """Whether copy engines add up gradients on the plan's machine."""
    machine = plan.hardware
    return machine.device.kind == "cuda" and plan.layout.world_size <= machine.node_size and copies.shares(plan.layout)


def _fused_loss(function: Callable[..., Any], _compiled: bool) -> Callable[..., Any]:
    """The loss's kernels as they are compiled: what they allocate, and no more."""
    if function is head.statistics:
        return lambda logits, *_: tuple(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(3))
    return lambda *_: None


@dataclass(frozen=True)
class _Measured:
    peak: int
    categories: Counter[str]
    operation: str
    phase: str
    calls: Counter[Collective]


def dry_run(plan: Plan, ranks: Sequence[int], exact: bool = False, workers: int | None = None) -> list[RankReport]:
    """Step each of `ranks`. `exact` steps through every micro-batch, however many.

    Each run has a process of its own (`workers` at once, 0.4 GiB each; default the machine's cores): torch keeps the
    process groups of an earlier run in its caches.
    """
    m = plan.layout.microbatches(plan.job)
    short, more = _short_steps(plan)
    counts = (m,) if exact or m <= more else (short, more)
    tasks = [(_with(plan, n), rank) for rank in ranks for n in counts]
    workers = min(workers or os.cpu_count() or 1, len(tasks))
    with ProcessPoolExecutor(workers, get_context("spawn"), max_tasks_per_child=1) as pool:
        runs = list(pool.map(_measure, *zip(*tasks, strict=True)))
    reports = []
    for i, rank in enumerate(ranks):
        found = runs[i * len(counts) : (i + 1) * len(counts)]
        whole = found[0] if len(counts) == 1 else _extrapolated(found[0], found[1], counts, m)
        reports.append(_report(plan, rank, whole, counts[-1]))
    return reports


def _report(plan: Plan, rank: int, found: _Measured, run: int) -> RankReport:
    return RankReport(
        rank=rank,
        stage=_stage_of(plan, rank),
        stands_for=plan.layout.world_size // plan.layout.pp,
        peak_allocated_gib=found.peak / GIB,
        categories_gib={name: n / GIB for name, n in found.categories.most_common()},
        cause=_cause(found),
        collectives=[
            Calls(rank, c.group, c.op, c.ranks, count, c.n_bytes, _is_small(c))
            for c, count in sorted(found.calls.items(), key=lambda item: (item[0].group, item[0].op, -item[0].n_bytes))
        ],
        microbatches_run=run,
    )


def _is_small(call: Collective) -> bool:
    """Whether a call is none of those that the planner prices: by its size, or as an all-reduce over tp. Hidden states, split
    over the sequence, are never reduced so: it is the loss's figures of each token, or the gradients of all norms."""
    return call.n_bytes <= SMALL or (call.group, call.op) == ("tp", "all_reduce")


def ranks_of(plan: Plan, which: str) -> list[int]:
    """Ranks that `--rank` names: a number, `peak` (the stage of the predicted peak), or `all` (one of each stage).

    The first rank of a stage holds the largest shards: sizes that do not divide leave the remainder to the last.
    Raises ValueError for anything else.
    """
    firsts = [_first_rank(plan, stage) for stage in range(plan.layout.pp)]
    if which == "all":
        return firsts
    if which == "peak":
        return [firsts[plan.estimate.memory.peak_stage]]
    rank = int(which)
    if not 0 <= rank < plan.layout.world_size:
        raise ValueError(f"rank {rank} is not one of {plan.layout.world_size}")
    return [rank]


def _stage_of(plan: Plan, rank: int) -> int:
    return rank // (plan.layout.world_size // plan.layout.pp)  # pp is the outermost dimension of the runtime's mesh


def _first_rank(plan: Plan, stage: int) -> int:
    return stage * (plan.layout.world_size // plan.layout.pp)


def _short_steps(plan: Plan) -> tuple[int, int]:
    """Two numbers of micro-batches that fill the pipeline, one round apart."""
    pp, v = plan.layout.pp, plan.layout.virtual_stages
    if pp == 1:
        return 3, 4
    rounds = 2 * v + 2
    return pp * rounds, pp * (rounds + 1)


def _with(plan: Plan, microbatches: int) -> Plan:
    layout = plan.layout
    job = plan.job.model_copy(update={"global_batch": microbatches * layout.micro_batch * layout.dp})
    return plan.model_copy(update={"job": job})


def _extrapolated(a: _Measured, b: _Measured, counts: tuple[int, ...], m: int) -> _Measured:
    """The step of m micro-batches from those of fewer."""
    short, more = counts

    def at(x: int, y: int) -> int:
        return round(x + (y - x) * (m - short) / (more - short))

    def every(x: Counter[Any], y: Counter[Any]) -> Counter[Any]:
        return Counter({k: at(x[k], y[k]) for k in {**x, **y}})

    return _Measured(at(a.peak, b.peak), every(a.categories, b.categories), b.operation, b.phase, every(a.calls, b.calls))


def _measure(plan: Plan, rank: int) -> _Measured:
    """Peak and calls of the second step, in which all lasting state exists; the third tells what the bytes were for."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # advice about the norm's two reductions
        stack.enter_context(fake_group(rank, plan.layout.world_size))
        stack.enter_context(patch.object(norms, "_RmsNormCpu", FusedRmsNorm))
        stack.enter_context(patch.object(adamw, "update", lambda *_: None))  # one kernel on CUDA: it allocates nothing
        stack.enter_context(patch.object(head, "_kernel", _fused_loss))
        stack.enter_context(patch.object(head, "add_product", lambda *_: None))
        mode, meter = fake_tensors(), FakeMeter(lambda group, op: _axis(plan, group, op))
        trainer = _FakeTrainer(plan, meter, mode)
        stack.enter_context(mode)
        stack.enter_context(meter)
        trainer.train_step(0)
        meter.start()
        trainer.train_step(1)
        peak, tick, calls = meter.peak, meter.peak_tick, meter.calls
        snapshot = _Snapshot(trainer, meter)
        meter.start(tick, snapshot.take)
        trainer.train_step(2)
        if sum(snapshot.categories.values()) != peak:
            raise RuntimeError("two steps of a dry run differ: its peak cannot be told apart by use")
        del trainer
    return _Measured(peak, snapshot.categories, snapshot.operation, snapshot.phase, calls)


class _Snapshot:
    """What live storages are for, at one moment."""

    def __init__(self, trainer: _FakeTrainer, meter: FakeMeter):
        self.trainer, self.meter = trainer, meter
        self.categories: Counter[str] = Counter()
        self.phase = self.operation = ""

    def take(self) -> None:
        known = {id(s): name for name, tensor in self._states() if tensor is not None for s in storages(tensor)}
        self.phase, self.operation = self.meter.doing.phase, self.meter.doing.operation
        logits = self._logit_sizes()
        for key, size, origin in self.meter.living():
            self.categories[known.get(key) or self._use(key, size, origin, logits)] += size

    def _logit_sizes(self) -> set[int]:
        """Bytes of one micro-batch's logits in 2 and 4 bytes, over the split vocabulary and the whole; none without a head."""
        if all(part.head is None for part in self.trainer.parts.values()):
            return set()
        plan, layout = self.trainer.plan, self.trainer.layout
        values = layout.micro_batch * plan.job.seq_len // layout.cp
        return {rounded(values * width * n) for width in (plan.model.vocab, -(-plan.model.vocab // layout.tp)) for n in (2, 4)}

    def _use(self, key: int, size: int, origin: Origin, logit_sizes: set[int]) -> str:
        if size in logit_sizes and origin.operation in _OF_THE_HEAD:
            return "logits and loss"
        if key in self.meter.sent:
            return "communication buffers"
        return {"forward": "activations", "backward": "backward temporaries", "optimizer": "optimizer temporaries"}[
            origin.phase
        ]

    def _states(self) -> Iterator[tuple[str, Tensor | None]]:
        for _, param in self.trainer.named_parameters():
            yield "parameters", param
            yield "parameters", masters.values(param)
            yield "gradients", masters.gradient(param)
        for state in self.trainer.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    yield "optimizer states", value
        if self.trainer.reduction is not None:
            yield "communication buffers", self.trainer.reduction.received
        for part in self.trainer.parts.values():
            for module in part.modules():
                if isinstance(module, FSDPModule):
                    yield from _gathered(module)


def _gathered(module: FSDPModule) -> Iterator[tuple[str, Tensor | None]]:
    """FSDP2's own tensors of a unit. Its attributes are private, and the same in torch 2.11 and 2.13."""
    group = module._get_fsdp_state()._fsdp_param_group
    for param in () if group is None else group.fsdp_params:
        yield "parameters", getattr(param, "_sharded_param_data", None)
        yield "parameters", param.sharded_param
        yield "gradients", param.sharded_param.grad
        yield "gradients", param.unsharded_accumulated_grad
        for gathered in param.all_gather_outputs:
            yield "gathered parameters", gathered
        whole = getattr(param, "_unsharded_param", None)
        if whole is not None:
            yield "gathered parameters", whole
            yield "gradients", whole.grad


_EXPERT_GROUPS = {"mesh_ep": "ep", "mesh_etp": "etp", "mesh_efsdp": "expert dp"}
"""Descriptions that torch's device mesh gives its groups."""


def _axis(plan: Plan, group: dist.ProcessGroup, op: str) -> str:
    """Axes along which the ranks of a group differ, in the planner's words."""
    layout = plan.layout
    if group.group_desc in _EXPERT_GROUPS:
        return _EXPERT_GROUPS[group.group_desc]
    if group.size() == layout.world_size and (name := _of_all(layout, op)):  # torch's mesh reuses the group of all ranks
        return name
    members = dist.get_process_group_ranks(group)
    sizes = {"tp": layout.tp, "cp": layout.cp, "dp": layout.dp, "pp": layout.pp}
    stride, names = 1, []
    for name, size in sizes.items():
        if len({rank // stride % size for rank in members}) > 1:
            names.append(name)
        stride *= size
    if names == ["cp"] and op in ("all_to_all", "send"):  # without dp these ranks are also those that share states
        return "cp"
    if names and set(names) <= {"dp", "cp"} and len(members) == layout.dp * layout.cp:
        return "dp x cp"
    return " x ".join(reversed(names))


def _of_all(layout: Layout, op: str) -> str | None:
    """What an exchange of experts over all ranks is called."""
    if op == "all_to_all" and layout.cp < layout.world_size:
        return "ep" if layout.ep == layout.world_size else "etp" if layout.etp == layout.world_size else None
    apart = layout.tp > 1 and layout.ep * layout.etp == 1 and layout.dp * layout.cp > 1
    return "expert dp" if apart and op != "all_to_all" else None


def _cause(found: _Measured) -> str:
    """The moment of the peak and the largest thing that is not state."""
    moment = {"forward": "forward", "backward": "backward", "optimizer": "the optimizer's step"}[found.phase]
    name, n = next(((k, n) for k, n in found.categories.most_common() if k not in STATES), ("nothing else", 0))
    return f"{moment}, in {found.operation}: {name} {n / GIB:.2f} GiB beside states"


def to_json(plan: Plan, reports: list[RankReport]) -> dict[str, Any]:
    """What `planner run --dry-run --format json` prints."""
    predicted = {s.stage: s.allocated for s in plan.estimate.memory.stages}
    ranks = []
    for report in reports:
        row = asdict(report)
        del row["collectives"]
        ranks.append(row | {"predicted_gib": predicted.get(report.stage)})
    return {
        "plan": plan.digest,
        "peak_allocated_gib": max(r.peak_allocated_gib for r in reports),
        "predicted_peak_allocated_gib": plan.estimate.memory.peak_allocated_gib,
        "microbatches": plan.layout.microbatches(plan.job),
        "ranks": ranks,
        "collectives": [asdict(c) for r in reports for c in r.collectives],
        "torch_version": torch.__version__,
    }
