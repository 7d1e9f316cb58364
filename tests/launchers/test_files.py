"""Emitted files go through the real tools: bash, shellcheck, torchrun's own parser, and a shell that runs them."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import planner
from planner.errors import InputError
from planner.launchers import slurm, torchrun
from planner.launchers.common import RunSettings, write
from planner.specs.training import Options
from planner.specs.training import words as words_of

SETTINGS = RunSettings(steps=7, out="runs/a b", data=("/data/it's here.bin",), seed=3, lr=1e-4, save_every=50, max_restarts=2)


@pytest.fixture(scope="module")
def plans():
    many = planner.plan("llama3-8b", "h100-sxm", nodes=2, seq_len=2048, global_batch=64, alternatives=1)
    one = planner.plan("tiny", "local-cpu", gpus=4, seq_len=256, global_batch=16, precision="fp32", alternatives=1)
    return {"many": many, "one": one}


def emitted(plan, tmp_path: Path, options: dict[str, str] | None = None) -> dict[str, Path]:
    files = [*torchrun.emit(plan, SETTINGS), *slurm.emit(plan, SETTINGS, options or {})]
    return {p.name: p for p in write(files, tmp_path / "launch files", force=False)}


@pytest.mark.parametrize("which", ["many", "one"])
def test_scripts_are_clean(plans, which, tmp_path):
    files = emitted(plans[which], tmp_path, {"partition": "gpu", "time": "01:00:00"})
    shellcheck = Path(sys.executable).with_name("shellcheck")
    for name in ("launch.sh", "job.sbatch"):
        assert files[name].stat().st_mode & stat.S_IXUSR
        assert subprocess.run(["bash", "-n", files[name]], check=False).returncode == 0
        checked = subprocess.run([shellcheck, "-S", "style", files[name]], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout
    assert planner.load_plan(str(files["plan.json"])).to_json() == plans[which].to_json()


def run_with_a_stub(script: Path, tmp_path: Path, **environment: str) -> list[str]:
    """Run a script with a `python3` that prints its arguments, one a line."""
    stub = tmp_path / "bin" / "python3"
    stub.parent.mkdir(exist_ok=True)
    stub.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    env = {"PATH": f"{stub.parent}:{os.environ['PATH']}", **environment}
    result = subprocess.run(["bash", script], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def parsed(arguments: list[str]):
    """What torchrun's own parser makes of the arguments after `-m torch.distributed.run`."""
    run = pytest.importorskip("torch.distributed.run")
    assert arguments[:2] == ["-m", "torch.distributed.run"]
    args = run.parse_args(arguments[2:])
    assert (args.module, args.training_script) == (True, "planner.runtime.train")
    assert args.training_script_args[:3] == ["plan.json", "--steps", "7"]
    assert SETTINGS.out in args.training_script_args
    assert (args.max_restarts, "--save-every" in args.training_script_args) == (2, True)
    assert SETTINGS.data[0] in args.training_script_args
    return args


def test_one_node(plans, tmp_path):
    args = parsed(run_with_a_stub(emitted(plans["one"], tmp_path)["launch.sh"], tmp_path))
    assert (args.nproc_per_node, args.nnodes, args.standalone) == ("4", "1", True)


def test_two_nodes_keep_their_order(plans, tmp_path):
    script = emitted(plans["many"], tmp_path)["launch.sh"]
    args = parsed(run_with_a_stub(script, tmp_path, NODE_RANK="1", MASTER_ADDR="10.0.0.1"))
    assert (args.nproc_per_node, args.nnodes, args.node_rank, args.master_addr) == ("8", "2", 1, "10.0.0.1")
    assert args.rdzv_backend == "static"
    missing = subprocess.run(["bash", script], capture_output=True, text=True, env={"PATH": os.environ["PATH"]}, check=False)
    assert missing.returncode != 0
    assert "NODE_RANK" in missing.stderr


def test_slurm(plans, tmp_path):
    script = emitted(plans["many"], tmp_path, {"partition": "gpu", "account": "llm"})["job.sbatch"]
    text = script.read_text()
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", text, re.MULTILINE))
    assert directives["nodes"] == "2"
    assert directives["gpus-per-node"] == "8"
    assert (directives["ntasks-per-node"], directives["partition"], directives["account"]) == ("1", "gpu", "llm")
    for name, body in (("scontrol", "printf 'n%s\\n' 1 2"), ("srun", 'shift; exec "$@"')):
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f"#!/bin/bash\n{body}\n")
        tool.chmod(0o755)
    slurm_environment = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "77", "SLURM_NNODES": "2", "SLURM_NODEID": "1"}
    args = parsed(run_with_a_stub(script, tmp_path, SLURM_SUBMIT_DIR=str(tmp_path), **slurm_environment))
    assert (args.nproc_per_node, args.nnodes, args.node_rank, args.master_addr) == ("8", "2", 1, "n1")
    assert args.master_port == 20077


def test_no_flag_of_the_runtime_is_taken_for_torchruns():
    """torchrun completes prefixes of its own flags in what follows the script: an ambiguous one would end the job."""
    run = pytest.importorskip("torch.distributed.run")
    from planner.runtime.command import arguments

    changed = {
        name: not field.default if isinstance(field.default, bool) else ("a:0.5", "b") if isinstance(field.default, tuple)
        else "wsd" if name == "lr_schedule" else "word" if isinstance(field.default, str) else field.default + 1
        for name, field in Options.model_fields.items() if name != "min_lr"
    }  # fmt: skip
    options = Options(**changed, min_lr=0.5)
    args = run.parse_args(["-m", "planner.runtime.train", "plan.json", *words_of(options)])
    assert args.training_script_args == ["plan.json", *words_of(options)]
    assert arguments(args.training_script_args) == (Path("plan.json"), options)


def test_unknown_slurm_option(plans):
    with pytest.raises(InputError, match="PLN505"):
        slurm.emit(plans["many"], SETTINGS, {"partitoin": "gpu"})


def test_arguments_survive_quoting(plans, tmp_path):
    line = next(
        t for t in emitted(plans["one"], tmp_path)["launch.sh"].read_text().splitlines() if "planner.runtime.train" in t
    )
    words = shlex.split(line.replace('"$@"', ""))
    assert words[words.index("--data") + 1] == SETTINGS.data[0]
