"""A checkpoint of one plan resumes under others, and the next losses are those of the run that was not interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import HERE, launch


def job(directory: Path, processes: int, *names: str) -> dict[str, list[float]]:
    done = launch([str(HERE / "resuming.py"), str(processes), str(directory), *names], 800)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[float]] = json.loads((directory / f"losses-{processes}.json").read_text())
    return found


def same(found: list[float], wanted: list[float]) -> None:
    assert found == pytest.approx(wanted, rel=2e-6)


@pytest.mark.timeout(1200)
def test_resumes_under_other_plans(tmp_path: Path) -> None:
    names = ["dp2-zero3", "tp2", "pp2-interleaved"]
    two = job(tmp_path, 2, "save:dp2-zero3", *names)
    whole = two.pop("save:dp2-zero3")
    assert two["dp2-zero3"] == whole[3:], "under its own plan to the last bit"
    for name in names:
        same(two[name], whole[3:])
    same(job(tmp_path, 1, "one")["one"], whole[3:])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_resumes_across_eight_four_and_one_process(tmp_path: Path) -> None:
    eight = "tp2-pp2-dp2-interleaved-zero3"
    saved = job(tmp_path, 8, f"save:{eight}", eight)
    whole = saved[f"save:{eight}"]
    assert saved[eight] == whole[3:]
    four = job(tmp_path, 4, "dp4-zero3", "tp2-dp2-zero2", "pp4", "pp2-dp2-zero3")
    two = job(tmp_path, 2, "pp2", "dp2-zero0")
    for losses in [*four.values(), *two.values(), *job(tmp_path, 1, "one").values()]:
        same(losses, whole[3:])
