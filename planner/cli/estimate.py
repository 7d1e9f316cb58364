"""`planner estimate`: the figures for one layout that the user names, for a configuration, or for a plan file."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli import common
from planner.errors import input_error

if TYPE_CHECKING:
    from planner.planfile import Plan
    from planner.planning.economy import Budget


@common.guarded
def estimate(
    source: Annotated[str, typer.Argument(help="A model (with the flags below), a configuration file, or a plan file.")],
    hardware: Annotated[
        list[str] | None,
        typer.Option(
            "--hardware", "--hw", help="A hardware profile: a file or a shipped name. Two device types: NAME:NODES, twice."
        ),
    ] = None,
    seq_len: Annotated[int | None, typer.Option("--seq-len", help="Tokens of one sequence.")] = None,
    global_batch: Annotated[int | None, typer.Option("--global-batch", help="Sequences of one optimizer step.")] = None,
    nodes: common.Nodes = None,
    gpus: common.Gpus = None,
    precision: common.Precision = "bf16",
    engine: common.EngineName = "bundled",
    lora_rank: common.LoraRank = None,
    lora_targets: common.LoraTargets = None,
    lora_base: common.LoraBase = None,
    lora_train_embeddings: common.LoraEmbeddings = False,
    tp: Annotated[int, typer.Option(help="Tensor parallel degree.")] = 1,
    cp: Annotated[int, typer.Option(help="Context parallel degree.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline parallel degree.")] = 1,
    dp: Annotated[int | None, typer.Option(help="Data parallel degree; the remaining devices when left out.")] = None,
    ep: Annotated[int, typer.Option(help="Expert parallel degree.")] = 1,
    etp: Annotated[int, typer.Option(help="Tensor parallel degree inside experts.")] = 1,
    zero: Annotated[int, typer.Option(help="ZeRO stage, 0 to 3.")] = 0,
    shard: Annotated[int | None, typer.Option(help="Ranks that share one copy of the states; dp x cp when left out.")] = None,
    micro_batch: Annotated[int, typer.Option("--micro-batch", help="Sequences a rank processes at once.")] = 1,
    schedule: Annotated[
        str | None,
        typer.Option(help="gpipe, 1f1b, interleaved, interleaved-zb, zbv or dualpipev; 1f1b if left out with pp > 1."),
    ] = None,
    virtual_stages: Annotated[
        int, typer.Option("--virtual-stages", help="Chunks a rank, with interleaved and interleaved-zb.")
    ] = 1,
    sequence_parallel: Annotated[bool | None, typer.Option(help="Split norms over tp; on with tp > 1 when left out.")] = None,
    offload: Annotated[str, typer.Option("--offload", help="What lives in host memory: none or optimizer.")] = "none",
    order: Annotated[
        str, typer.Option("--order", help="Rank order: tp-cp-dp-pp, or tp-cp-pp-dp with stages beside each other.")
    ] = "tp-cp-dp-pp",
    type_order: Annotated[
        str, typer.Option("--type-order", help="Of two device types, which holds the first stages: as-named or reversed.")
    ] = "as-named",
    context: Annotated[
        str, typer.Option("--context", help="How a cp group shares attention: default (the engine's own way) or ring.")
    ] = "default",
    layers: Annotated[str | None, typer.Option(help="Layers of each stage: 7,8,8,7; even when left out.")] = None,
    recompute: Annotated[str, typer.Option(help="none, selective, full, or counts such as full:3,selective:2.")] = "none",
    max_memory_fraction: common.Fraction = 0.92,
    max_oom_probability: common.OomProbability = None,
    tokens: common.Tokens = None,
    price: common.Price = None,
    pue: common.Pue = None,
    as_type: common.AsType = None,
    output_format: common.Format = "table",
    output: Annotated[Path | None, typer.Option("-o", "--out", help="Write the plan file here.")] = None,
    detail: Annotated[
        list[str] | None, typer.Option(help="What it is made of: time, memory, comm or source; several times, or with commas.")
    ] = None,
) -> None:
    """Predict step time and memory of one layout, without a search."""
    from planner import planfile
    from planner.cli.plan import print_plan

    common.checked_format(output_format)
    wanted = _wanted(detail or [])
    common.writable(output)
    flags = dict(locals())
    made, accounting = _from_file(source, flags) or (_from_flags(flags), flags["engine"])
    if output is not None:
        planfile.write(made, output)
    if not wanted or output_format in ("table", "markdown"):
        print_plan(made, output_format)
    if wanted:
        _print_detail(made, accounting, wanted, output_format)
    if not made.estimate.memory.fits and output_format == "table":
        print("this layout does not fit: see headroom", file=sys.stderr)


def _wanted(items: list[str]) -> list[str]:
    """The tables of --detail, each once. Raises InputError for an unknown one."""
    names = [name.strip() for item in items for name in item.split(",")]
    for name in names:
        if name not in DETAILS:
            raise input_error("PLN107", f"--detail {name}: not a table", f"tables are {', '.join(DETAILS)}", "")
    return list(dict.fromkeys(names))


DETAILS = ("time", "memory", "comm", "source")


def _print_detail(made: Plan, engine: str, wanted: list[str], output_format: str) -> None:
    """The tables that say what an estimate is made of: beside the plan in JSON and YAML, alone in CSV."""
    from planner.planning.detail import detail_of
    from planner.report import detail as report
    from planner.report import terminal

    found = detail_of(made, wanted, engine)
    if output_format in ("json", "yaml"):
        data = {**made.to_data(), "detail": found.to_data()}
        common.write_result(common.to_json(data) if output_format == "json" else common.to_yaml(data))
    elif output_format == "table":
        report.print_detail(found, wanted, terminal.console())
    else:
        gap = "\n" if output_format == "markdown" else ""
        common.write_result(gap + report.detail_text(found, wanted, output_format))


def _from_file(source: str, flags: dict[str, Any]) -> tuple[Plan, str] | None:
    """The estimate of a plan or configuration file and the engine it names; None when the source is a model."""
    from planner import planfile
    from planner.planning import make
    from planner.planning.economy import budget_of
    from planner.planning.request import request_of, request_of_plan
    from planner.specs import files
    from planner.specs.layout import Configuration

    if not Path(source).is_file():
        return None
    document = files.parse_document(source)
    data = document.data
    if planfile.is_plan(data) or (isinstance(data, dict) and "layout" in data):
        _no_flags(source, flags)
    if planfile.is_plan(data):
        plan = planfile.from_document(document)
        budget = _budget(flags) or (None if plan.economy is None else budget_of(plan.economy))
        request = request_of_plan(plan, Path(source).parent, budget)
        return make.make_estimate(request, plan.layout), plan.engine
    if isinstance(data, dict) and "layout" in data:
        configuration = files.build(Configuration, document)
        request = replace(request_of(configuration, Path(source).parent), budget=_budget(flags))
        made = make.make_estimate(request, configuration.layout)
        return made, configuration.engine
    return None


def _budget(flags: dict[str, Any]) -> Budget | None:
    """The token budget in the flags."""
    from planner.planning.economy import budget

    return budget(flags["tokens"], flags["price"], flags["pue"])


_BESIDE_FILES = ("source", "output", "output_format", "detail", "tokens", "price", "pue")


def _no_flags(source: str, flags: dict[str, Any]) -> None:
    """A plan or configuration says everything itself. Raises InputError when a flag contradicts."""
    defaults = inspect.signature(estimate).parameters
    given = [
        k for k, v in flags.items() if k in defaults and k not in _BESIDE_FILES and (v or None) != (defaults[k].default or None)
    ]
    if given:
        names = ", ".join("--" + k.replace("_", "-") for k in given)
        raise input_error(
            "PLN107", f"{names} beside {source}", "the file says what is estimated", "edit the file, or name a model"
        )


def _from_flags(flags: dict[str, Any]) -> Plan:
    import planner

    missing = [f"--{k.replace('_', '-')}" for k in ("hardware", "seq_len", "global_batch") if flags[k] in (None, [])]
    if missing:
        raise input_error("PLN105", f"{', '.join(missing)} missing", "a model alone does not say what is trained where", "")
    names = (
        "tp", "cp", "pp", "dp", "ep", "etp", "zero", "micro_batch", "schedule", "virtual_stages", "sequence_parallel",
        "offload", "order", "shard", "type_order", "context",
    )  # fmt: skip
    layout: dict[str, Any] = {k: flags[k] for k in names if flags[k] is not None}
    layout["recompute"] = flags["recompute"]
    if flags["layers"] is not None:
        parts = flags["layers"].split(",")
        if not all(re.fullmatch(r"[1-9][0-9]{0,8}", p.strip()) for p in parts):
            raise input_error(
                "PLN107", f"--layers {flags['layers']}: not whole numbers above zero", "", "write --layers 7,8,8,7"
            )
        layout["layers"] = [int(p) for p in parts]
    source: Any = flags["source"]
    if flags["as_type"]:
        from planner.specs import files

        source = files.load_model(source, as_type=flags["as_type"])[0]
    machine = common.machine(flags["hardware"])
    return planner.estimate(
        source,
        machine.get("shares") or machine["hardware"],
        layout=layout,
        **{k: flags[k] for k in ("seq_len", "global_batch", "nodes", "gpus", "precision", "engine", "max_memory_fraction")},
        **{k: flags[k] for k in ("max_oom_probability", "tokens", "price", "pue")},
        adapter=common.adapter(flags),
    )
