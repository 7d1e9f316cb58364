"""Every layout computes the loss and every parameter's gradient of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import pytest
import torch

ALL = [
    pytest.param(n, name, id=f"{n}-{name}", marks=[pytest.mark.slow] if cases.is_slow(name) else [])
    for n, group in cases.CASES.items()
    for name in group
]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("processes", "name"), ALL)
def test_layout_equals_one_process(jobs: Any, references: Path, processes: int, name: str) -> None:
    ranks = jobs.get(processes, name)
    for rank in ranks:
        assert "error" not in rank, rank["error"]
    model, options = cases.CASES[processes][name]
    _, wanted = torch.load(references / f"{model}.pt")
    assert set().union(*(rank["names"] for rank in ranks)) == set(wanted), "parameters are missing"
    narrow = options.get("precision") in ("bf16", "fp16")
    for rank in ranks:
        assert rank["gradient"] < (4e-2 if narrow else 1e-5), rank["worst"]
        for key in ("first", "norm", "second"):
            assert rank[key] < (2e-2 if narrow else 1e-5), key
