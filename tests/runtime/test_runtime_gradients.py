"""Every layout computes the loss and every parameter's gradient of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import pytest
import torch

ALL = [(n, name) for n, group in cases.CASES.items() for name in group]
SLOW = [pytest.param(n, name, marks=pytest.mark.slow, id=f"{n}-{name}") for n, group in cases.SLOW.items() for name in group]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("processes", "name"), [*(pytest.param(*case, id="-".join(map(str, case))) for case in ALL), *SLOW])
def test_layout_equals_one_process(jobs: Any, references: Path, processes: int, name: str) -> None:
    ranks = jobs.get(processes, name)
    for rank in ranks:
        assert "error" not in rank, rank["error"]
    model, options = cases.EVERY[processes][name]
    _, wanted = torch.load(references / f"{model}.pt")
    assert set().union(*(rank["names"] for rank in ranks)) == set(wanted), "parameters are missing"
    bf16 = options.get("precision") == "bf16"
    for rank in ranks:
        assert rank["gradient"] < (4e-2 if bf16 else 1e-5), rank["worst"]
        for key in ("first", "norm", "second"):
            assert rank[key] < (2e-2 if bf16 else 1e-5), key
