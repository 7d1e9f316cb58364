"""Runs of the bundled runtime as rows of a table of runs: written by `planner run --measure`, read like any other row.

The columns describe a run to people and other tools. Predictions take the plan that lies in column `plan`, which says
more than columns can: layers and recompute of each stage, and the hardware profile that was planned with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from planner.errors import input_error
from planner.planfile import Plan
from planner.specs import files
from planner.specs.hardware import HardwareProfile

FORMAT = "planner.measurement"


def measurement(plan: Plan, summary: dict[str, Any]) -> dict[str, Any]:
    """What `--measure` adds to the comparison: a format name and the run's rows."""
    return {"format": FORMAT, "version": 1, "runs": [row_of(plan, summary)]}


def row_of(plan: Plan, summary: dict[str, Any]) -> dict[str, str]:
    """A run as a row, from its plan and the runtime's summary.json. Blank is not measured."""
    x, model, job, layer = plan.layout, plan.model, plan.job, plan.model.layer
    allocated = [v for v in summary["peak_allocated_gib"] if v is not None]
    modes = {s.recompute for s in x.stages}
    values: dict[str, Any] = {
        "source": "planner run", "quality": "A", "framework": "planner", "hardware": plan.cluster.hardware,
        "framework_version": f"planner {plan.planner}, torch {summary['torch_version']}", "device": summary["device"],
        "model_name": model.name, "layers": model.n_layers, "hidden": model.hidden, "heads": model.heads,
        "kv_heads": model.kv_heads, "head_dim": model.head_dim, "ffn_hidden": layer.mlp.width, "vocab": model.vocab,
        "gated_mlp": int(layer.mlp.kind == "gated"), "tied_embeddings": int(model.tied_embeddings),
        "seq_len": job.seq_len, "global_batch": job.global_batch, "precision": job.precision,
        "gpus": plan.cluster.gpus, "tp": x.tp, "cp": x.cp, "pp": x.pp, "dp": x.dp, "ep": x.ep, "vpp": x.virtual_stages,
        "sp": int(x.sequence_parallel), "shard_stage": x.zero, "micro_batch": x.micro_batch,
        "recompute": modes.pop() if len(modes) == 1 else "mixed",
        "iteration_time_s": repr(summary["step_time_s"]), "tokens_per_s_per_gpu": repr(summary["tokens_per_s_per_gpu"]),
        "peak_memory_gib": repr(max(allocated)) if allocated else "", "memory_kind": "allocated" if allocated else "",
        "plan_digest": plan.digest, "plan": plan.to_json(),
    }  # fmt: skip
    return {name: str(value) for name, value in values.items()}


def is_measurement(path: str) -> bool:
    """Whether a path names measurements: a .json file, or a folder of them."""
    return path.endswith(".json") or Path(path).is_dir()


def read(path: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(number, row) of a measurement, or of every .json of a folder, in the order of their names. Raises InputError."""
    number = 0
    for file in sorted(Path(path).glob("*.json")) if Path(path).is_dir() else [Path(path)]:
        try:
            data = json.loads(files.read_text(str(file)))
            if data.get("format") != FORMAT:
                raise ValueError
            rows = [{str(k): str(v) for k, v in row.items()} for row in data["runs"]]
        except (ValueError, KeyError, AttributeError, TypeError):
            fix = "give what `planner run PLAN --measure FILE` wrote, or a CSV table"
            raise input_error("PLN141", f"{file} is no measurement", "it does not have its format", fix) from None
        for row in rows:
            number += 1
            yield number, row
    if not number:
        raise input_error("PLN141", f"{path} holds no measurement", "", "write some with planner run PLAN --measure FILE")


@lru_cache(maxsize=64)
def plan_of(text: str) -> Plan:
    """The plan of a row's column. Raises InputError when it was changed."""
    try:
        data = json.loads(text)
        data.pop("digest", None)
        return Plan.model_validate_json(json.dumps(data))
    except ValueError:
        raise input_error("PLN141", "a row's plan cannot be read", "it was cut or edited", "measure the run again") from None


def hardware_of(row: dict[str, str]) -> HardwareProfile | None:
    """The profile that a measured run was planned with; None for other rows."""
    return plan_of(row["plan"]).hardware if row.get("plan") else None
