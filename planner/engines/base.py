"""What an engine is: rules that accept or refuse a layout, and its accounting. Rules are data, used everywhere.

Search counts the layouts that each rule excludes, `check` and `estimate` print the same rule with its numbers, the
runtime refuses by it before it builds anything. A rule is a predicate over arrays of layouts.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from planner.cost.accounting import Accounting
from planner.cost.schedules import splits_backward
from planner.cost.task import (
    DUALPIPEV,
    GPIPE,
    INTERLEAVED,
    INTERLEAVED_ZB,
    NONE,
    ONE_F_ONE_B,
    V_CODES,
    ZBV,
    Bools,
    Ints,
    LayoutArray,
    Subject,
    Task,
)
from planner.errors import Problem
from planner.specs.features import features
from planner.specs.layout import OFFLOADS, RANK_ORDERS, SCHEDULES, SPLIT_BACKWARD, Layout
from planner.specs.model import Model

Predicate = Callable[[Subject | Task, LayoutArray], Bools]


@dataclass(frozen=True)
class Rule:
    """One thing that a layout must satisfy. Texts are templates over the layout's, model's and job's values."""

    code: str
    name: str
    """Short: the key of the certificate's histogram."""
    violated: Predicate
    what: str
    why: str
    fix: str
    whole_job: bool = False
    """It looks at the model and the job only: no layout can satisfy it."""
    on: Literal["degrees", "pipeline", "row"] = "row"
    """What of a layout it looks at: tp, cp, pp, dp, ep, etp alone; the schedule and its chunks besides; or anything. The
    search asks it as early as that."""

    def problem(self, values: dict[str, Any]) -> Problem:
        """The finding for one layout's values."""
        what, why, fix = (text.format(**values) for text in (self.what, self.why, self.fix))
        return Problem(self.code, what, why, fix, field=self.field)

    @property
    def field(self) -> str:
        """The first key that its text names: where a finding points to."""
        names = [name for _, name, _, _ in string.Formatter().parse(self.what) if name]
        return next(
            (
                n
                for n in names
                if n not in ("model", "gpus", "heads", "kv_heads", "microbatches", "experts", "features", "base", "type_sizes")
            ),
            "",
        )


@dataclass(frozen=True)
class Engine:
    """An engine: its name, what it refuses, how it counts."""

    name: str
    title: str
    rules: tuple[Rule, ...]
    accounting: Accounting
    zero_stages: tuple[int, ...]
    """ZeRO stages worth enumerating."""
    schedules: tuple[str, ...]
    """Schedules that it runs, without `none`."""
    sequence_parallel: tuple[int, ...]
    """Choices when tp > 1."""
    context_parallel: bool
    """Whether it splits the sequence (cp > 1)."""
    expert_parallel: bool = False
    """Whether it spreads experts (ep > 1)."""
    offloads: tuple[str, ...] = ("none",)
    """What it can keep in host memory."""
    offload_on_request: bool = False
    """Whether the search looks at offload only where it is pinned: not yet measured on devices."""
    rank_orders: tuple[str, ...] = ("tp-cp-dp-pp",)
    """Orders in which it can place the axes."""
    device_types: str = ""
    """Why it can run pipeline stages on devices of two types; empty where it cannot, or where nobody looked."""
    schedules_note: str = ""
    """Why it does not run the schedules that split the backward."""
    hybrid_sharding: bool = False
    """Whether a group of the data-parallel ranks can share states, with copies in the other groups."""
    unequal_chunks: bool = False
    """Whether the chunks of one rank may hold different numbers of layers."""

    @property
    def _choices(self) -> tuple[Rule, ...]:
        """Rules that follow from what it offers: offload, schedules, rank orders, device types, hybrid sharding, chunks."""
        offloads, orders = ([names.index(n) for n in own] for names, own in
                            ((OFFLOADS, self.offloads), (RANK_ORDERS, self.rank_orders)))  # fmt: skip
        return (
            Rule(
                "PLN226", f"{self.name}: offload",
                lambda t, x: ~np.isin(x.offload, offloads) | ((x.offload == 1) & _on_cpu(t)),
                "offload {offload}",
                f"{self.title} keeps in host memory: {', '.join(self.offloads)}; a CPU has no other",
                "set offload: none, or use another engine",
            ),
            Rule(
                "PLN580", f"{self.name}: split backward",
                lambda t, x: splits_backward(x.schedule) & ~np.isin(x.schedule, schedule_codes(self)),
                "schedule {schedule}",
                f"{self.title} runs: {', '.join(self.schedules) or 'no pipeline'}{self.schedules_note}",
                "use another schedule or engine",
                on="pipeline",
            ),
            Rule(
                "PLN227", f"{self.name}: rank order",
                lambda t, x: ~np.isin(x.order, orders),
                "order {order}",
                f"{self.title} places ranks as {' or '.join(self.rank_orders)}",
                "leave out order, or use another engine",
                on="degrees",
            ),
            Rule(
                "PLN508", f"{self.name}: hybrid sharding",
                lambda t, x: (x.replicas > 1) & (not self.hybrid_sharding),
                "shard {sharded} of dp x cp {shard}",
                f"{self.title} shards states over all of dp x cp here",
                "leave out shard, or use engine bundled or torchtitan",
            ),
            Rule(
                "PLN578", f"{self.name}: device types",
                lambda t, x: _all(x, bool(t.type_sizes) and not self.device_types),
                "two device types",
                f"{self.title} is not known to run pipeline stages of unequal depth on devices of two types",
                "use --engine bundled or megatron, or one type",
                whole_job=True,
                on="degrees",
            ),
            Rule(
                "PLN570", f"{self.name}: unequal chunks",
                lambda t, x: (x.virtual_stages > 1) & ~_divides(t.model.n_layers, x.virtual_stages) & (not self.unequal_chunks),
                "{n_layers} layers with {virtual_stages} virtual stages",
                f"{self.title} cuts a rank into equal chunks only",
                "choose virtual_stages from the divisors of {n_layers}, or use another engine",
                on="pipeline",
            ),
        )  # fmt: skip

    @property
    def all_rules(self) -> tuple[Rule, ...]:
        """Rules of every engine and its own, in the order in which they are asked: those that look at least first."""
        return tuple(
            sorted(COMMON_RULES + self.rules + self._choices, key=lambda rule: ("degrees", "pipeline", "row").index(rule.on))
        )


def _divides(n: np.ndarray | int, d: np.ndarray) -> Bools:
    return np.asarray(n % np.maximum(d, 1) == 0)


def _divide_each(sizes: Iterable[int], d: np.ndarray) -> Bools:
    """Whether `d` divides every one of the sizes: those of all kinds of layers."""
    return np.logical_and.reduce([_divides(n, d) for n in sizes] or [np.ones(len(d), dtype=bool)])


def _on_cpu(task: Subject | Task) -> bool:
    """Whether the device is known to be a CPU: its memory is the host's."""
    return isinstance(task, Task) and task.hardware.device.kind == "cpu"


def _all(layouts: LayoutArray, value: bool) -> Bools:
    return np.full(len(layouts), value)


def _chunks_do_not_fit(task: Subject | Task, x: LayoutArray) -> Bools:
    """Whether a schedule has another number of chunks a rank."""
    v, many, vee = x.virtual_stages, np.isin(x.schedule, (INTERLEAVED, INTERLEAVED_ZB)), np.isin(x.schedule, V_CODES)
    return np.asarray(np.where(vee, v != 2, many != (v > 1)))


def _order_matters(task: Subject | Task, x: LayoutArray) -> Bools:
    """Whether stages beside each other make any group cross other tiers than stages apart: needs pp and dp above 1."""
    sizes = [tier.size for tier in task.hardware.network if tier.size] if isinstance(task, Task) else []
    inside, world = x.tp * x.cp, x.tp * x.cp * x.dp * x.pp

    def crossed(span: Ints) -> Ints:
        return np.sum([span > size for size in sizes], axis=0, dtype=np.int64) + np.zeros(len(x), dtype=np.int64)

    # Stages apart: replicas span tp cp dp, pipelines the world; beside each other: pipelines tp cp pp, replicas the world.
    apart = (crossed(inside * x.dp), crossed(world))
    beside = (crossed(world), crossed(inside * x.pp))
    differs = (apart[0] != beside[0]) | (apart[1] != beside[1])
    return np.asarray((x.pp > 1) & (x.dp > 1) & (differs if sizes else True))


COMMON_RULES: tuple[Rule, ...] = (
    Rule(
        "PLN201", "world = tp cp pp dp",
        lambda t, x: x.tp * x.cp * x.pp * x.dp != t.gpus,
        "tp {tp} x cp {cp} x pp {pp} x dp {dp} is {product} devices, the cluster has {gpus}",
        "every device belongs to exactly one rank",
        "choose degrees whose product is {gpus}",
        on="degrees",
    ),
    Rule(
        "PLN202", "heads % tp",
        lambda t, x: ~_divide_each((a.heads for a in t.model.attentions), x.tp),
        "tp {tp} does not divide the {heads} attention heads",
        "{heads} / {tp} is not a whole number",
        "choose tp from the divisors of {heads}",
        on="degrees",
    ),
    Rule(
        "PLN203", "mlp width % tp",
        lambda t, x: ~_divide_each((m.dense_width for m in t.model.mlps), x.tp),
        "tp {tp} does not divide the MLP width {dense_width}",
        "{dense_width} / {tp} is not a whole number",
        "choose another tp",
        on="degrees",
    ),
    Rule(
        "PLN204", "vocab % tp",
        lambda t, x: ~_divides(t.model.vocab, x.tp),
        "tp {tp} does not divide the vocabulary {vocab}",
        "embedding and head are split over tp by rows",
        "pad the vocabulary to a multiple of {tp}, or choose another tp",
        on="degrees",
    ),
    Rule(
        "PLN205", "global batch % (dp micro_batch)",
        lambda t, x: ~_divides(t.job.global_batch, x.dp * x.micro_batch),
        "global batch {global_batch} is not divisible by dp {dp} x micro_batch {micro_batch}",
        "each data-parallel rank runs a whole number of micro-batches",
        "choose dp and micro_batch whose product divides {global_batch}, or change the global batch",
    ),
    Rule(
        "PLN206", "schedule fits pp",
        lambda t, x: (x.schedule == NONE) != (x.pp == 1),
        "schedule {schedule} with pp {pp}",
        "a pipeline schedule needs pp > 1, and pp > 1 needs one",
        "set schedule: none exactly when pp is 1",
        on="pipeline",
    ),
    Rule(
        "PLN207", "virtual stages fit schedule",
        _chunks_do_not_fit,
        "schedule {schedule} with {virtual_stages} virtual stage(s)",
        "interleaved and interleaved-zb have 2 or more, zbv and dualpipev exactly 2, the others 1",
        "set virtual_stages: 1, or a schedule that has {virtual_stages}",
        on="pipeline",
    ),
    Rule(
        "PLN208", "layers >= stages",
        lambda t, x: x.pp * x.virtual_stages > t.model.n_layers,
        "pp {pp} x {virtual_stages} virtual stages need more layers than the {n_layers} there are",
        "every chunk of the pipeline holds a layer",
        "choose fewer stages",
        on="pipeline",
    ),
    Rule(
        "PLN209", "interleaved: micro-batches % pp",
        lambda t, x: np.isin(x.schedule, (INTERLEAVED, INTERLEAVED_ZB)) & ~_divides(x.microbatches, x.pp),
        "{schedule} runs {microbatches} micro-batches on pp {pp}",
        "it passes micro-batches through chunks in groups of pp",
        "make global_batch / (dp x micro_batch) a multiple of {pp}",
    ),
    Rule(
        "PLN581", "zbv: micro-batches >= 2 pp - 1",
        lambda t, x: (x.schedule == ZBV) & (x.microbatches < 2 * x.pp - 1),
        "{schedule} runs {microbatches} micro-batches on pp {pp}",
        "it is laid out for 2 pp - 1 of them, and drops the rest of its slots below",
        "lower dp, micro_batch or pp, or use interleaved",
    ),
    Rule(
        "PLN582", "dualpipev: micro-batches >= 2 pp",
        lambda t, x: (x.schedule == DUALPIPEV) & (x.microbatches < 2 * x.pp),
        "{schedule} runs {microbatches} micro-batches on pp {pp}",
        "it needs as many micro-batches as stages, two a rank",
        "lower dp, micro_batch or pp, or use interleaved",
    ),
    Rule(
        "PLN583", "split backward x zero 3",
        lambda t, x: splits_backward(x.schedule) & (x.zero == 3),
        "schedule {schedule} with zero {zero}",
        "torch splits the backward over parameters that zero 3 has freed by then: some gradients are missing, others wrong",
        "set zero: 2 or less, or schedule: interleaved",
    ),
    Rule(
        "PLN585", "split backward: layers of one kind",
        lambda t, x: splits_backward(x.schedule) & (not t.model.homogeneous),
        "schedule {schedule} on {model}, which mixes kinds of layers",
        "the closed form of its step is exact for equal chunks only, and was tested on them",
        "use interleaved or 1f1b",
        on="pipeline",
    ),
    Rule(
        "PLN586", "split backward: equal chunks",
        lambda t, x: splits_backward(x.schedule) & ~_divides(t.model.n_layers, x.virtual_stages),
        "schedule {schedule} on {n_layers} layers with {virtual_stages} virtual stages",
        "the closed form of its step is exact for equal chunks only, and was tested on them",
        "choose virtual_stages from the divisors of {n_layers}, or use interleaved",
        on="pipeline",
    ),
    Rule(
        "PLN210", "zero needs dp",
        lambda t, x: (x.zero > 0) & (x.data == 1),
        "zero {zero} with dp x cp = 1",
        "there is nothing to shard over",
        "set zero: 0, or use more data-parallel ranks",
    ),
    Rule(
        "PLN506", "dp cp % shard",
        lambda t, x: (x.sharded > 0) & ~_divides(x.data, x.sharded),
        "shard {sharded} does not divide dp x cp {shard}",
        "every copy of the states is shared by as many ranks",
        "choose shard from the divisors of {shard}, or leave it out",
    ),
    Rule(
        "PLN507", "shard needs sharded states",
        lambda t, x: (x.replicas > 1) & ((x.zero == 0) | (x.shard == 1)),
        "shard {sharded} with zero {zero}",
        "copies of the states that several ranks share need zero 1 or more, and a shard of 2 or more",
        "set zero: 1 or more and shard: 2 or more, or zero: 0 without shard",
    ),
    Rule(
        "PLN509", "shard with routed experts",
        lambda t, x: (x.replicas > 1) & bool(t.model.routed_mlps),
        "shard {sharded} of dp x cp {shard} with routed experts",
        "experts are sharded over other ranks than the rest: copies of both are not part of this accounting",
        "leave out shard",
    ),
    Rule(
        "PLN228", "offload needs sharded states",
        lambda t, x: (x.offload == 1) & (x.zero == 0),
        "offload {offload} with zero 0",
        "every rank would update all states in the memory of the same host",
        "set zero: 1 or more, or offload: none",
    ),
    Rule(
        "PLN211", "sequence parallel needs tp",
        lambda t, x: (x.sequence_parallel == 1) & (x.tp == 1),
        "sequence_parallel with tp 1",
        "it splits the sequence inside the tensor-parallel group",
        "set sequence_parallel: false",
    ),
    Rule(
        "PLN212", "sequence % tp",
        lambda t, x: (x.sequence_parallel == 1) & ~_divides(t.job.seq_len, x.tp * x.cp),
        "sequence length {seq_len} is not divisible by tp {tp} x cp {cp}",
        "sequence parallelism gives each rank an equal share of the tokens",
        "choose another sequence length or tp",
    ),
    Rule(
        "PLN213", "sequence % 2cp",
        lambda t, x: (x.cp > 1) & ~_divides(t.job.seq_len, 2 * x.cp),
        "sequence length {seq_len} is not divisible by 2 x cp {cp}",
        "context parallelism gives each rank two equal pieces, to balance causal attention",
        "choose another sequence length or cp",
        on="degrees",
    ),
    Rule(
        "PLN214", "expert degrees need experts",
        lambda t, x: ((x.ep > 1) | (x.etp > 1)) & (not t.model.routed_mlps),
        "ep {ep}, etp {etp} on a model without experts",
        "expert parallelism spreads experts",
        "set ep: 1 and etp: 1",
        on="degrees",
    ),
    Rule(
        "PLN225", "rank order changes no tier",
        lambda t, x: (x.order == 1) & ~_order_matters(t, x),
        "order {order} where it changes nothing",
        "pipeline and data-parallel groups cross the same network tiers in the usual order",
        "leave out order",
        on="degrees",
    ),
    Rule(
        "PLN216", "experts % ep",
        lambda t, x: ~_divide_each((m.experts for m in t.model.routed_mlps), x.ep),
        "ep {ep} does not divide the {experts} experts",
        "every expert-parallel rank holds as many experts",
        "choose ep from the divisors of {experts}",
        on="degrees",
    ),
    Rule(
        "PLN217", "tp cp dp % ep etp",
        lambda t, x: ~_divides(x.tp * x.cp * x.dp, x.ep * x.etp),
        "tp {tp} x cp {cp} x dp {dp} is not a multiple of ep {ep} x etp {etp}",
        "experts are spread over the ranks of one pipeline stage",
        "choose ep and etp whose product divides the ranks of a stage",
        on="degrees",
    ),
    Rule(
        "PLN218", "expert width % etp",
        lambda t, x: ~_divide_each((m.width for m in t.model.routed_mlps), x.etp),
        "etp {etp} does not divide the expert width {expert_width}",
        "{expert_width} / {etp} is not a whole number",
        "choose another etp",
        on="degrees",
    ),
    Rule(
        "PLN215", "sequence <= learned positions",
        lambda t, x: _all(x, t.model.positions == "learned" and t.job.seq_len > (t.model.max_positions or 0)),
        "sequence length {seq_len} exceeds the {max_positions} learned positions",
        "the position embedding has no rows for the rest",
        "shorten the sequence, or raise max_positions in the model",
        whole_job=True,
    ),
    Rule(
        "PLN575", "device types: whole stages",
        lambda t, x: ~_divide_each(t.type_sizes, x.tp * x.cp * x.dp),
        "a stage of tp {tp} x cp {cp} x dp {dp} devices does not divide the {type_sizes} devices of the two types",
        "every stage is wholly on one device type, and all devices of both types are used",
        "choose degrees whose product divides both numbers",
        on="degrees",
    ),
    Rule(
        "PLN576", "device types: one chunk a rank",
        lambda t, x: (x.virtual_stages > 1) & bool(t.type_sizes),
        "{virtual_stages} virtual stages on two device types",
        "with chunks every micro-batch passes each type several times, and chunks are equal while the types are not",
        "set virtual_stages: 1",
        on="pipeline",
    ),
    Rule(
        "PLN577", "device types: stages apart",
        lambda t, x: (x.order == 1) & bool(t.type_sizes),
        "order {order} on two device types",
        "nodes of one type hold neighbouring ranks, which are whole stages only where pp is outermost",
        "leave out order",
        on="degrees",
    ),
    Rule(
        "PLN579", "type order needs two device types",
        lambda t, x: (x.type_order == 1) & (not t.type_sizes),
        "type_order {type_order} on one device type",
        "it says which of two types holds the first stages",
        "leave out type_order",
    ),
)  # fmt: skip
"""True of every engine."""


def kv_heads_divisible(task: Subject | Task, layouts: LayoutArray) -> Bools:
    """tp divides the key/value heads (engines that do not replicate them)."""
    return ~_divide_each(_kv_heads(task.model), layouts.tp)


def exchange_divisible(task: Subject | Task, layouts: LayoutArray) -> Bools:
    """cp divides the key/value heads of a tensor-parallel rank (engines that exchange heads for tokens)."""
    return (layouts.cp > 1) & ~_divide_each(_kv_heads(task.model), layouts.tp * layouts.cp)


def _kv_heads(model: Model) -> list[int]:
    """Key/value heads of each kind of layers that has them: latent attention has none of its own."""
    return [a.kv_heads or a.heads for a in model.attentions if a.kind != "latent"]


def kv_heads_replicable(task: Subject | Task, layouts: LayoutArray) -> Bools:
    """tp divides the key/value heads or is a multiple of them."""
    each = [_divides(kv, layouts.tp) | (layouts.tp % kv == 0) for kv in _kv_heads(task.model)]
    return ~np.logical_and.reduce([_all(layouts, True), *each])


def routed_without_sequence_parallel(task: Subject | Task, layouts: LayoutArray) -> Bools:
    """Routed experts with tp but without sequence parallelism: each token would be routed tp times."""
    return (layouts.tp > 1) & (layouts.sequence_parallel == 0) & bool(task.model.routed_mlps)


def unsupported_layers(task: Subject | Task, layouts: LayoutArray) -> Bools:
    """Experts or latent attention, for engines that have neither."""
    kinds = {a.kind for a in task.model.attentions}
    return _all(layouts, bool(task.model.routed_mlps) or kinds != {"softmax"})


def microbatches_below_pp(task: Subject | Task, layouts: LayoutArray) -> Bools:
    """1F1B with fewer micro-batches than stages."""
    return (layouts.schedule == ONE_F_ONE_B) & (layouts.microbatches < layouts.pp)


def gpipe(task: Subject | Task, layouts: LayoutArray) -> Bools:
    """The schedule is GPipe."""
    return layouts.schedule == GPIPE


def values_of(task: Subject | Task, layout: Layout) -> dict[str, Any]:
    """What a rule's texts may name, for one layout."""
    model, job = task.model, task.job
    return {
        **layout.model_dump(exclude={"stages"}),
        "product": layout.world_size, "shard": layout.dp * layout.cp, "sharded": layout.sharded, "gpus": task.gpus,
        "microbatches": layout.microbatches(job),
        "heads": _listed(a.heads for a in model.attentions), "kv_heads": _listed(_kv_heads(model)),
        "dense_width": _listed(m.dense_width for m in model.mlps), "experts": _listed(m.experts for m in model.routed_mlps),
        "features": ", ".join(features(model)),
        "expert_width": _listed(m.width for m in model.routed_mlps), "vocab": model.vocab,
        "n_layers": model.n_layers, "max_positions": model.max_positions, "model": model.name,
        "seq_len": job.seq_len, "global_batch": job.global_batch, "precision": job.precision,
        "base": job.adapter.base if job.adapter else "",
        "type_order": layout.type_order, "type_sizes": " and ".join(str(n) for n in task.type_sizes),
    }  # fmt: skip


def _listed(sizes: Iterable[int]) -> str:
    """The distinct sizes of a model's kinds of layers."""
    return " and ".join(str(n) for n in sorted(set(sizes)))


def layout_problems(task: Subject | Task, engine: Engine, layout: Layout) -> list[Problem]:
    """Every rule that one layout breaks, and what is wrong with its stages."""
    array = LayoutArray.of([layout], task.job)
    values = values_of(task, layout)
    found = [rule.problem(values) for rule in engine.all_rules if bool(rule.violated(task, array)[0])]
    return found + stage_problems(task.model, layout)


def job_problems(task: Subject | Task, engine: Engine) -> list[Problem]:
    """Rules that no layout of this model and job can satisfy."""
    layout = Layout.model_validate({"stages": [{"layers": task.model.n_layers}]})
    array = LayoutArray.of([layout], task.job)
    broken = [r for r in engine.all_rules if r.whole_job and bool(r.violated(task, array)[0])]
    return [rule.problem(values_of(task, layout)) for rule in broken]


def stage_problems(model: Model, layout: Layout) -> list[Problem]:
    """What is wrong with a layout's list of stages."""
    v, held = layout.virtual_stages, sum(s.layers for s in layout.stages)
    checks = (
        (
            len(layout.stages) != layout.pp, "PLN221",
            f"{len(layout.stages)} stages listed for pp {layout.pp}",
            "stages has one entry a pipeline rank", f"list {layout.pp} stages",
        ),
        (
            held != model.n_layers, "PLN222",
            f"the stages hold {held} layers, {model.name} has {model.n_layers}",
            "every layer belongs to exactly one stage", "correct the stages' layers",
        ),
        (
            any(s.layers < v for s in layout.stages) or any(s.layers % v for s in layout.stages[:-1]), "PLN223",
            "a stage holds no layer" if v == 1 else f"a stage's layers are not a multiple of its {v} chunks",
            "every chunk of a stage holds as many layers, at least one; only the last stage's last chunks may be one short",
            "give each stage but the last a multiple of its chunks, or use fewer chunks",
        ),
        (
            v > 1 and any(max(s.counts) not in (0, s.layers) for s in layout.stages), "PLN224",
            "a stage with chunks is recomputed in part",
            "with virtual stages a stage is recomputed as a whole", "use none, selective or full",
        ),
        (
            layout.schedule in SPLIT_BACKWARD and any(max(s.counts) for s in layout.stages), "PLN584",
            f"recompute with schedule {layout.schedule}",
            "torch repeats a layer for its input gradients, and again for each matrix and norm that gets its weight gradient "
            "(full), or raises an error (selective)", "set recompute: none, or schedule: interleaved",
        ),
    )  # fmt: skip
    return [Problem(code, what, why, fix, field="stages") for broken, code, what, why, fix in checks if broken]


def schedule_codes(engine: Engine) -> tuple[int, ...]:
    """Codes of the schedules that an engine runs, without `none`."""
    return tuple(SCHEDULES.index(name) for name in engine.schedules)
