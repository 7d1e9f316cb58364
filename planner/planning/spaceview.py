"""The declared space, described: the values of each axis, why they are those, and how many layouts there are; unsolved.

Comes in: a request. Goes out: `SpaceView`. An outer row is a layout without its split of layers and recompute; each row that
obeys the rules stands for all its splits and mixes, which are counted too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from math import comb
from typing import Any

import numpy as np

from planner.cost.task import LayoutArray, Task, splits_backward
from planner.engines.problems import job_problems
from planner.errors import InputError
from planner.planning.request import Request, Setting, prepare
from planner.search.space import MAX_CHUNKS, MAX_MICRO_BATCH, NAMED, SHORT, Space, declared_space, enumerate_rows
from planner.specs.layout import CONTEXTS, RECOMPUTE_MODES, SCHEDULES
from planner.specs.model import Model

FORMAT, VERSION = "planner.space", "1.0"


@dataclass(frozen=True)
class Axis:
    """One axis: its values in the space, and why they are those."""

    name: str
    values: tuple[Any, ...]
    why: str
    restricted: str = ""
    """The pins and forbids that apply to it, as flags."""
    without: tuple[Any, ...] = ()
    """Values that those took away."""


@dataclass(frozen=True)
class SpaceView:
    """The axes and the counts of a declared space."""

    model: str
    hardware: str
    engine: str
    gpus: int
    axes: tuple[Axis, ...]
    enumerated: int
    """Outer rows of the grid."""
    rules: Mapping[str, int]
    """Rows that each rule excludes, by the first rule that a row breaks."""
    kept: int
    """Rows that obey every rule; memory and bounds are not looked at."""
    layouts: int
    """Layouts that the kept rows stand for: every split of the layers over the ranks, every recompute mix in a rank."""

    def to_data(self) -> dict[str, Any]:
        """Plain JSON data. `layouts` is text: JSON readers may round it."""
        axes = [{f.name: _plain(getattr(axis, f.name)) for f in fields(Axis)} for axis in self.axes]
        return {
            "format": FORMAT, "version": VERSION, "model": self.model, "hardware": self.hardware, "engine": self.engine,
            "gpus": self.gpus, "axes": axes, "enumerated": self.enumerated, "by_rule": self.enumerated - self.kept,
            "rules": dict(self.rules), "kept": self.kept, "layouts": str(self.layouts),
        }  # fmt: skip


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def space_view(request: Request) -> SpaceView:
    """The declared space of a request. Raises InputError."""
    setting = prepare(request)
    if problems := job_problems(setting.task, setting.engine):
        raise InputError(problems)
    task, engine = setting.task, setting.engine
    space = declared_space(task, engine, request.pins, request.forbid)
    whole = declared_space(task, engine, {}, [])
    rows = enumerate_rows(task, engine, space)
    flags = _flags(request.pins, request.forbid)
    reasons = _reasons(setting)
    before = _values(whole)
    axes = []
    for name, values in _values(space).items():
        if (name == "type_order" and not task.types) or (name == "context" and before[name] == CONTEXTS[:1]):
            continue
        gone = tuple(v for v in before[name] if v not in values)
        axes.append(Axis(name, values, reasons.get(name, ""), " ".join(flags.get(name, ())), gone))
    return SpaceView(
        task.model.name, " + ".join(h.name for h in task.profiles), engine.name, task.gpus, tuple(axes), rows.enumerated,
        rows.rejected, len(rows.layouts), explicit_layouts(rows.layouts, task.model, space.modes),
    )  # fmt: skip


def _values(space: Space) -> dict[str, tuple[Any, ...]]:
    """Values by axis, codes as names."""
    named: dict[str, tuple[Any, ...]] = {}
    for f in fields(Space):
        value = getattr(space, f.name)
        if f.name == "schedules":
            named["schedule"] = tuple(dict.fromkeys(SCHEDULES[code] for code, _ in value))
            named["virtual_stages"] = tuple(sorted({v for _, v in value}))
        elif f.name == "modes":
            named["recompute"] = tuple(RECOMPUTE_MODES[m] for m in value)
        elif f.name in NAMED:
            names = NAMED[f.name]
            named[f.name] = tuple(names[code] for code in value)
        elif f.name == "sequence_parallel":
            named[f.name] = tuple(bool(v) for v in value)
        elif isinstance(value, tuple):
            named[f.name] = value
    return named


def _flags(pins: Mapping[str, Sequence[object]], forbid: Sequence[str]) -> dict[str, list[str]]:
    """Pins and forbids by the axis that they restrict."""
    found: dict[str, list[str]] = {}
    for name, values in pins.items():
        found.setdefault(SHORT.get(name, name), []).append(f"--pin {name}={','.join(map(str, values))}")
    for name in forbid:
        axis = "schedule" if name in SCHEDULES else "recompute" if name in RECOMPUTE_MODES else SHORT.get(name, name)
        found.setdefault(axis, []).append(f"--forbid {name}")
    return found


def _reasons(setting: Setting) -> dict[str, str]:
    """Why each axis has the values that it has without pins and forbids."""
    task, engine = setting.task, setting.engine
    fast = min(h.network[0].size or h.node_size for h in task.profiles)
    devices = f"divisors of {task.gpus:,} devices"
    experts = bool(task.model.routed_mlps)
    spread = "divisors of the number of experts" if engine.expert_parallel else f"{engine.name} does not spread experts"
    return {
        "tp": f"{devices}, inside the fastest network domain of {fast}",
        "cp": f"powers of two among the {devices}, up to 64" if engine.context_parallel else f"{engine.name} has no cp",
        "pp": f"{devices}, at most one rank a layer ({task.model.n_layers})",
        "dp": "follows: devices / (tp cp pp)",
        "ep": spread if experts else "the model routes no experts",
        "etp": "1 or tp, where it divides the experts' width" if experts and engine.expert_parallel else "no experts to split",
        "zero": f"stages that {engine.name} has",
        "micro_batch": f"powers of two up to {MAX_MICRO_BATCH}; a pin may name any size",
        "schedule": f"schedules that {engine.name} has; none where pp is 1",
        "virtual_stages": f"with interleaved, interleaved-zb: up to {MAX_CHUNKS}, divisors of {task.model.n_layers} layers, "
        "powers of two; 2 with zbv, dualpipev",
        "sequence_parallel": f"what {engine.name} allows; only with tp",
        "offload": f"what {engine.name} can keep in host memory",
        "order": f"rank orders of {engine.name}, where they differ: which axes are neighbours in the network",
        "type_order": _type_order(task),
        "context": f"how {engine.name} shares the attention of a cp group: its own way, {engine.accounting.context}, or a ring",
        "recompute": "of each layer, any mix inside a rank (one mode a rank with virtual stages)",
    }


def _type_order(task: Task) -> str:
    """What is searched on two device types."""
    if not task.types:
        return ""
    first, second = (f"{t.gpus:,} x {t.hardware.name}" for t in task.types)
    return (
        f"which type holds the first stages: {first} (as-named) or {second} (reversed); every stage is wholly on one type, all "
        "devices are used, the layers and recompute of each stage are free, one chunk a rank"
    )


def explicit_layouts(x: LayoutArray, model: Model, modes: Sequence[int]) -> int:
    """How many layouts rows stand for: splits of L layers over pp ranks, times recompute counts of every rank. Exact.

    Without chunks a rank of n layers has C(n + k - 1, k - 1) mixes of k modes, so that splits and mixes together are the
    coefficient of z^L in (1 / (1 - z)^k - 1)^pp. With v chunks a rank has k choices, and ceil(L / v) positions are
    split; where v does not divide L, the last rank has two of them at least. A split backward leaves a rank one choice.
    """
    choices = np.where(splits_backward(x.schedule), 1, len(modes))
    found, counts = np.unique(np.stack([x.pp, x.virtual_stages, choices]), axis=1, return_counts=True)
    many: Callable[[int, int, int], int] = lru_cache(maxsize=None)(lambda pp, v, k: _inside(model.n_layers, pp, v, k))
    return sum(int(c) * many(*(int(n) for n in row)) for row, c in zip(found.T, counts, strict=True))


def _inside(layers: int, pp: int, v: int, modes: int) -> int:
    """Splits and recompute mixes of one row."""
    if v > 1:
        places = -(-layers // v) - (layers % v > 0)
        return modes**pp * comb(places - 1, pp - 1)
    total = 0
    for j in range(pp + 1):
        top = modes * (pp - j)
        ways = comb(layers + top - 1, top - 1) if top else int(layers == 0)
        total += (-1) ** j * comb(pp, j) * ways
    return total
