"""`planner measure` as a user runs it: on CPUs, and with wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from planner.cli.main import app
from planner.specs.files import load_hardware
from tests.command import planner


def test_cpu_processes_give_a_profile_that_plans(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    words = ("--device", "cpu", "--devices", "2", "--budget", "1")
    result = planner("measure", *words, "--out", "mine.yaml", "--raw", "raw", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert "collectives" in result.stderr  # progress
    found = load_hardware(str(tmp_path / "mine.yaml"))[0]
    assert (found.name, found.device.kind, found.node_size) == ("mine", "cpu", 2)
    provenances = {found.device.peak["fp32"].provenance, found.device.launch.provenance, found.network[0].latency.provenance}
    assert provenances <= {"measured", "fitted"}
    flags = ("--nodes", "1", "--seq-len", "128", "--global-batch", "8", "--precision", "fp32", "--engine", "bundled")
    planned = planner("plan", "tiny", "--hardware", "mine.yaml", *flags, "--format", "json", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["estimate"]["step_time_s"] > 0
    again = planner("measure", "--from-raw", "raw", "--name", "mine", cwd=tmp_path)
    assert again.stdout == (tmp_path / "mine.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--device", "tpu"), "PLN107"),
        (("--budget", "0"), "PLN645"),
        (("--device", "cpu", "--devices", "1"), "PLN641"),
        (("--from-raw", "nowhere"), "PLN644"),
        (("--device", "cpu", "--base", "h100-sxm"), "PLN646"),
        (("--device", "cpu", "--devices", "2", "--node-size", "3"), "PLN647"),
        (("--device", "cpu", "--devices", "2", "--node-size", "4"), "PLN642"),
        (("--base", "no-such-profile"), "PLN110"),
        (("--out", "no/such/folder/x.yaml"), "PLN113"),
    ],
)
def test_bad_input_is_one_line_before_any_work(words: tuple[str, ...], code: str) -> None:
    pytest.importorskip("torch")
    result = CliRunner().invoke(app, ["measure", *words])
    assert result.exit_code == 2, result.output
    assert code in result.stderr.splitlines()[0]
    assert result.stdout == ""
