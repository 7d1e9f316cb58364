"""Parameters, gradients and optimizer states of a rank as integers: bytes of a layer, and of what both ends hold besides."""

from __future__ import annotations

import numpy as np

from planner.cost import adapters, frozen, memory
from planner.cost.rounding import ceil
from planner.cost.schedules import ends
from planner.cost.task import Floats, Ints, LayoutArray, Task


def params_by_place(params: dict[str, Floats]) -> dict[str, Floats]:
    """Parameters by place: of a layer, of the first rank's extras, of the last rank's."""
    return {
        "layer": params["layer"],
        "first": params["embedding"],
        "last": params["own_head"] + params["norm"] + params["modules"],
    }


def held_bytes(task: Task, layouts: LayoutArray) -> dict[str, Ints]:
    """Bytes of parameters, gradients and optimizer states of a layer and of the first and last rank's extras."""
    params = frozen.trained_params(task, layouts)
    per = memory.state_bytes(task, layouts, layouts.shard)
    routed = memory.state_bytes(task, layouts, layouts.expert_shard)
    zeros = np.zeros(len(layouts))
    backward, update = sum(per.backward.values(), zeros) + per.pooled, sum(per.update.values(), zeros)
    place, experts = params_by_place(params), params["experts"]
    routed_backward = sum(routed.backward.values(), zeros) + routed.pooled
    more = {"state": routed_backward * experts, "updating": sum(routed.update.values(), zeros) * experts}
    result = {}
    for name, suffix in (("layer", ""), ("first", "_first"), ("last", "_last")):
        result[f"state{suffix}"] = ceil(backward * place[name] + (0 if suffix else more["state"]))
        result[f"updating{suffix}"] = ceil(update * place[name] + (0 if suffix else more["updating"]))
    locality, first = mask_bytes(task), first_gradients(task, layouts)
    beside_head = ceil(per.resident * params["head"])
    result["state_last"] += beside_head
    result["updating_last"] += beside_head
    rest = embedding_rest(task, layouts)
    result["state_first"] += ceil(per.whole_gradients * rest)
    # Experts that are no part of their layer's unit are one of their own, which is gathered and reduced before it.
    alone = ~memory.joined(task.accounting, layouts) & task.accounting.experts_join
    beside = np.where(alone, 0.0, experts)
    # What is divided is memory of the stream that reduces gradients: nothing else gets it before they are made.
    result["grads"] = np.floor(per.whole_gradients * place["layer"] + routed.whole_gradients * experts).astype(np.int64)
    result["grads_first"] = np.floor(per.whole_gradients * place["first"]).astype(np.int64)
    result["head_gradients"] = np.floor(per.backward["grads"] * params["own_head"]).astype(np.int64)
    result |= _finishing(task, layouts, params, per, routed, rest, beside)
    result |= {
        # Weight-gradient buffers exist once for each shape: one expert stands for all.
        "fixed": ceil(
            per.resident * (params["layer"] + params["expert"])
            + per.received * (params["layer"] + beside)
            + task.hardware.device.workspace.base
            + locality
        ),
        "unit": ceil(
            (per.unit + per.own * first[0]) * params["layer"]
            + (routed.unit + routed.own * first[1]) * experts
            - routed.ahead * (experts - beside)
        ),
        "reduction": ceil(per.unit_reduction * params["layer"] + routed.unit_reduction * beside),
        "head_unit": ceil(per.head * params["head"]),
        "head_reduction": ceil(np.maximum(per.head_reduction - per.released, 0) * params["head"]),
        "last_reduction": ceil(per.last_reduction * params["layer"] + routed.last_reduction * beside),
        "last_layer": ceil(per.last_unit * params["layer"] + routed.last_unit * beside),
        "last_embedding": ceil(_last_embedding(task, layouts, per, params["embedding"], rest)),
        "carried": ceil(per.carried * params["layer"] + routed.carried * beside),
        "carried_first": ceil(per.carried * params["embedding"]),
    }
    for source in frozen.sources(task, layouts)[1:]:
        for name, n_bytes in _frozen_states(source, layouts).items():
            result[name] = result[name] + n_bytes
    return result


def _last_embedding(task: Task, layouts: LayoutArray, per: memory.StateBytes, table: Floats, rest: Floats) -> Floats:
    """Bytes of the embedding's gradient when backward ends. Over tp it is made whole and split, then FSDP2 reduces the share.

    Bare parameters keep it whole, summed in fp32 over several micro-batches, while their share is copied out of it.
    """
    each = np.where(memory.alone(task, layouts) & (layouts.microbatches > 1), 4.0, task.job.compute_bytes)
    return np.maximum(per.last_unit * table, np.where(rest > 0, each * (rest + table), 0.0))


def pooled_bytes(task: Task, ranks: LayoutArray, index: Ints, counts: Ints) -> Ints:
    """Bytes that count in a rank's backward but are only kept by the allocator (`ZeroRule.pooled`).

    `ranks` has each rank's layout, `index` its place in the pipeline, `counts` [ranks, kinds] its layers by kind.
    """
    first, last = ends(ranks.schedule, ranks.pp, index)
    kinds = [task] if task.model.homogeneous else [task.only(k) for k in range(len(task.model.kinds))]
    total = np.zeros(len(ranks))
    for i, kind in enumerate(kinds):
        params = frozen.trained_params(kind, ranks)
        per, routed = (memory.state_bytes(kind, ranks, shard).pooled for shard in (ranks.shard, ranks.expert_shard))
        total = total + counts[:, i] * (per * params["layer"] + routed * params["experts"])
        if i == task.model.text_kind:
            place = params_by_place(params)
            total = total + per * (first * place["first"] + last * place["last"])
    return np.floor(total).astype(np.int64)


def mask_bytes(task: Task) -> float:
    """Bytes of the mask of a window or of chunks, where an engine has one; layers of one kind share it."""
    s = task.job.seq_len
    local = task.model.layer.attention.keys_of(s) < s
    return task.accounting.mask_elements * task.job.compute_bytes * s * s if local else 0.0


def first_gradients(task: Task, layouts: LayoutArray) -> tuple[Floats | float, float]:
    """Shares of a layer's parameters, and of its routed experts', whose gradients exist at the peak of its temporaries: of the
    MLP's last matrix, or of the experts' last ones beside the whole shared one, whose backward comes before."""
    mlp, params = task.model.layer.mlp, memory.rank_params(task, layouts)["layer"]
    matrix = mlp.dense_width * task.model.hidden / layouts.tp
    matrices = 3 if mlp.kind == "gated" else 2
    return (matrices if mlp.routed else 1) * matrix / params, 1.0 / matrices


def _finishing(
    task: Task,
    layouts: LayoutArray,
    params: dict[str, Floats],
    per: memory.StateBytes,
    routed: memory.StateBytes,
    rest: Floats,
    beside: Floats,
) -> dict[str, Ints]:
    """Bytes of units whose backward ends: of a layer, of the head, of the embedding. 0 where a rule has no such moment.

    The embedding's gradient closes each micro-batch's backward (`between`: under ZeRO 2 and 3 its reduction, or the next
    gather of the table beside it), and its reduction begins when whole accumulated gradients are reduced (`closing`).
    """
    experts, head, table = params["experts"], params["own_head"] + params["norm"], params["embedding"]
    several = layouts.microbatches > 1
    ahead = per.ahead * params["layer"] + routed.ahead * beside
    # A pipeline's whole gradients are reduced after its backwards.
    later = several & (layouts.pp > 1)
    done, done_routed = (np.where(later & (x.carried == 0), x.own, x.finish - x.released) for x in (per, routed))
    # When experts by themselves are reduced, their layer's attention is still to come.
    attention = memory.attention_bytes(task, layouts) if task.accounting.experts_join else 0.0
    # Backward still has the gradient of an expert's last matrix when the reduced ones are made, and beside copies of them all
    # where they are put in another order: FSDP2 splits widths when its ranks do not divide the experts.
    mlp = task.model.layer.mlp
    last = routed.own / (3.0 if mlp.kind == "gated" else 2.0)
    ordered = (mlp.experts or 0) % (layouts.ep * layouts.expert_shard) == 0
    less = np.where(ordered, np.minimum(routed.reduced, routed.own - last), np.minimum(routed.reduced, routed.own) - last)
    done_alone = done_routed - np.where(routed.reduced > 0, less, 0.0)
    own = np.where((beside < experts) & (done_routed > 0), done_alone * experts + attention, 0.0)
    joint = np.maximum(done * params["layer"] + done_routed * beside, 0)
    spared = np.minimum(_spared(task, layouts, (per, routed), (params["layer"], experts)), np.maximum(own - joint, 0))
    loss = memory.logit_gradient_bytes(task, layouts)
    # What the micro-batch before left to be reduced lives until the head's own reduction.
    left = per.carried * np.where(layouts.pp == 1, table, params["layer"])
    made = np.where(per.own > 0, (per.own + per.head) * params["head"] + ahead + left + loss, 0.0)
    whole = task.job.compute_bytes * rest * (per.own > 0)
    each = np.maximum(per.finish * table + whole, per.again * table)
    between = np.where(per.carried > 0, each, per.own * table + whole)
    closing = np.where(per.carried > 0, 0.0, (per.finish - per.released) * table)
    return {
        "finish": ceil(np.maximum(joint, own) + ahead),
        "spared": np.floor(spared[0]).astype(np.int64),
        "spared_late": np.floor(spared[1]).astype(np.int64),
        "head_finish": ceil(np.maximum(np.where(per.finish > 0, done * head, 0.0) + ahead, made)),
        "between": ceil(np.where(several, between, 0.0)),
        "closing": ceil(np.where(several, np.maximum(closing, 0.0), 0.0)),
    }


def _spared(
    task: Task, layouts: LayoutArray, per: tuple[memory.StateBytes, memory.StateBytes], params: tuple[Floats, Floats]
) -> Floats:
    """What is never there together at the end of a backward of experts, of two micro-batches without a pipeline: the first
    one has no reduced gradients of layers to come, the last one frees the experts' copies. Shape (2, layouts): at the first
    layer of a backward and at the last one, which lacks its own alone but has no activations of others beside it.
    """
    _, routed = per
    twice = (layouts.microbatches == 2) & (layouts.pp == 1) & (not task.one_of_several)
    held = sum((x.backward["grads"] * n for x, n in zip(per, params, strict=True)), np.zeros(len(layouts)))
    kept = (routed.backward["params"] - routed.update["params"]) * params[1]  # a copy that stays between micro-batches
    copy = np.where(twice & (routed.carried > 0), kept, 0.0)
    return np.stack([np.minimum(copy, task.model.n_layers * held), np.minimum(copy, held)])


def _frozen_states(source: frozen.Source, layouts: LayoutArray) -> dict[str, Ints]:
    """Bytes of frozen weights, beside those of the trained ones: the same while micro-batches and while the optimizer run."""
    task, counts, place = source.task, source.counts, params_by_place(source.counts)
    per = memory.state_bytes(task, layouts, layouts.shard)
    routed = memory.state_bytes(task, layouts, layouts.expert_shard)
    held, held_routed = per.backward["params"], routed.backward["params"]
    layer, first, last = (
        ceil(held * place["layer"] + held_routed * counts["experts"]),
        held * place["first"],
        held * place["last"],
    )
    gathered = per.unit * counts["layer"] + routed.unit * counts["experts"]
    return {
        "state": layer, "updating": layer,
        "state_first": ceil(first), "updating_first": ceil(first),
        "state_last": ceil(last), "updating_last": ceil(last),
        "unit": ceil(gathered + adapters.dequantised_bytes(task, layouts)),
        "head_unit": ceil(per.head * counts["head"]),
    }  # fmt: skip


def embedding_rest(task: Task, layouts: LayoutArray) -> Floats:
    """Parameters of the embedding on other ranks of the tp group, where its gradient is made whole before it is split."""
    split = task.model.embedding_params + (task.model.position_params if task.accounting.positions_split else 0)
    rest, adapter = split - split / layouts.tp, task.job.adapter
    whole = task.accounting.embedding_gradient_whole and (adapter is None or adapter.train_embeddings)
    return rest if whole else np.zeros(len(layouts))
