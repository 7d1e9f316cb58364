"""Parameters, gradients and optimizer states of a rank as integers: bytes of a layer, and of what both ends hold besides."""

from __future__ import annotations

import numpy as np

from planner.cost import adapters, frozen, memory
from planner.cost.rounding import ceil
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
    backward, update = sum(per.backward.values(), zeros), sum(per.update.values(), zeros)
    place, experts = params_by_place(params), params["experts"]
    more = {"state": sum(routed.backward.values(), zeros) * experts, "updating": sum(routed.update.values(), zeros) * experts}
    result = {}
    for name, suffix in (("layer", ""), ("first", "_first"), ("last", "_last")):
        result[f"state{suffix}"] = ceil(backward * place[name] + (0 if suffix else more["state"]))
        result[f"updating{suffix}"] = ceil(update * place[name] + (0 if suffix else more["updating"]))
    beside_head = ceil(per.resident * params["head"])
    result["state_last"] += beside_head
    result["updating_last"] += beside_head
    rest = embedding_rest(task, layouts)
    result["state_first"] += ceil(per.whole_gradients * rest)
    result |= {
        # Weight-gradient buffers exist once for each shape: one expert stands for all.
        "fixed": ceil(per.resident * (params["layer"] + params["expert"]) + task.hardware.device.workspace.base),
        "unit": ceil(per.unit * params["layer"] + routed.unit * experts),
        "reduction": ceil(per.unit_reduction * params["layer"] + routed.unit_reduction * experts),
        "head_unit": ceil(per.head * params["head"]),
        "head_reduction": ceil(per.head_reduction * params["head"]),
        "last_reduction": ceil(per.last_reduction * params["layer"] + routed.last_reduction * experts),
        "last_layer": ceil(per.last_unit * params["layer"] + routed.last_unit * experts),
        "last_embedding": ceil(per.last_unit * params["embedding"] + task.job.compute_bytes * rest),
        "carried": ceil(per.carried * params["layer"] + routed.carried * experts),
        "carried_first": ceil(per.carried * params["embedding"]),
    }
    for source in frozen.sources(task, layouts)[1:]:
        for name, n_bytes in _frozen_states(source, layouts).items():
            result[name] = result[name] + n_bytes
    return result


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
    rest, adapter = task.model.embedding_params - task.model.embedding_params / layouts.tp, task.job.adapter
    whole = task.accounting.embedding_gradient_whole and (adapter is None or adapter.train_embeddings)
    return rest if whole else np.zeros(len(layouts))
