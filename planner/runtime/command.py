"""The program of each process: flags, the process group, and how a run ends. Exit codes are in the README."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from planner import planfile
from planner.errors import InputError, PlannerError
from planner.planfile import Plan
from planner.runtime import faults, sinks, weights
from planner.runtime.logs import RankLog
from planner.runtime.loop import Run
from planner.runtime.mesh import start_processes
from planner.specs.training import Options, argparse_arguments

GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""What a process hears of a peer that is gone."""


LINGER_S = 5.0
"""A rank that leaves an error to another one to print stays so long: torchrun ends all when the first leaves."""


def arguments(words: list[str] | None = None) -> tuple[Path, Options]:
    """The plan's path and the options of a command line."""
    parser = argparse.ArgumentParser(prog="planner.runtime.train", description="Train a plan.", allow_abbrev=False)
    parser.add_argument("plan", type=Path, help="plan file")
    for flag, keywords in argparse_arguments():
        parser.add_argument(flag, **keywords)
    found = vars(parser.parse_args(words))
    plan = found.pop("plan")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items() if v is not None}
    return plan, Options(**values)


def check_plan(plan: Plan) -> None:
    """Raise InputError for a plan that the runtime does not run: the rules are the bundled engine's, not ours."""
    problems = planfile.refusals(plan)
    if problems:
        raise InputError(problems)


def check_options(plan: Plan, options: Options) -> None:
    """Raise PlannerError for options that cannot work with the plan, before processes meet."""
    sinks.check(options)
    if options.init_from:
        weights.check_source(plan.model, Path(options.init_from))
    if options.export_hf:
        weights.check_target(plan.model, Path(options.export_hf))


def train(path: Path, options: Options) -> int:
    """Run one process of the job; returns its exit code."""
    rank = int(os.environ.get("RANK", "0"))
    log: RankLog | None = None
    try:
        plan = planfile.read(path)
        check_plan(plan)
        check_options(plan, options)
        # The watchdog names the rank that hangs; the process group's own time-out must not come first.
        device = start_processes(plan, max(600.0, options.step_timeout + 60))
        log = RankLog(Path(options.out) / "logs", rank)
        Run(plan, device, options, log).train()
        dist.barrier()  # nobody leaves while another still talks to it
    except faults.Stopped as stopped:
        assert log is not None
        log.say(str(stopped))
        return stopped.exit_code
    except PlannerError as error:
        if log is not None:
            log.write(str(error))
        if _speaks(error):
            print(error, file=sys.stderr, flush=True)
        else:
            time.sleep(LINGER_S)
        return error.exit_code
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        gone = next((text for text in GONE if text in first), "")
        text = f"[rank {rank}] {type(error).__name__}: {first}"
        if gone:
            text = f"[rank {rank}] lost another rank ({gone}): its own message, or torchrun's, says why"
        if log is not None:
            log.write(text)
        print(text, file=sys.stderr, flush=True)
        if gone:
            return 1
        raise
    return 0


def _speaks(error: PlannerError) -> bool:
    """Whether this rank prints an error that several ranks may have: the first to say it does."""
    if isinstance(error, faults.RunFailed):
        return error.loud
    if not dist.is_initialized():
        return int(os.environ.get("LOCAL_RANK", "0")) == 0
    key = f"planner/{faults.restarts()}/{hashlib.sha256(str(error).encode()).hexdigest()}"
    try:
        return int(dist.distributed_c10d._get_default_store().add(key, 1)) == 1
    except RuntimeError:  # the store went with its process
        return True


def main() -> None:
    """Entry point of each process; torchrun reports the exception that ends it."""
    record(_main)()


def _main() -> None:
    # The embedding's output is a view under sequence parallelism; nothing here writes into it.
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    code = train(*arguments())
    sys.stdout.flush()
    sys.stderr.flush()
    # All that matters is on disk. Leave without teardown: threads of gloo and of the autograd engine may outlive their
    # owners while the interpreter is torn down, and abort a run that succeeded ("terminate called without an active
    # exception"); and after a failure destroying the process group would wait for ranks that are gone.
    os._exit(code)
