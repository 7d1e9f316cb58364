"""Input that people really give, and signals: always a code, a place, an exit code that says what happened."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import one_line_error, planner
from machines import profile_data
from ruamel.yaml import YAML

import planner as api
from planner.errors import InfeasibleError, InputError
from planner.planning.make import make_plan
from planner.planning.request import Request
from planner.specs.job import Job

TINY = [
    "plan",
    "tiny",
    "--hardware",
    "local-cpu",
    "--gpus",
    "4",
    "--seq-len",
    "256",
    "--global-batch",
    "16",
    "--precision",
    "fp32",
]


def refused(code: str, **changes) -> str:
    """The message of a plan that cannot be asked for."""
    named = {"model": "tiny", "hardware": "local-cpu", "gpus": 4, "seq_len": 256, "global_batch": 16, "precision": "fp32"}
    with pytest.raises(InputError, match=code) as caught:
        api.plan(**{**named, **changes})
    return str(caught.value)


@pytest.mark.parametrize(("changes", "code"), [
    ({"pin": {"tp": 3}}, "PLN123"),
    ({"pin": {"tp": 8}, "forbid": ("tp",)}, "PLN123"),
    ({"pin": {"tp": "²"}}, "PLN122"),
    ({"pin": {"micro_batch": 10**20}}, "PLN122"),
    ({"pin": {"tp": []}}, "PLN123"),
    ({"forbid": "speed"}, "PLN121"),
    ({"gpus": 10**9}, "PLN131"),
    ({"gpus": 12}, "PLN131"),
    ({"gpus": 2.0}, "PLN107"),
    ({"gpus": "2"}, "PLN107"),
    ({"seq_len": 10**30}, "PLN107"),
    ({"seq_len": 2**30, "global_batch": 2**30}, "PLN133"),
    ({"model": "gpt-oss-120b"}, "PLN517"),
    ({"model": None}, "PLN107"),
    ({"alternatives": 0}, "PLN107"),
    ({"max_memory_fraction": float("nan")}, "PLN107"),
])  # fmt: skip
def test_impossible_requests(changes, code):
    refused(code, **changes)


def test_a_whole_job_rule_is_named_itself():
    message = refused("PLN215", model="gpt3-175b", hardware="h100-sxm", gpus=64, seq_len=4096, precision="bf16")
    assert "2048 learned positions" in message


def test_a_tiny_memory_fraction_ends_soon():
    with pytest.raises(InfeasibleError, match="PLN301"):
        api.plan("tiny", "local-cpu", gpus=4, seq_len=256, global_batch=16, precision="fp32", max_memory_fraction=1e-9)


@pytest.mark.parametrize("batch", [10**6, 10**8])
def test_huge_batches_are_planned(batch):
    job = Job(seq_len=16, global_batch=batch, precision="fp32")
    plan = make_plan(Request("tiny", "local-cpu", job, gpus=4, pins={"micro_batch": ["16"]}), 1)
    assert plan.certificate is not None
    assert plan.certificate.status == "optimal"


def test_a_plan_on_ones_own_hardware_is_self_contained(tmp_path):
    path = tmp_path / "mine.yaml"
    with path.open("w") as stream:
        YAML(typ="safe", pure=True).dump(profile_data(), stream)
    made = planner("plan", "llama3-8b", "--hw", str(path), "--nodes", "1", "--seq-len", "4096", "--global-batch", "32",
                   "-o", str(tmp_path / "plan.json"), "--format", "json")  # fmt: skip
    assert made.returncode == 0, made.stderr
    path.unlink()
    again = planner("estimate", "plan.json", "--format", "json", cwd=tmp_path)
    assert json.loads(again.stdout)["estimate"] == json.loads(made.stdout)["estimate"]
    assert planner("check", "plan.json", cwd=tmp_path).returncode == 0
    one_line_error(planner("estimate", "plan.json", "--tp", "2", cwd=tmp_path), "PLN107")


def test_output_goes_where_it_is_told(tmp_path):
    target = tmp_path / "real.json"
    target.write_text("old")
    link = tmp_path / "link.json"
    link.symlink_to(target)
    assert planner(*TINY, "-o", str(link)).returncode == 0
    assert link.is_symlink()
    assert json.loads(target.read_text())["format"] == "planner.plan"
    assert planner(*TINY, "-o", "/dev/null").returncode == 0
    assert not Path("/dev/null").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.json", "real.json"]


HF = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 512,
}  # fmt: skip


@pytest.mark.parametrize("changes", [
    {"hidden_act": "xielu"}, {"num_local_experts": 8}, {"num_hidden_layers": 10**9}, {"tie_word_embeddings": "no"},
    {"partial_rotary_factor": 0.5}, {"hidden_size": 10**400}, {"num_attention_heads": "4"}, {"num_attention_heads": 0},
    {"rope_parameters": [1]}, {"rms_norm_eps": "x"}, {"model_type": ["llama"]}, {"model_type": None},
])  # fmt: skip
def test_hugging_face_configs_are_never_guessed(tmp_path, changes):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**HF, "architectures": ["X"], **changes}))
    with pytest.raises(InputError, match=r"PLN1\d\d"):
        api.load_model(str(path))
    path.write_text(json.dumps({**HF, "rms_norm_eps": None, "hidden_act": "silu"}))
    assert api.load_model(str(path)).total_params > 0


ALIASES = ["a", *(f"b{i}" for i in range(8))]
BOMB = "a: &a [1]\n" + "".join(f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in itertools.pairwise(ALIASES))


@pytest.mark.parametrize(("text", "code"), [
    ("", "PLN103"), ("- 1\n", "PLN103"), ("a: [1\n", "PLN102"), ("a: 1\na: 2\n", "PLN102"), ("\tname: x\n", "PLN102"),
    ("%YAML 1.1\n---\nname: no\n", "PLN102"), ("1: 2\n", "PLN106"), ("name: \x00\n", "PLN102"), ('name: "a\\nb"\n', "PLN10"),
    (BOMB, "PLN102"),
    ("name: x\nhidden: 1" + "0" * 30 + "\nvocab: 8\nlayers: []\n", "PLN107"),
    ("name: x\nhidden: .inf\nvocab: 8\nlayers: []\n", "PLN10"),
])  # fmt: skip
def test_odd_yaml(tmp_path, text, code):
    path = tmp_path / "model.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        api.load_model(str(path))
    assert all(p.location.file == str(path) and p.location.line >= 1 for p in caught.value.problems)
    assert any(p.code.startswith(code) for p in caught.value.problems), caught.value


def test_deep_json(tmp_path):
    path = tmp_path / "model.json"
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match="PLN102"):
        api.load_model(str(path))
    with pytest.raises(InputError, match="PLN101"):
        api.load_model(str(tmp_path) + "/")


def test_merge_keys_are_read(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text(
        "name: x\nhidden: 64\nvocab: 128\nlayers:\n  - &one {count: 1, attention: {heads: 4}, mlp: {kind: gelu, width: 8}}\n"
        "  - {<<: *one, count: 2}\n"
    )
    assert api.load_model(str(path)).n_layers == 3


def test_an_ascii_terminal_and_a_full_disk():
    assert planner(*TINY, PYTHONIOENCODING="ascii").returncode == 0
    if os.path.exists("/dev/full"):
        command = " ".join([sys.executable, "-m", "planner", *TINY]) + " > /dev/full"
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 2
        assert "could not be written" in result.stderr


def test_run_looks_before_it_starts(tmp_path):
    assert planner(*TINY, "-o", str(tmp_path / "plan.json")).returncode == 0
    short = tmp_path / "short.bin"
    short.write_bytes(b"\x00" * 11)
    for words in (["--data", "gone.bin"], ["--data", str(short)], ["--data", str(tmp_path)]):
        one_line_error(planner("run", "plan.json", *words, cwd=tmp_path), "PLN593")
    one_line_error(planner("run", "plan.json", "--out", "/proc/nowhere", cwd=tmp_path), "PLN113")


def test_run_refuses_flags_that_cannot_work(tmp_path):
    assert planner(*TINY, "-o", str(tmp_path / "plan.json")).returncode == 0
    for words, code in (
        (["--eval-every", "5"], "PLN623"),
        (["--init-from", str(tmp_path)], "PLN621"),
        (["--lr-schedule", "sine"], "PLN107"),
        (["--max-norm", "0"], "PLN107"),
    ):
        one_line_error(planner("run", "plan.json", *words, cwd=tmp_path), code)
