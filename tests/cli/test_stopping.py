"""Time limits and signals end a command with the best plan so far, or a line that says there is none: never a traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from command import planner

GPT3 = ["plan", "gpt3-175b", "--hw", "a100-80gb-sxm", "--gpus", "1024", "--seq-len", "2048", "--global-batch", "1536",
        "--engine", "megatron"]  # fmt: skip
INTERRUPTED = {signal.SIGINT: "interrupted (SIGINT)", signal.SIGTERM: "interrupted (SIGTERM)"}


def started(*words: str, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "planner", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **env})


@pytest.fixture(scope="module")
def long_search(tmp_path_factory) -> list[str]:
    """A job whose search takes many seconds: 997 layers of one kind, fifty plans to prove."""
    deep = tmp_path_factory.mktemp("deep") / "deep.yaml"
    group = "{count: 997, attention: {heads: 8, kv_heads: 4}, mlp: {kind: gated, width: 704}}"
    deep.write_text(f"name: deep\nhidden: 256\nvocab: 2048\nlayers:\n  - {group}\n")
    return ["plan", str(deep), "--hw", "h100-sxm", "--nodes", "64", "--seq-len", "4096", "--global-batch", "4096",
            "--pin", "virtual_stages=1", "--top-k", "50"]  # fmt: skip


def check_end(process, out: str, err: str, plan, *numbers: int) -> None:
    """A plan with exit 0, on standard output and in the file, or neither with exit 4."""
    assert "Traceback" not in err
    assert "internal error" not in err
    assert process.returncode in (0, 4), err
    assert plan.exists() == bool(out) == (process.returncode == 0)
    if process.returncode == 4:
        assert any(INTERRUPTED[n] + " before there was a plan" in err for n in numbers), err
        return
    proof = json.loads(plan.read_text())["certificate"]
    if proof["status"] == "interrupted":
        assert any(INTERRUPTED[n] in err for n in numbers), err
        assert proof["bound"] <= proof["objective"]
        assert proof["space"]["open"] > 0


@pytest.mark.parametrize(("number", "delay"), [(signal.SIGINT, 0.4), (signal.SIGINT, 4.0), (signal.SIGTERM, 2.0)])
def test_a_signal_keeps_the_best_plan(tmp_path, long_search, number, delay):
    plan = tmp_path / "plan.json"
    process = started(*long_search, "-o", str(plan))
    time.sleep(delay)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    check_end(process, out, err, plan, number)


@pytest.mark.slow
@pytest.mark.parametrize("number", INTERRUPTED)
def test_signals_at_any_moment(tmp_path, number):
    """From the first imports to the last line."""
    for i in range(40):
        plan = tmp_path / f"{i}.json"
        process = started(*GPT3, "-o", str(plan))
        time.sleep(0.15 + 0.05 * i)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        check_end(process, out, err, plan, number)


def test_a_second_interrupt_ends_at_once():
    """Also where the first one waits for a check point that is far."""
    code = "from planner import stopping; import time; stopping.install(); print('go', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130


def test_other_commands_end_with_the_signal(tmp_path):
    process = started("model", "inspect", "/dev/stdin")
    time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60, input="name: x\n")
    assert process.returncode in (-signal.SIGTERM, 2, 143), err  # before planner began, after it ended, or in between
    assert "Traceback" not in err


def test_a_tiny_limit_ends_cleanly():
    for words in (GPT3, [*GPT3[:4], "--nodes", "64,128", *GPT3[6:]], [*GPT3, "--objective", "memory"]):
        result = planner(*words, "--time-limit", "0.01")
        assert result.returncode == 4, result.stderr
        assert result.stderr == "planner: the time limit passed before any plan was found\n"
        assert result.stdout == ""


def test_what_is_proven_stays_proven(monkeypatch):
    """Stopped while it looks for what would help, a proof that nothing fits is still one."""
    import planner as api
    from planner import stopping
    from planner.errors import InfeasibleError
    from planner.planning.explain import changes

    def stop(*_):
        monkeypatch.setattr(stopping, "passed", lambda: True)
        stopping.check()

    monkeypatch.setattr(changes, "nearest_changes", stop)
    with pytest.raises(InfeasibleError, match="PLN301") as caught:
        api.plan("llama3-70b", "h100-sxm", gpus=8, seq_len=8192, global_batch=64)
    assert "the search for what would help was stopped" in str(caught.value)


def test_a_limit_gives_the_best_plan_so_far(tmp_path, long_search):
    plan = tmp_path / "plan.json"
    result = planner(*long_search, "--time-limit", "2", "-o", str(plan))
    if result.returncode == 4:  # a very busy machine
        assert "the time limit passed" in result.stderr
        return
    assert result.returncode == 0, result.stderr
    proof = json.loads(plan.read_text())["certificate"]
    if proof["status"] == "interrupted":
        assert "planner: the time limit passed: this is the best plan so far, at most " in result.stderr
        assert f"gap {proof['gap']:.2%}" in result.stdout
        assert 0 <= proof["gap"] < 1
        assert proof["objective"] * (1 - proof["gap"]) == pytest.approx(proof["bound"])
