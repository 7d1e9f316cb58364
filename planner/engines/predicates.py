"""What rules ask of layouts: predicates over arrays of them, true where a layout breaks the rule."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from planner.cost.task import GPIPE, INTERLEAVED, INTERLEAVED_ZB, ONE_F_ONE_B, V_CODES, Bools, Ints, LayoutArray, Subject, Task
from planner.specs.model import Model


def divides(n: np.ndarray | int, d: np.ndarray) -> Bools:
    return np.asarray(n % np.maximum(d, 1) == 0)


def divide_each(sizes: Iterable[int], d: np.ndarray) -> Bools:
    """Whether `d` divides every one of the sizes: those of all kinds of layers."""
    return np.logical_and.reduce([divides(n, d) for n in sizes] or [np.ones(len(d), dtype=bool)])


def on_a_cpu(task: Subject | Task) -> bool:
    """Whether the device is known to be a CPU: its memory is the host's."""
    return isinstance(task, Task) and task.hardware.device.kind == "cpu"


def everywhere(layouts: LayoutArray, value: bool) -> Bools:
    return np.full(len(layouts), value)


def chunks_do_not_fit(task: Subject | Task, x: LayoutArray) -> Bools:
    """Whether a schedule has another number of chunks a rank."""
    v, many, vee = x.virtual_stages, np.isin(x.schedule, (INTERLEAVED, INTERLEAVED_ZB)), np.isin(x.schedule, V_CODES)
    return np.asarray(np.where(vee, v != 2, many != (v > 1)))


def order_matters(task: Subject | Task, x: LayoutArray) -> Bools:
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


def kv_heads_divisible(task: Subject | Task, layouts: LayoutArray) -> Bools:
    """tp divides the key/value heads (engines that do not replicate them)."""
    return ~divide_each(kv_heads(task.model), layouts.tp)


def exchange_divisible(task: Subject | Task, layouts: LayoutArray) -> Bools:
    """cp divides the key/value heads of a tensor-parallel rank (where heads are exchanged for tokens)."""
    return (layouts.cp > 1) & (layouts.context == 0) & ~divide_each(kv_heads(task.model), layouts.tp * layouts.cp)


def kv_heads(model: Model) -> list[int]:
    """Key/value heads of each kind of layers that has them: latent attention has none of its own."""
    return [a.kv_heads or a.heads for a in model.attentions if a.kind != "latent"]


def kv_heads_replicable(task: Subject | Task, layouts: LayoutArray) -> Bools:
    """tp divides the key/value heads or is a multiple of them."""
    each = [divides(kv, layouts.tp) | (layouts.tp % kv == 0) for kv in kv_heads(task.model)]
    return ~np.logical_and.reduce([everywhere(layouts, True), *each])


def routed_without_sequence_parallel(task: Subject | Task, layouts: LayoutArray) -> Bools:
    """Routed experts with tp but without sequence parallelism: each token would be routed tp times."""
    return (layouts.tp > 1) & (layouts.sequence_parallel == 0) & bool(task.model.routed_mlps)


def unsupported_layers(task: Subject | Task, layouts: LayoutArray) -> Bools:
    """Experts or latent attention, for engines that have neither."""
    kinds = {a.kind for a in task.model.attentions}
    return everywhere(layouts, bool(task.model.routed_mlps) or kinds != {"softmax"})


def microbatches_below_pp(task: Subject | Task, layouts: LayoutArray) -> Bools:
    """1F1B with fewer micro-batches than stages."""
    return (layouts.schedule == ONE_F_ONE_B) & (layouts.microbatches < layouts.pp)


def gpipe(task: Subject | Task, layouts: LayoutArray) -> Bools:
    """The schedule is GPipe."""
    return layouts.schedule == GPIPE
