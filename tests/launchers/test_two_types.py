"""Launch files of a plan for two device types: node ranks follow the stages, Slurm is told which nodes are which."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import planner
from launchers.test_files import SETTINGS, run_with_a_stub
from planner.errors import InputError
from planner.launchers import slurm, torchrun
from planner.launchers.common import node_ranges, write
from planner.planfile import Plan

NAMED = {"constraint": "h100", "second-constraint": "a100"}


@cache
def plan_for(order: str) -> Plan:
    shares = [("h100-sxm", 2), ("a100-80gb-sxm", 1)]
    pins = {"type_order": order, "tp": 8, "micro_batch": 1, "schedule": "1f1b"}
    return planner.plan("llama3-8b", shares, seq_len=2048, global_batch=48, pin=pins, alternatives=1)


@pytest.mark.parametrize(("order", "first"), [("as-named", "h100-sxm"), ("reversed", "a100-80gb-sxm")])
def test_node_ranks_follow_the_stages(order, first, tmp_path):
    plan = plan_for(order)
    a, b = node_ranges(plan)
    assert a.type.hardware == first == plan.estimate.memory.stages[0].hardware
    assert (a.first, a.last, b.first, b.last) == ((0, 1, 2, 2) if first == "h100-sxm" else (0, 0, 1, 2))
    files = write([*torchrun.emit(plan, SETTINGS), *slurm.emit(plan, SETTINGS, NAMED)], tmp_path / "files", force=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    for path in files:
        if path.suffix == ".json":
            continue
        checked = subprocess.run([shellcheck, "-S", "style", path], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout
        assert f"# {a.text}\n# {b.text}\n" in path.read_text()
    words = run_with_a_stub(tmp_path / "files" / "launch.sh", tmp_path, NODE_RANK="2", MASTER_ADDR="host")
    assert words[words.index("--nnodes") + 1] == "3"
    script = (tmp_path / "files" / "job.sbatch").read_text()
    before, after = script.split("#SBATCH hetjob\n")
    own, other = ("h100", "a100") if order == "as-named" else ("a100", "h100")
    assert f"--nodes={a.type.nodes}\n" in before
    assert f"--constraint={own}\n" in before
    assert f"--nodes={b.type.nodes}\n" in after
    assert f"--constraint={other}\n" in after
    assert '--nnodes "3" --node-rank "$SLURM_PROCID"' in script


def test_a_node_of_the_other_type_is_named(tmp_path):
    plan = plan_for("as-named")
    write(torchrun.emit(plan, SETTINGS), tmp_path / "files", force=True)
    stub = tmp_path / "bin"
    stub.mkdir()
    for name, text in (("python3", "exit 0"), ("nvidia-smi", "echo NVIDIA H100 80GB HBM3")):
        (stub / name).write_text(f"#!/bin/bash\n{text}\n")
        (stub / name).chmod(0o755)
    said = []
    for rank in "02":
        env = {"PATH": f"{stub}:/usr/bin:/bin", "NODE_RANK": rank, "MASTER_ADDR": "host"}
        script = tmp_path / "files" / "launch.sh"
        said.append(subprocess.run(["bash", script], env=env, capture_output=True, text=True, check=True).stderr)
    assert said[0] == ""
    assert "node rank 2 holds the stages for NVIDIA A100" in said[1]


def test_slurm_must_tell_the_types_apart():
    plan = plan_for("as-named")
    for options in ({}, {"partition": "gpu"}, {"constraint": "x", "second-constraint": "x"}):
        with pytest.raises(InputError, match="PLN158"):
            slurm.emit(plan, SETTINGS, options)
    with pytest.raises(InputError, match="second-time"):
        slurm.emit(plan, SETTINGS, {**NAMED, "second-time": "1"})
