"""Tables of runs for tests: rows as a user would write them, and runs made by the model itself."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LLAMA8B: dict[str, Any] = {
    "row_id": "1", "source": "mine", "row_kind": "e2e", "quality": "A", "hardware": "H100-80GB", "hw_class": "H100-80",
    "gpus": 16, "gpus_per_node": 8, "framework": "Megatron-LM", "model_name": "Llama 3 8B", "layers": 32, "hidden": 4096,
    "ffn_hidden": 14336, "heads": 32, "kv_heads": 8, "vocab": 128256, "gated_mlp": 1, "tied_embeddings": 0,
    "seq_len": 8192, "tp": 2, "sp": 1, "pp": 1, "vpp": 1, "cp": 1, "dp": 8, "micro_batch": 1, "global_batch": 64,
    "recompute": "none", "precision": "bf16", "attention": "flash", "iteration_time_s": 4.0, "shard_stage": 1,
}  # fmt: skip

LAYOUTS = (
    {"tp": 1, "sp": 0, "dp": 16}, {"tp": 2, "dp": 8}, {"tp": 4, "dp": 4}, {"tp": 8, "dp": 2},
    {"tp": 2, "pp": 2, "dp": 4}, {"tp": 2, "pp": 4, "dp": 2}, {"tp": 1, "sp": 0, "pp": 2, "dp": 8},
    {"tp": 2, "dp": 8, "micro_batch": 2}, {"tp": 4, "dp": 4, "micro_batch": 2, "recompute": "full"},
    {"tp": 2, "pp": 4, "vpp": 2, "dp": 2, "recompute": "full"},
)  # fmt: skip


def row(**changes: Any) -> dict[str, Any]:
    """A row with some columns changed; None leaves one blank."""
    return {**LLAMA8B, **changes}


def rows_of_layouts() -> list[dict[str, Any]]:
    """One job under ten layouts."""
    return [row(row_id=str(i), **changes) for i, changes in enumerate(LAYOUTS)]


def write(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    """Write a table; the columns of the first row."""
    rows = list(rows)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: "" if v is None else v for k, v in r.items()} for r in rows)
    return str(path)
