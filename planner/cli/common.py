"""What commands share: options, how errors are printed, how results are written."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer

from planner import stopping
from planner.errors import InputError, MissingPartError, PlannerError, Problem, input_error

P = ParamSpec("P")
R = TypeVar("R")

ModelArgument = Annotated[
    str, typer.Argument(help="A model: our YAML, a Hugging Face config.json, or the name of a shipped one.")
]
Hardware = Annotated[
    list[str],
    typer.Option(
        "--hardware",
        "--hw",
        help="A hardware profile: a file, or the name of a shipped one. Two device types: NAME:NODES, twice.",
    ),
]
Nodes = Annotated[int | None, typer.Option("--nodes", help="Nodes of the cluster.")]
Gpus = Annotated[int | None, typer.Option("--gpus", help="Devices of the cluster, instead of --nodes.")]
NodeCounts = Annotated[
    str | None, typer.Option("--nodes", metavar="N", help="Nodes of the cluster; several for a table: 8,16,32 or 8:64:8.")
]
GpuCounts = Annotated[str | None, typer.Option("--gpus", metavar="N", help="Devices, instead of --nodes; several for a table.")]
Tokens = Annotated[
    str | None, typer.Option("--tokens", help="Tokens to train: 15T, 300B, 1.4e12. Adds days, device-hours, cost, energy.")
]
Price = Annotated[float | None, typer.Option("--price", metavar="USD", help="Price of one device-hour; else the profile's.")]
Pue = Annotated[float | None, typer.Option("--pue", help="Energy of the site over that of its devices; 1 when left out.")]
SeqLen = Annotated[int, typer.Option("--seq-len", help="Tokens of one sequence.")]
GlobalBatch = Annotated[int, typer.Option("--global-batch", help="Sequences of one optimizer step.")]
Precision = Annotated[str, typer.Option("--precision", help="bf16, fp16 or fp32.")]
EngineName = Annotated[
    str,
    typer.Option(
        "--engine",
        help="bundled, megatron, torchtitan, deepspeed, nanotron or fsdp1; with recipes: megatron+bf16-grads.",
    ),
]
Fraction = Annotated[float, typer.Option("--max-memory-fraction", help="Share of usable device memory that a plan may fill.")]
OomProbability = Annotated[
    float | None,
    typer.Option("--max-oom-probability", metavar="P", help="How likely a plan may run out of memory, between 0 and 1."),
]
Format = Annotated[str, typer.Option("--format", help="table, json, yaml, csv or markdown.")]
LoraRank = Annotated[
    int | None, typer.Option("--lora-rank", metavar="R", help="Train low-rank adapters of this rank; the base is frozen.")
]
LoraTargets = Annotated[
    str | None, typer.Option("--lora-targets", help="What is adapted: attention, mlp, experts, with commas. [attention,mlp]")
]
LoraBase = Annotated[
    str | None, typer.Option("--lora-base", help="How the frozen base is stored: same, fp8, int8 or nf4. [same]")
]
LoraEmbeddings = Annotated[
    bool, typer.Option("--lora-train-embeddings", help="Train embedding, head and final norm beside the adapters.")
]
AsType = Annotated[str | None, typer.Option("--as", help="Treat an unknown Hugging Face model_type as this one.")]

FORMATS = ("table", "json", "yaml", "csv", "markdown")


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Errors leave as one message on standard error and an exit code, never as a traceback. Signals end the command."""
    return _guarded(command, stopping.at_once)


def anytime(command: Callable[P, R]) -> Callable[P, R]:
    """The same for a command that looks at signals itself, where it can save its result; without one it exits with 4."""
    return _guarded(command, contextlib.nullcontext)


def _guarded(command: Callable[P, R], signals: Callable[[], contextlib.AbstractContextManager[None]]) -> Callable[P, R]:
    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            _tolerant_output()
            with signals():
                result = command(*args, **kwargs)
                sys.stdout.flush()
                return result
        except PlannerError as error:
            print_problems(error.problems)
            raise typer.Exit(error.exit_code) from None
        except (typer.Exit, BrokenPipeError):
            raise
        except KeyboardInterrupt as interrupt:
            raise typer.Exit(_interrupted(interrupt, signals is stopping.at_once)) from None
        except TimeoutError:
            print("planner: the time limit passed before any plan was found", file=sys.stderr)
            raise typer.Exit(4) from None
        except OSError as error:
            print(f"planner: {error.strerror or error}: the result could not be written", file=sys.stderr)
            raise typer.Exit(2) from None
        except Exception as error:
            if stopping.received() and signals is stopping.at_once:  # raised inside an import, it may look like anything
                raise typer.Exit(_interrupted(error, True)) from None
            if os.environ.get("PLANNER_DEBUG"):
                traceback.print_exc()
            message = " ".join(str(error).split()) or type(error).__name__
            print(f"planner: internal error: {type(error).__name__}: {message}", file=sys.stderr)
            print("  fix: this is a bug; run again with PLANNER_DEBUG=1 and report the traceback", file=sys.stderr)
            raise typer.Exit(70) from None

    return wrapper


def _interrupted(error: BaseException, at_once: bool) -> int:
    """Say that a signal ended the command, and return the exit code."""
    code = getattr(error, "code", 128 + (stopping.received() or signal.SIGINT))
    name = signal.Signals(code - 128).name
    print(f"planner: interrupted ({name}) before there was a {'result' if at_once else 'plan'}", file=sys.stderr)
    return code if at_once else 4


class Signals:
    """SIGINT and SIGTERM as KeyboardInterrupt inside the block; `code` is the exit code that says which came."""

    def __init__(self) -> None:
        self.code = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self._received)
        return self

    def _received(self, number: int, frame: object) -> None:
        self.code = 128 + number
        raise KeyboardInterrupt

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _tolerant_output() -> None:
    """Characters that the terminal's encoding lacks are replaced; a closed standard output is an empty one."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def print_problems(problems: tuple[Problem, ...] | list[Problem]) -> None:
    """Problems on standard error, codes in colour when it is a terminal."""
    colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    for p in problems:
        text = str(p)
        print(text.replace(p.code, f"\033[1;31m{p.code}\033[0m", 1) if colour else text, file=sys.stderr)


def checked_format(value: str, formats: tuple[str, ...] = FORMATS, flag: str = "--format") -> str:
    """A known output format, or an input error."""
    if value not in formats:
        raise input_error("PLN107", f"{flag} {value}: not a format", f"formats are {', '.join(formats)}", "")
    return value


def write_result(text: str) -> None:
    """The result, exactly, on standard output."""
    sys.stdout.write(text)


def to_yaml(data: Any) -> str:
    """Plain data as YAML 1.2."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    stream = io.StringIO()
    yaml.dump(data, stream)
    return stream.getvalue()


def to_json(data: Any) -> str:
    """Plain data as JSON text."""
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def parse_assignments(items: list[str], flag: str) -> dict[str, list[object]]:
    """`tp=8`, `zero=0,1` as {axis: values}. Raises InputError with all malformed ones."""
    result: dict[str, list[object]] = {}
    problems = []
    for item in items:
        name, sep, value = item.partition("=")
        if not sep or not name or not value:
            problems.append(
                Problem("PLN121", f"{flag} {item}: expected NAME=VALUE", "", f"write {flag} tp=8 or {flag} zero=0,1")
            )
        elif name.strip() in result:
            problems.append(Problem("PLN121", f"{flag} {name.strip()} is given twice", "", f"write {flag} {name.strip()}=A,B"))
        else:
            result[name.strip()] = [v.strip() for v in value.split(",")]
    if problems:
        raise InputError(problems)
    return result


def needs_torch() -> None:
    """Raises MissingPartError where torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        problem = Problem("PLN550", "torch is not installed", "the runtime needs it", "pip install 'planner[runtime]'")
        raise MissingPartError(problem)


def machine(items: list[str]) -> dict[str, Any]:
    """What `--hardware` names: `hardware`, or the `shares` of two device types, as a request has them. Raises InputError."""
    if len(items) == 1:
        name, _, nodes = items[0].rpartition(":")
        if name and nodes.isdigit() and not Path(items[0]).exists():
            fix = f"write --hardware {name} --nodes {nodes}, or name a second type"
            raise input_error("PLN150", f"--hardware {items[0]}: nodes of one device type", "NAME:NODES is one of two", fix)
        return {"hardware": items[0]}
    shares = []
    for item in items:
        name, _, nodes = item.rpartition(":")
        if not name or not re.fullmatch(r"[1-9][0-9]{0,8}", nodes):
            why = "with several device types each has its number of nodes"
            raise input_error("PLN157", f"--hardware {item}: no number of nodes", why, f"write --hardware {name or item}:4")
        shares.append((name, int(nodes)))
    return {"hardware": "", "shares": shares}


def parse_axes(items: list[str], flag: str) -> dict[str, list[object]]:
    """`tp=4,pp=8` and `zero=0,1` as {axis: values}: a word without `=` is one more value of the axis before it.

    Raises InputError with all malformed ones.
    """
    words: list[str] = []
    for item in items:
        for i, word in enumerate(item.split(",")):
            if i == 0 or "=" in word:
                words.append(word)
            else:
                words[-1] += f",{word}"
    return parse_assignments(words, flag)


def adapter(flags: dict[str, Any]) -> dict[str, Any] | None:
    """The adapter that the flags of a command describe, None without `--lora-rank`. Raises InputError."""
    names = ("lora_targets", "lora_base", "lora_train_embeddings")
    given = {name: flags[name] for name in names if flags[name]}
    if flags["lora_rank"] is None:
        if given:
            words = ", ".join("--" + name.replace("_", "-") for name in given)
            raise input_error("PLN107", f"{words} without --lora-rank", "it describes an adapter", "add --lora-rank 16")
        return None
    if "lora_targets" in given:
        given["lora_targets"] = [t.strip() for t in given["lora_targets"].split(",")]
    return {"rank": flags["lora_rank"]} | {name.removeprefix("lora_"): value for name, value in given.items()}


def distinct(output: Path | None, *inputs: str | None) -> None:
    """A result never overwrites what it was made from. Raises InputError."""
    if output is None:
        return
    for name in inputs:
        if name is not None and Path(name).exists() and Path(name).resolve() == output.resolve():
            raise input_error("PLN114", f"{output} is an input of this command", "it would be lost", "write another file")


def writable(path: Path | None) -> None:
    """Find out before the work whether a result can be written. Raises InputError."""
    if path is None:
        return
    folder = path.parent if str(path.parent) else Path(".")
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        why = "it is a folder" if path.is_dir() else f"{folder} is not a writable folder"
        raise input_error("PLN113", f"cannot write {path}", why, "give the path of a file in an existing folder")
