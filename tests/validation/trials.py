"""Run plans on the GPUs of this machine, one after another, and print what they took beside what was predicted:

    python tests/validation/trials.py OUT PLAN.json ... [--steps 6] [--limit 60] [--deadline 500] [--profile NAME]

Every rank of every plan is a process of its own, forked from one that has loaded torch already: about 10 s a plan. Plans of one
process run on all devices at once. OUT gets `results.json` and, with --profile, the traces of that plan's ranks; `NAME` is a
plan's file without `.json`. Plans that run out of memory or of time are told so, and the next one runs.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("OMP_NUM_THREADS", "4")

from planner import planfile
from planner.planfile import Plan
from planner.runtime import command, profiling
from planner.runtime.metrics import WARMUP_STEPS
from planner.specs.training import Options
from planner.units import GIB

PORTS = itertools.count(20000 + os.getpid() % 20000)
"""Each plan's processes meet on another port: the last one's may still be taken."""


@dataclass
class Trial:
    """A plan that runs, its processes, and where they write."""

    name: str
    path: Path
    plan: Plan
    out: Path
    profiled: bool = False
    settings: dict[str, str] = field(default_factory=dict)
    """Environment of its processes."""
    pids: dict[int, int] = field(default_factory=dict)
    codes: dict[int, int] = field(default_factory=dict)
    began: float = 0.0

    @property
    def ranks(self) -> int:
        """Its processes."""
        return self.plan.layout.world_size


def all_devices() -> list[str]:
    """Names of the GPUs here; of the cores where there is none. Torch must not look: what is forked could not use CUDA then."""
    if named := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return named.split(",")
    return [str(i) for i in range(len(list(Path("/dev").glob("nvidia[0-9]*"))) or os.cpu_count() or 1)]


def rank_program(trial: Trial, rank: int, devices: list[str], port: int, steps: int) -> int:
    """What a forked process does; returns its exit code."""
    import torch

    os.setsid()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(trial.ranks), "LOCAL_WORLD_SIZE": str(trial.ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **trial.settings}
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    with (trial.out / f"rank-{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    profiling.ACTIVE = 1
    options = Options(steps=steps, out=str(trial.out), profile=trial.profiled, step_timeout=120)
    try:
        code = command.train(trial.path, options)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        code = 1
    peaks = {"allocated_gib": torch.cuda.max_memory_allocated() / GIB, "reserved_gib": torch.cuda.max_memory_reserved() / GIB}
    (trial.out / f"rank-{rank}.json").write_text(json.dumps(peaks))
    return code


def trial_of(words: str, out: Path, profiled: list[str]) -> Trial:
    """The trial of one word of the command line."""
    place, _, settings = words.partition("@")
    path = Path(place)
    name = re.sub(r"[^\w.-]+", "-", path.stem + (f"-{settings}" if settings else ""))
    pairs = dict(pair.split("=", 1) for pair in settings.split(",") if pair)
    return Trial(name, path, planfile.read(path), out / name, name in profiled, pairs)


def start(trial: Trial, devices: list[str], steps: int) -> None:
    """Fork the trial's processes."""
    trial.out.mkdir(parents=True, exist_ok=True)
    trial.began = time.monotonic()
    port = next(PORTS)
    for rank in range(trial.ranks):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = rank_program(trial, rank, devices, port, steps)
            finally:
                os._exit(code)
        trial.pids[pid] = rank


def poll(trial: Trial, limit: float) -> bool:
    """Whether the trial is over. One whose time is up, or of which a process has failed, is ended."""
    for pid, rank in list(trial.pids.items()):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            del trial.pids[pid]
            trial.codes[rank] = os.waitstatus_to_exitcode(status)
    late = time.monotonic() - trial.began > limit
    if trial.pids and (late or any(trial.codes.values())):
        time.sleep(0 if late else 1)
        for pid in trial.pids:
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                os.kill(pid, signal.SIGKILL)
    return not trial.pids


def result(trial: Trial) -> dict[str, Any]:
    """What a trial that is over found: times in seconds (the median leaves the first steps out), peaks in GiB by rank."""
    metrics = trial.out / "metrics.jsonl"
    steps = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    times = [s["step_time_s"] for s in steps if not s["profiled"]]
    peaks = [json.loads(p.read_text()) for p in sorted(trial.out.glob("rank-*.json"))]
    found: dict[str, Any] = {
        "name": trial.name,
        "step_time_s": statistics.median(times[WARMUP_STEPS:]) if len(times) > WARMUP_STEPS else None,
        "predicted_s": trial.plan.estimate.step_time_s,
        "steps": times,
        "losses": [s["loss"] for s in steps],
        "predicted_gib": [s.allocated for s in trial.plan.estimate.memory.stages],
        **{name: [p[name] for p in peaks] for name in ("allocated_gib", "reserved_gib")},
        "took_s": time.monotonic() - trial.began,
    }
    if any(trial.codes.values()):
        logs = (p.read_text(errors="replace").strip()[-600:] for p in sorted(trial.out.glob("rank-*.log")))
        found["error"] = next((log for log in logs if log), str(trial.codes))
    return found


def say(found: dict[str, Any]) -> None:
    """One line of a result."""
    took, gib = found["step_time_s"], found["allocated_gib"]
    line = f"{found['name']:26} " + (f"{took:.4f} s ({found['predicted_s'] / took - 1:+.1%})" if took else "no time")
    line += f"  {' '.join(f'{g:.2f}' for g in gib)} GiB (predicted {' '.join(f'{g:.2f}' for g in found['predicted_gib'])})"
    line += f"  {found['took_s']:.0f} s"
    if "error" in found:
        line += "\n    " + " | ".join(found["error"].splitlines()[-3:])[-400:]
    print(line, flush=True)


def run_all(waiting: list[Trial], out: Path, steps: int, limit: float, deadline: float) -> list[dict[str, Any]]:
    """Run trials as devices come free; what each found. Those that have not started by the deadline are told so."""
    begin, results, free = time.monotonic(), [], all_devices()
    running: list[tuple[Trial, list[str]]] = []
    for trial in [trial for trial in waiting if trial.ranks > len(free)]:
        waiting.remove(trial)
        print(f"{trial.name:26} not run: it needs {trial.ranks} devices, {len(free)} are here", flush=True)
    while waiting or running:
        while waiting and len(free) >= waiting[0].ranks and time.monotonic() - begin < deadline:
            trial = waiting.pop(0)
            taken, free = free[: trial.ranks], free[trial.ranks :]
            start(trial, taken, steps)
            running.append((trial, taken))
        if not running:
            break
        time.sleep(0.05)
        for trial, taken in [pair for pair in running if poll(pair[0], limit)]:
            running.remove((trial, taken))
            free = sorted(free + taken)
            results.append(result(trial))
            say(results[-1])
            (out / "results.json").write_text(json.dumps(results))
            keep_traces(trial, out)
    for trial in waiting:
        print(f"{trial.name:26} not run: {deadline:.0f} s are over", flush=True)
    print(f"{len(free)} devices, {time.monotonic() - begin:.0f} s", flush=True)
    return results


def keep_traces(trial: Trial, out: Path) -> None:
    """Compress the traces of a trial's ranks into `out`, and remove the rest of what it wrote."""
    for trace in (trial.out / "profile").glob("*.json"):
        with trace.open("rb") as source, gzip.open(out / f"{trial.name}-{trace.name}.gz", "wb") as target:
            shutil.copyfileobj(source, target)
    shutil.rmtree(trial.out, ignore_errors=True)


def main() -> int:
    """Run the plans of the command line; 1 if one of them failed or did not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("plans", nargs="+", help="plan files; PLAN.json@NAME=VALUE,... sets variables of its processes")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for a plan")
    parser.add_argument("--deadline", type=float, default=500.0, help="seconds after which no plan starts")
    parser.add_argument("--profile", default="", help="names of plans whose steps are traced, with commas between")
    args = parser.parse_args()
    trials = [trial_of(words, args.out, args.profile.split(",")) for words in args.plans]
    results = run_all(list(trials), args.out, args.steps, args.limit, args.deadline)
    return int(len(results) < len(trials) or any("error" in found for found in results))


if __name__ == "__main__":
    raise SystemExit(main())
