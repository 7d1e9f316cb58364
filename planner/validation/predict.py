"""Predict every usable row of a table of runs, in batches that share model, job, cluster and engine."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from planner.cost import intervals, risk, states, step
from planner.cost.blending import Stack
from planner.cost.primitives import Primitives, PrimitiveTable, TimeParts, primitive_table
from planner.cost.task import Floats, Ints, LayoutArray, StageArray, Task
from planner.engines.registry import accounting_named
from planner.errors import InputError
from planner.specs import files
from planner.specs.calibration import without_recipe
from planner.specs.hardware import HardwareProfile
from planner.units import GIB
from planner.validation.measured import hardware_of
from planner.validation.prediction import MemoryKind, Outcome, Predicted, Prediction
from planner.validation.profilemap import ProfileMap, StalledRule, load_map
from planner.validation.rows import Row, Run, Unusable, positive, read_table, run_of
from planner.validation.stalled import Measured, stalled, why


@dataclass(frozen=True)
class Entry:
    """One usable row before its prediction."""

    line: int
    row: Row
    run: Run
    profile: str
    engine: str
    outcome: Outcome
    measured_time: float | None
    measured_memory: float | None
    memory_kind: MemoryKind
    memory_rank: str
    excluded: str
    memory_excluded: str

    @property
    def name(self) -> str:
        """Its name within the table: its line."""
        return str(self.line)

    @property
    def source(self) -> str:
        """Where the row comes from, blank when not stated."""
        return self.row.get("source", "")

    @property
    def base_engine(self) -> str:
        """The engine without its recipe."""
        return without_recipe(self.engine)

    @property
    def is_timed(self) -> bool:
        """Whether its step time was measured and counts."""
        return self.outcome == "ran" and bool(self.measured_time) and not self.excluded


@dataclass
class Batch:
    """Rows of one task: what is predicted together."""

    task: Task
    entries: list[Entry] = field(default_factory=list)

    @cached_property
    def layouts(self) -> LayoutArray:
        """The outer choices, with the rows' own micro-batch counts."""
        x = LayoutArray.of([e.run.layout for e in self.entries], self.task.job)
        return replace(x, microbatches=np.array([e.run.microbatches for e in self.entries], dtype=np.int64))

    @cached_property
    def stages(self) -> StageArray:
        """The pipeline ranks."""
        return StageArray.of([e.run.layout for e in self.entries])

    @cached_property
    def kind_counts(self) -> Ints:
        """Layers of each kind on each pipeline rank, shape (ranks, kinds)."""
        return np.concatenate([step.layers_by_kind(self.task, e.run.layout) for e in self.entries])


@dataclass(frozen=True)
class Table:
    """A table of runs, sorted into batches; the same table can be predicted again with other constants."""

    batches: tuple[Batch, ...]
    skipped: Counter[str]


def predict_file(path: str, profile_map: str | None = None, quality: frozenset[str] | None = None) -> Predicted:
    """Predict the rows of `path` whose quality is in `quality` (all when None; rows without a quality always count).

    Failed rows are kept whatever their quality: they say what does not fit. Raises InputError.
    """
    return predict_table(load_table(path, load_map(profile_map), quality))


def load_table(path: str, rules: ProfileMap, quality: frozenset[str] | None = None, profile: str | None = None) -> Table:
    """Read and sort a table. With `profile`, every row is put on it, and rows of another device are skipped.

    Raises InputError for a table or a profile that cannot be read.
    """
    skipped: Counter[str] = Counter()
    profiles: dict[str, HardwareProfile] = {}
    batches: dict[tuple[str, ...], Batch] = {}
    for line, stated in read_table(path):
        row = rules.completed(stated)
        outcome = _outcome(row)
        if quality is not None and outcome == "ran" and row.get("quality", "") not in {"", *quality}:
            skipped[f"quality {row['quality']}"] += 1
            continue
        if (own := hardware_of(row)) is not None:
            profiles.setdefault(own.name, own)
        try:
            entry = _entry(line, row, rules, outcome, profile)
            if profile is not None:
                _same_device(own.name if own is not None else rules.profile_of(row), profile, profiles)
        except Unusable as why:
            skipped[str(why)] += 1
            continue
        hardware = profiles[entry.profile] = _profile(entry.profile, profiles)
        run = entry.run
        key = (run.model.model_dump_json(), run.job.model_dump_json(), entry.profile, entry.engine, str(run.gpus))
        task = Task(run.model, run.job, hardware, run.gpus, accounting_named(entry.engine), max_memory_fraction=1.0)
        batch = batches.setdefault(key, Batch(task))
        try:
            batch.task.linear_peak  # noqa: B018 - the profile must know the types
        except InputError:
            skipped["the profile has no peak for this precision"] += 1
            continue
        batch.entries.append(entry)
    if rules.stalled is not None:
        _leave_out_stalled(list(batches.values()), rules.stalled)
    return Table(tuple(b for b in batches.values() if b.entries), skipped)


def _leave_out_stalled(batches: list[Batch], rule: StalledRule) -> None:
    """Mark the runs that stalled as excluded, by their measured times."""
    runs = [m for batch in batches for e in batch.entries if (m := _measured(batch.task, e)) is not None]
    found, reason = stalled(runs, rule.slower, rule.dearer), why(rule.slower, rule.dearer)
    for batch in batches:
        batch.entries = [replace(e, excluded=reason) if e.name in found and not e.excluded else e for e in batch.entries]


def _measured(task: Task, e: Entry) -> Measured | None:
    """A timed run as the rule for stalled ones sees it."""
    if e.outcome != "ran" or not e.measured_time:
        return None
    x = e.run.layout
    alike = (
        e.source, e.row.get("framework_version", ""), e.profile, e.engine, task.model.model_dump_json(),
        task.job.model_dump_json(), x.model_copy(update={"dp": 1, "zero": 0, "micro_batch": 1}).model_dump_json(),
    )  # fmt: skip
    return Measured(e.name, alike, e.run.gpus, x.micro_batch, e.measured_time)


def _same_device(own: str | None, wanted: str, known: dict[str, HardwareProfile]) -> None:
    """Raises Unusable when the row's own columns name another device than the profile's."""
    if own is None:
        return
    devices = []
    for name in (own, wanted):
        known[name] = _profile(name, known)
        devices.append(known[name].device.name)
    if devices[0] != devices[1]:
        raise Unusable(f"another device than the profile's ({devices[0]})")


def _profile(name: str, known: dict[str, HardwareProfile]) -> HardwareProfile:
    return known[name] if name in known else files.load_hardware(name)[0]


def _entry(line: int, row: Row, rules: ProfileMap, outcome: Outcome, wanted: str | None) -> Entry:
    own = hardware_of(dict(row))
    profile, engine = wanted or rules.profile_of(row) or (own.name if own else None), rules.engine_of(row)
    if engine is None:
        raise Unusable(f"no engine accounting for {row.get('framework') or 'a blank framework'}")
    if profile is None:
        raise Unusable(f"no hardware profile for {row.get('hw_class') or row.get('hardware') or 'blank hardware'}")
    accounting = accounting_named(engine.engine)
    run = run_of(row, accounting, zero_default=max(accounting.zero) if "fsdp" in engine.engine else 1)
    if run.layout.zero not in accounting.zero:
        raise Unusable(f"ZeRO {run.layout.zero} is not part of {engine.engine}")
    measured = _measured_time(row, run) if outcome == "ran" else None
    found = positive(row, "peak_memory_gib", 1e-3, 1e5) if outcome == "ran" else None
    if outcome == "ran" and measured is None and found is None:
        raise Unusable("neither time nor memory measured")
    kind: MemoryKind = engine.memory
    text = row.get("memory_kind", "").lower()
    for word, means in (("reserved", "reserved"), ("allocated", "allocated"), ("nvidia-smi", "device")):
        if word in text and "not stated" not in text:
            kind = means  # type: ignore[assignment]
    return Entry(
        line, row, run, profile, engine.engine, outcome, measured, found, kind, engine.rank,
        rules.excluded(row, "time"), rules.excluded(row, "memory"),
    )  # fmt: skip


def _outcome(row: Row) -> Outcome:
    kind = row.get("row_kind", "")
    if "oom" in kind and "crash" not in kind:
        return "oom"
    return "failed" if kind.startswith("failed") else "ran"


def _measured_time(row: Row, run: Run) -> float | None:
    """Seconds of a step: as measured, or from tokens a second."""
    seconds = positive(row, "iteration_time_s", 1e-6, 1e7)
    if seconds is not None:
        return seconds
    rate = positive(row, "tokens_per_s_per_gpu", 1e-6, 1e9)
    return run.job.tokens_per_step / (rate * run.gpus) if rate else None


# ---- prediction --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """What the cost model says of a batch; arrays over its rows."""

    seconds: Floats
    held: Floats
    """Bytes that the allocator of the worst rank holds, before the reserved ratio."""
    held_first: Floats
    """The same of the first rank."""
    allocated: Floats
    """Those of the worst rank that are allocated."""
    allocated_first: Floats
    outside: Floats
    terms: dict[str, Floats]


def predict_table(table: Table) -> Predicted:
    """Predict every row of the table."""
    rows: list[Prediction] = []
    for batch in table.batches:
        rows += _predictions(batch, figures(batch))
    return Predicted(tuple(sorted(rows, key=lambda r: r.line)), table.skipped)


def priced(batch: Batch, task: Task) -> tuple[list[PrimitiveTable], Primitives, Primitives | None]:
    """(tables by kind of layer, the last kind's primitives, blended primitives of ranks that mix kinds)."""
    kinds = [primitive_table(task.only(k), batch.layouts) for k in range(len(task.model.kinds))]
    tables = [table.of(slice(None)) for table in kinds]
    mixed = len(kinds) > 1
    return kinds, tables[task.model.text_kind], _blended(tables, batch) if mixed else None


def _blended(tables: list[Primitives], batch: Batch) -> Primitives:
    """Primitives of each rank of a model that mixes kinds of layers."""
    stack = Stack.of([p.take(batch.stages.row) for p in tables], batch.task.model.text_kind)
    return step.blended_ranks(batch.task, stack, [e.run.layout for e in batch.entries], batch.layouts.microbatches)


def figures(batch: Batch, task: Task | None = None) -> Figures:
    """Price a batch, with another task's constants if one is given."""
    x, stages = batch.layouts, batch.stages
    kinds, p, blended = priced(batch, task or batch.task)
    cost = step.stage_cost(p, x, stages, blended)
    done = step.step_cost(p, x, stages, blended)
    first = stages.index == 0
    allocated = _allocated(batch, task or batch.task, cost)
    order = np.argsort(stages.row, kind="stable")
    starts = np.searchsorted(stages.row[order], np.arange(len(x)))
    return Figures(
        done.step / 1e9,
        done.allocated.astype(float),
        cost.allocated[first].astype(float),
        np.maximum.reduceat(allocated[order], starts).astype(float),
        allocated[first].astype(float),
        p.outside.astype(float),
        _terms(batch, blended or p.take(stages.row), [t.parts() for t in kinds], cost, done.step / 1e9),
    )


def _allocated(batch: Batch, task: Task, cost: step.StageCost) -> Ints:
    """What ranks allocate, of what their allocators hold."""
    x, stages = batch.layouts, batch.stages
    pooled = states.pooled_bytes(task, x.take(stages.row), stages.index, batch.kind_counts)
    return cost.without(pooled).allocated


def _terms(batch: Batch, q: Primitives, parts: list[TimeParts], cost: step.StageCost, seconds: Floats) -> dict[str, Floats]:
    """Seconds of a step by cause, on the slowest rank."""
    x, stages = batch.layouts, batch.stages
    order = np.lexsort((-cost.time, stages.row))
    slow = order[np.searchsorted(stages.row[order], np.arange(len(x)))]
    m = x.microbatches.astype(float)
    counts = batch.kind_counts[slow].astype(float)

    def layers(name: str) -> Floats:
        return m * sum((counts[:, k] * getattr(p, name) for k, p in enumerate(parts)), np.zeros(len(x)))

    n1, n2 = stages.selective[slow], stages.full[slow]
    last, first = stages.index[slow] == x.pp - 1, stages.index[slow] == 0
    total = np.zeros(len(x))
    np.add.at(total, stages.row, cost.time / 1e9)
    worst = np.zeros(len(x))
    np.maximum.at(worst, stages.row, cost.once / 1e9)
    update = (stages.layers * q.update + (stages.index == 0) * q.update_first)[slow] / 1e9
    terms = {
        "compute": layers("compute"), "tp": layers("tp"), "cp": layers("cp"), "ep": layers("ep"), "zero": layers("zero"),
        "recompute": m * (n1 * q.recompute1[slow] + n2 * q.recompute2[slow]) / 1e9,
        "ends": m * (last * q.head[slow] + first * q.embedding[slow]) / 1e9,
        "pp": m * q.p2p[slow] / 1e9,
        "bubble": (total - cost.time[slow] / 1e9) / x.virtual_stages,
        "optimizer": update,
        "dp": worst - update,
    }  # fmt: skip
    terms["other"] = seconds - sum(terms.values(), np.zeros(len(x)))
    return terms


def _predictions(batch: Batch, f: Figures) -> list[Prediction]:
    task = batch.task
    ratio = task.reserved_ratio
    probability = risk.out_of_memory_probability(task, f.held)
    spread = intervals.time_spread(task).relative
    result = []
    for i, e in enumerate(batch.entries):
        first = e.memory_rank == "first"
        held, allocated = (f.held_first, f.allocated_first) if first else (f.held, f.allocated)
        memory_gib = {
            "allocated": allocated[i], "reserved": held[i] * ratio, "device": held[i] * ratio + f.outside[i]
        }[e.memory_kind] / GIB  # fmt: skip
        seconds = float(f.seconds[i])
        row, run = e.row, e.run
        result.append(
            Prediction(
                line=e.line, row_id=row.get("row_id", "") or str(e.line), source=row.get("source", "") or "runs",
                hardware=row.get("hw_class") or row.get("hardware", ""), engine=e.engine, profile=e.profile,
                model=run.model.name, quality=row.get("quality", ""), kind=row.get("row_kind", ""), gpus=run.gpus,
                seq_len=run.job.seq_len, global_batch=run.job.global_batch,
                precision=run.job.precision if run.job.linears == "same" else run.job.linears,
                layout=describe(run, row), outcome=e.outcome, measured_time=e.measured_time, predicted_time=seconds,
                time_interval=(seconds / (1 + spread), seconds * (1 + spread)),
                measured_memory=e.measured_memory, predicted_memory=float(memory_gib), memory_kind=e.memory_kind,
                fits=bool(probability[i] < risk.FITS_BELOW), oom_probability=float(probability[i]),
                excluded=e.excluded, memory_excluded=e.memory_excluded,
                terms={k: float(v[i]) for k, v in f.terms.items()},
            )
        )  # fmt: skip
    return result


def describe(run: Run, row: Row) -> str:
    """A layout in short words, with what else tells configurations of one sweep apart."""
    x = run.layout
    words = [f"tp{x.tp}", f"pp{x.pp}", f"dp{x.dp}", f"mbs{x.micro_batch}"]
    for name, value, usual in (("vpp", x.virtual_stages, 1), ("cp", x.cp, 1), ("ep", x.ep, 1), ("etp", x.etp, 1)):
        if value != usual:
            words.append(f"{name}{value}")
    words.append(f"zero{x.zero}")
    if x.sequence_parallel:
        words.append("sp")
    if x.stages[0].recompute != "none":
        words.append(x.stages[0].recompute)
    version = row.get("framework_version", "")
    return " ".join(words + ([version] if version.startswith("kernel=") else []))
