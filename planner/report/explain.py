"""An explanation for people: blocks of text and tables, in the terminal and as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from planner.planning.explain.answers import Change, Excluded, Explanation, Mesh, Node, Rank, WhyNot
from planner.units import GIB, gib, seconds

_MANY = 12
"""Longer lists of ranks and nodes show their ends only."""
_CLOSEST = "The closest layout"
_WIDE = ("recompute", "why", "layout")
"""Columns whose text may take several lines."""


@dataclass(frozen=True)
class Block:
    """A title, lines, a table, lines."""

    title: str
    before: Sequence[str] = ()
    left: Sequence[str] = ()
    """Columns of text, the first ones."""
    right: Sequence[str] = ()
    """Columns of numbers, after them."""
    rows: Sequence[Sequence[str]] = ()
    after: Sequence[str] = field(default=())


def print_explanation(e: Explanation, out: Console) -> None:
    """The explanation in the terminal: the answer alone where something was asked."""
    for i, block in enumerate(blocks(e)):
        out.print(Text(f"{chr(10) if i else ''}{block.title}", style="bold"))
        for line in block.before:
            out.print(_wrapped(line, out.width))
        if block.rows:
            out.print(_table(block))
        for line in block.after:
            out.print(_wrapped(line, out.width))


def _wrapped(line: str, width: int) -> Text:
    """A line broken at spaces; what follows is indented as its beginning, and two columns more."""
    indent = " " * (len(line) - len(line.lstrip(" ")) + 2)
    return Text(textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False))


def _table(block: Block) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in (*block.left, *block.right):
        justify: Literal["left", "right"] = "left" if name in block.left else "right"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=name not in _WIDE)
    for row in block.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def markdown(e: Explanation) -> str:
    """The explanation as Markdown."""
    return "\n".join(_markdown(block) for block in blocks(e))


def _markdown(block: Block) -> str:
    lines = [f"### {block.title}", ""]
    lines += [_escaped(line) + "  " for line in block.before] + [""] * bool(block.before)
    if block.rows:
        lines.append("| " + " | ".join((*block.left, *block.right)) + " |")
        lines.append("|" + " --- |" * len(block.left) + " ---: |" * len(block.right))
        lines += ["| " + " | ".join(_escaped(cell) for cell in row) + " |" for row in block.rows] + [""]
    lines += [_escaped(line) + "  " for line in block.after] + [""] * bool(block.after)
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return text.strip().replace("|", "\\|").replace("*", "\\*")


def blocks(e: Explanation) -> Iterator[Block]:
    """What is said, in order."""
    if e.why_not is not None:
        yield from _answer(e.why_not, f"Why not {_pins(e.why_not)}")
        return
    fits = "" if e.fits else ", does not fit"
    facts = f"{seconds(e.step_time_s)} a step, peak {e.peak_gib:.1f} GiB of {e.limit_gib:.1f}{fits}"
    yield Block(f"Why {e.name}", (facts,))
    if e.unfit is not None:
        yield from (b for b in _answer(e.unfit, "What does not fit") if b.title != _CLOSEST)
    yield _ranks(e)
    if e.losses:
        lines = [line for loss in e.losses for line in (loss.name, f"  {loss.sentence}")]
        yield Block("What the runners-up lose against the plan", lines)
    if e.one_type:
        yield _one_type(e)
    if e.excluded:
        yield _excluded(e.excluded, e.layouts or 0)
    yield _mesh("Dense mesh", e.dense)
    if e.expert is not None:
        yield _mesh("Expert mesh", e.expert)
    yield _nodes(e.nodes, e.dense, e.expert is not None)


# ---- the plan ------------------------------------------------------------------------------------------------------


def _ranks(e: Explanation) -> Block:
    """What binds each pipeline rank, and which is slowest."""
    shown = _ends(e.ranks, {e.bottleneck.stage, max(e.ranks, key=lambda r: -r.slack_gib).stage})
    unit, scale = ("GiB", 1.0) if e.peak_gib >= 1 else ("MiB", 1024.0)
    rows = [
        (
            str(r.stage), str(r.layers), r.recompute, r.binding.replace(" in ", ", "), f"{r.slack_gib * scale:.1f}",
            "" if r.one_more is None else f"{r.one_more.over_gib * scale:+.1f}",
            "" if r.less_recompute is None else f"{r.less_recompute.over_gib * scale:+.1f}",
            seconds(r.time_s),
        )
        for r in shown
    ]  # fmt: skip
    b = e.bottleneck
    after = [f"slack: {unit} below the limit"]
    if any(r.one_more or r.less_recompute for r in shown):
        after[0] += f"; +layer, -recomp.: {unit} over it with one more layer (recompute as it is), and with one step less"
        after[0] += " recompute; below zero it would fit"
    after += [f"rank{'s' * (',' in who)} {who}: {reason}" for who, reason in _by_reason(shown)]
    if b.next_stage is not None:
        ahead = f"{seconds(b.ahead_s)} ({b.ahead_s / b.time_s:.1%}) before" if b.ahead_s else "as slow as"
        gain = f"; as fast as that, a step would gain {seconds(b.per_step_s)}" if b.ahead_s else ""
        after.append(f"slowest: rank {b.stage}, {seconds(b.time_s)} a micro-batch, {ahead} rank {b.next_stage}{gain}")
    after += _typed(e.ranks)
    title = "What binds each pipeline rank" + (f" ({len(shown)} of {len(e.ranks)})" if len(shown) < len(e.ranks) else "")
    left, right = ("rank", "layers", "recompute", "binds"), ("slack", "+layer", "-recomp.", "time")
    return Block(title, (), left, right, rows, after)


def _typed(ranks: Sequence[Rank]) -> list[str]:
    """Which ranks are on which of two device types."""
    runs = [(name, [r.stage for r in same]) for name, same in groupby(ranks, key=lambda r: r.hardware) if name]
    where = [f"ranks {s[0]}-{s[-1]}" if len(s) > 1 else f"rank {s[0]}" for _, s in runs]
    lines = [", ".join(f"{at} on {name}" for at, (name, _) in zip(where, runs, strict=True))] if runs else []
    return [f"{line}; the link between them is the slower one of both networks" for line in lines]


def _one_type(e: Explanation) -> Block:
    """Each device type alone, and all devices at the slower one's speed."""
    rows = [
        (
            f"{t.what} ({t.gpus:,})", t.layout or t.reason or "",
            "" if t.step_time_s is None else seconds(t.step_time_s) + ("" if t.proven else ", not proven"),
            "" if t.times_the_plan is None else f"{t.times_the_plan:.2f}",
        )
        for t in e.one_type
    ]  # fmt: skip
    rows.append(("both (the plan)", e.name, seconds(e.step_time_s), "1.00"))
    return Block("What one device type would do", (), ("devices", "layout"), ("step", "times the plan"), rows)


def _by_reason(ranks: Sequence[Rank]) -> list[tuple[str, str]]:
    """Ranks by the sentence that says what binds them."""
    found: dict[str, list[str]] = {}
    for r in ranks:
        found.setdefault(r.reason, []).append(str(r.stage))
    return [(", ".join(who), reason) for reason, who in found.items()]


def _ends(ranks: Sequence[Rank], keep: set[int]) -> list[Rank]:
    """All ranks of a short pipeline; the ends of a long one and those to keep."""
    if len(ranks) <= _MANY:
        return list(ranks)
    return [ranks[i] for i in sorted({0, 1, 2, len(ranks) - 2, len(ranks) - 1} | keep)]


def _excluded(lines: Sequence[Excluded], layouts: int) -> Block:
    """The histogram of the proof."""
    rows = [(f"{x.rule}: {x.words}" if x.rule else x.words, f"{x.layouts:,}", f"{x.share:.1%}") for x in lines]
    return Block(f"What became of the {layouts:,} layouts of the declared space", (), ("why",), ("layouts", "share"), rows)


def _mesh(title: str, mesh: Mesh) -> Block:
    rows = [(g.name, g.tier or "-", f"{g.size:,}", f"{g.stride:,}", f"{g.groups:,}") for g in mesh.groups]
    shape = ", ".join(f"{n} {size}" for n, size in zip(mesh.dimensions, mesh.shape, strict=True))
    return Block(f"{title} ({shape})", (), ("group", "network"), ("ranks", "stride", "groups"), rows)


def _nodes(nodes: Sequence[Node], dense: Mesh, experts: bool) -> Block:
    """Which ranks each node holds; coordinates run through a node in order."""
    rows: list[tuple[str, ...]] = []
    if len(nodes) == 1 and len(nodes[0].places) <= 16:
        for place in nodes[0].places:
            rows.append(("0", str(place.rank), _at(place.dense), "", *((_at(place.expert), "") if experts else ())))
    else:
        shown = nodes if len(nodes) <= _MANY else [*nodes[:4], *nodes[-2:]]
        for i, node in enumerate(shown):
            if len(nodes) > _MANY and i == 4:
                rows.append(("...",) + ("",) * (5 if experts else 3))
            first, last = node.places[0], node.places[-1]
            more = (_at(first.expert), _at(last.expert)) if experts else ()
            number = f"{node.node} {node.hardware}" if node.hardware else str(node.node)
            rows.append((number, f"{first.rank}-{last.rank}", _at(first.dense), _at(last.dense), *more))
    left = ["node", "ranks", ",".join(dense.dimensions), "to"] + ["pp,edp,ep,etp", "to "] * experts
    if not any(row[3] for row in rows):
        keep = [0, 1, 2, 4][: 4 if experts else 3]
        rows, left = [tuple(row[i] for i in keep) for row in rows], [left[i] for i in keep]
    return Block(
        f"Where each rank is ({dense.dimensions[-1]} innermost, then {', '.join(dense.dimensions[-2::-1])})", (), left, (), rows
    )


def _at(coordinates: Sequence[int]) -> str:
    return ",".join(map(str, coordinates))


# ---- why not -------------------------------------------------------------------------------------------------------


def _pins(answer: WhyNot) -> str:
    return ", ".join(f"{name} {','.join(str(v).lower() for v in values)}" for name, values in answer.pins.items())


def _answer(w: WhyNot, title: str) -> Iterator[Block]:
    """The answer to a question, and what stands behind it."""
    yield Block(title, [_sentence(w.sentence), *(f"note: {note}" for note in w.notes)])
    if w.loss is not None and w.verdict != "the plan":
        facts = [w.loss.name, f"  {seconds(w.loss.step_time_s)} a step, peak {w.loss.peak_gib:.1f} GiB", f"  {w.loss.sentence}"]
        proof = "proven the fastest" if w.status == "optimal" else "the fastest found; the search ended early"
        yield Block(f"The best such layout ({proof} of {w.layouts:,})", facts)
    if w.broken:
        lines = [line for b in w.broken for line in (f"{b.code} {b.what}", f"  {b.why}")]
        yield Block("Broken rules", lines)
    if w.shortfall is not None:
        s = w.shortfall
        unit, scale = ("GiB", 1.0) if s.needs_gib >= 1 else ("MiB", 1024.0)
        parts = ", ".join(f"{name} {value * scale:.1f}" for name, value in s.parts.items() if value * scale >= 0.05)
        over = f"  stage {s.stage} needs {gib(s.needs_gib * GIB)}, {gib(s.over_gib * GIB)} too much: {s.cause}"
        yield Block(_CLOSEST, [s.name, over, f"  {unit}: {parts}"])
    if w.conflict is not None and (len(w.conflict.members) > 1 or w.conflict.stages):
        alone = "this alone cannot hold" if len(w.conflict.members) == 1 else "not all can hold; without any one the others can"
        yield Block("What conflicts", ["{" + ", ".join(_runs(w)) + "}", alone])
    if allowed := {axis: values for axis, values in w.allowed.items() if values}:
        lines = [f"{axis}: {', '.join(map(str, values))}" for axis, values in allowed.items()]
        yield Block("What the rules leave, the rest as asked", lines)
    if w.changes:
        yield Block("What would fit, cheapest first", [change_line(c) for c in w.changes])
    elif w.verdict == "does not fit":
        yield Block("What would fit", ["no single change that was tried"])


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] if text[:1].isalpha() and "=" not in text.split(" ")[0] else text


def _runs(w: WhyNot) -> list[str]:
    """The members of a conflict, runs of stages folded."""
    assert w.conflict is not None
    stages = w.conflict.stages
    if len(stages) > 3 and stages == list(range(stages[0], stages[-1] + 1)):
        return [f"memory of each of the stages {stages[0]}-{stages[-1]}"] + ["all layers placed"] * w.conflict.all_layers
    return list(w.conflict.members)


def change_line(c: Change) -> str:
    """A change with what was proven about it."""
    proof = "proven the fastest" if c.status == "optimal" else "proven to fit; perhaps not the fastest"
    return f"{c.text}: {seconds(c.step_time_s)} a step ({proof})"
