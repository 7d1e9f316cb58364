"""The programs that run plans on GPUs, on CPU processes: what they write, and how a plan that cannot run is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import planner
from tests.validation import choices

TRIALS = Path(__file__).with_name("trials.py")


@pytest.mark.timeout(200)
def test_plans_run_one_after_another(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    for name, gpus, engine in (("one", 1, "bundled"), ("two", 2, "bundled+bf16-states"), ("priced", 1, "bundled+2021")):
        plan = planner.plan("tiny", "local-cpu", gpus=gpus, engine=engine, seq_len=64, global_batch=4, alternatives=1)
        (tmp_path / f"{name}.json").write_text(plan.to_json())
    names = ("one", "two", "priced")
    words = [sys.executable, str(TRIALS), str(tmp_path / "out"), *(str(tmp_path / f"{name}.json") for name in names)]
    done = subprocess.run([*words, "--steps", "4"], capture_output=True, text=True, timeout=180, check=False)
    results = {r["name"]: r for r in json.loads((tmp_path / "out" / "results.json").read_text())}
    assert done.returncode == 1
    assert all(results[name]["step_time_s"] > 0 and "error" not in results[name] for name in ("one", "two")), done.stdout
    assert len(results["two"]["allocated_gib"]) == 2
    assert "PLN502" in results["priced"]["error"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["results.json"]


def test_a_task_has_its_pick_and_eight_others() -> None:
    found = [plan.layout for plan in choices.plans("1b-4k")]
    assert len(found) == 1 + choices.OTHERS
    assert all(layout not in found[:i] for i, layout in enumerate(found))
