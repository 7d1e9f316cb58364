"""The wheel carries profiles and models, and an editable install finds those of the checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = (
    "from planner.specs import files; import planner; "
    "print(files.data_folder('models')); print(files.data_folder('hardware_profiles')); "
    "print(len(files.shipped('models')), len(files.shipped('hardware_profiles'))); "
    "print(planner.load_model('llama3-8b').total_params)"
)


def shipped() -> str:
    return f"{len(list((ROOT / 'examples/models').glob('*.yaml')))} {len(list((ROOT / 'hardware_profiles').glob('*.yaml')))}"


def test_this_install_finds_the_checkout():
    out = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60, check=True
    ).stdout.splitlines()
    assert out[2:] == [shipped(), "8030261248"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("editable", [False, True])
def test_a_fresh_environment(tmp_path, editable):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    words = ["-e", str(ROOT)] if editable else [str(ROOT)]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *words], check=True, timeout=600)
    out = subprocess.run(
        [python, "-c", CODE], capture_output=True, text=True, cwd=tmp_path, timeout=60, check=True
    ).stdout.splitlines()
    assert out[2:] == [shipped(), "8030261248"]
    inside = str(tmp_path) in out[0] and str(tmp_path) in out[1]
    assert inside is not editable
    planner = tmp_path / "env" / "bin" / "planner"
    words = ["plan", "llama3-8b", "--hardware", "h100-sxm", "--nodes", "1", "--seq-len", "4096", "--global-batch", "32"]
    assert (
        subprocess.run([planner, *words, "-o", tmp_path / "plan.json"], cwd=tmp_path, timeout=60, check=False).returncode == 0
    )
    # Without the runtime extra the plan does not run, and the message says how to get it.
    run = subprocess.run(
        [planner, "run", tmp_path / "plan.json"], capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False
    )
    assert (run.returncode, "planner[runtime]" in run.stderr) == (5, True)
