"""What an estimate is made of, for people: tables in the terminal, data frames for CSV and Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from planner.planning.detail import Collective, Detail, Rank, Source, Term
from planner.report import frames
from planner.units import GIB, MIB, gib, rate, seconds, significant

TITLES = {
    "time": "Terms of one step, slowest pipeline rank",
    "memory": "Memory of each rank at its peak",
    "comm": "Collectives of one step, slowest pipeline rank",
    "source": "Figures behind this estimate",
}


def print_detail(detail: Detail, kinds: Sequence[str], out: Console) -> None:
    """The tables that were asked for, in that order."""
    printers = {"time": _print_time, "memory": _print_memory, "comm": _print_comm, "source": _print_source}
    for kind in kinds:
        out.print(Text(f"\n{TITLES[kind]}{f' ({detail.slowest_rank})' if kind in ('time', 'comm') else ''}", style="bold"))
        printers[kind](detail, out)


def _table(left: Sequence[str], right: Sequence[str], last: Sequence[str] = (), fold: str = "") -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for names, justify in ((left, "left"), (right, "right"), (last, "left")):
        for name in names:
            table.add_column(name, justify=justify, overflow="fold", no_wrap=name != fold)  # type: ignore[arg-type]
    return table


# ---- time ----------------------------------------------------------------------------------------------------------


def _print_time(detail: Detail, out: Console) -> None:
    terms = [t for t in detail.time or () if t.total]
    formulas = list(dict.fromkeys(t.formula for t in terms))
    left = ("part", "term", "MxNxK")
    table = _table(left, ("one call", "times", "total", "share"), ("bound", "by", "least certain"), fold="term")
    for t in terms:
        table.add_row(
            t.part, t.name, _shape(t), seconds(t.seconds), _number(t.times), seconds(t.total), f"{t.share:.2%}", t.bound,
            f"[{formulas.index(t.formula) + 1}]", f"{t.least_certain}: {t.provenance}" if t.provenance else "",
        )  # fmt: skip
    table.add_row("", "step", "", "", "", seconds(detail.step_time_s), "100%", "", "", "", style="bold")
    out.print(table)
    if detail.growth != 1.0:
        why = "for the size of the cluster (constant.scale)"
        out.print(Text(f"all times include a factor of {detail.growth:.4g} {why}", style="dim"))
    for i, formula in enumerate(formulas, start=1):
        out.print(Text(f"[{i}] {formula}", style="dim"))


def _shape(t: Term) -> str:
    if "M" not in t.inputs:
        return ""
    m, n, k, count = (f"{float(t.inputs[name]):.10g}" for name in ("M", "N", "K", "count"))
    return f"{m}x{n}x{k}" + ("" if count == "1" else f" x{count}")


def _number(value: float | int | str) -> str:
    """A whole number with separators, another one with four digits."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1e4 else significant(value, 4)


def _inputs(inputs: Mapping[str, float | int | str]) -> str:
    return ", ".join(f"{_number(value)} {name}" for name, value in inputs.items())


# ---- memory --------------------------------------------------------------------------------------------------------


def _print_memory(detail: Detail, out: Console) -> None:
    largest = max((r.total for r in detail.memory or ()), default=0.0)
    unit, size = ("GiB", GIB) if largest >= GIB else ("MiB", MIB)
    for rank in detail.memory or ():
        out.print(Text(f"rank {rank.ranks}: {rank.cause}"))
        table = _table(("what",), (unit,), ("from", "least certain"), fold="from")
        for part, what, n_bytes, inputs, least in _memory_lines(rank):
            table.add_row(what, f"{n_bytes / size:,.3f}", inputs, least, style="" if part else "bold")
        out.print(table)
        out.print()


def _memory_lines(rank: Rank) -> Iterator[tuple[str, str, float, str, str]]:
    """(part, what, bytes, inputs, least certain figure) of a rank; sums have no part."""
    for line in rank.parts:
        yield line.part, line.name, line.n_bytes, _inputs(line.inputs), _least(line.least_certain, line.provenance)
    yield "", f"allocated ({rank.moment})", rank.allocated, "", ""
    ratio = f"{rank.reserved_ratio:.4g} times allocated"
    if rank.pooled:
        ratio += f" and {rank.pooled / GIB:.3g} GiB of gradients, free but of another stream's pool"
    yield "reserved", "kept by the allocator beside it", rank.reserved - rank.allocated, ratio, ""
    for line in rank.outside:
        yield line.part, line.name, line.n_bytes, _inputs(line.inputs), _least(line.least_certain, line.provenance)
    yield "", "total", rank.total, "", ""
    yield "", "limit", rank.limit, "", ""
    yield "", "headroom", rank.headroom, "", ""


def _least(name: str, provenance: str) -> str:
    return f"{name}: {provenance}" if provenance else ""


# ---- collectives and figures ---------------------------------------------------------------------------------------


def _print_comm(detail: Detail, out: Console) -> None:
    if not detail.comm:
        out.print(Text("none: one device"))
        return
    right = ("ranks", "stride", "bytes", "calls", "one call", "busy", "exposed", "bus bandwidth")
    table = _table(("what", "group", "operation", "tiers"), right, fold="what")
    for c in detail.comm:
        table.add_row(
            c.where, c.group, c.op, ", ".join(c.tiers), str(c.ranks), str(c.stride), gib(c.bytes_per_call), _number(c.calls),
            seconds(c.seconds_per_call), seconds(c.busy), seconds(c.exposed), rate(c.bandwidth, "B/s"),
        )  # fmt: skip
    out.print(table)


def _print_source(detail: Detail, out: Console) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("figure", "value", "provenance", "source"):
        table.add_column(
            name, overflow="fold", ratio=2 if name == "source" else None, max_width=40 if name == "value" else None
        )
    for f in detail.source or ():
        table.add_row(f.name, _number(f.value), f.provenance, f.source)
    out.print(table)


# ---- data frames ---------------------------------------------------------------------------------------------------


def detail_frames(detail: Detail, kinds: Sequence[str]) -> list[tuple[str, pd.DataFrame]]:
    """(title, frame) of each table that was asked for."""
    made = {"time": _time_frame, "memory": _memory_frame, "comm": _comm_frame, "source": _source_frame}
    return [(TITLES[kind], made[kind](detail)) for kind in kinds]


def _time_frame(detail: Detail) -> pd.DataFrame:
    names = "part name seconds times total share bound formula inputs provenance least_certain"
    return _frame(detail.time or (), names.split())


def _comm_frame(detail: Detail) -> pd.DataFrame:
    names = "part where group op ranks stride tiers bytes_per_call calls seconds_per_call busy exposed bandwidth hides"
    return _frame(detail.comm or (), names.split())


def _source_frame(detail: Detail) -> pd.DataFrame:
    return _frame(detail.source or (), ["name", "value", "provenance", "source"])


def _frame(rows: Sequence[Term | Collective | Source], columns: list[str]) -> pd.DataFrame:
    """One row each; inputs and tiers as text."""
    return pd.DataFrame([[_text(getattr(r, name)) for name in columns] for r in rows], columns=columns)


def _text(value: object) -> object:
    if isinstance(value, dict):
        return "; ".join(f"{name} = {v:.10g}" if isinstance(v, float) else f"{name} = {v}" for name, v in value.items())
    return ", ".join(value) if isinstance(value, tuple) else value


def _memory_frame(detail: Detail) -> pd.DataFrame:
    rows = [(r.ranks, r.cause, *line) for r in detail.memory or () for line in _memory_lines(r)]
    return pd.DataFrame(rows, columns=["ranks", "cause", "part", "what", "bytes", "inputs", "least_certain"])


def detail_text(detail: Detail, kinds: Sequence[str], output_format: str) -> str:
    """The tables as CSV (an empty line between them) or Markdown."""
    tables = detail_frames(detail, kinds)
    if output_format == "csv":
        return "\n".join(frame.to_csv(index=False) for _, frame in tables)
    return "\n".join(f"### {title}\n\n{frames.markdown(frame)}" for title, frame in tables)
