"""The figures of an estimate by name, and how far to trust each: from the profile, the engine, the fit, or the source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args

from planner.cost.accounting import Accounting, Elementwise, ZeroRule
from planner.cost.task import Task
from planner.engines.registry import accounting_named, engine_named
from planner.engines.traits import TRAITS
from planner.planning.detail.tables import Source, Value
from planner.specs.calibration import CONSTANTS
from planner.specs.figures import Figure, Provenance
from planner.specs.hardware import Tier

_TRUST = get_args(Provenance)
_NO_ORIGIN = "not stated by the engine's accounting"
_PRIOR = "prior: not fitted for this engine on this machine"


class Book:
    """All figures of a task by name."""

    def __init__(self, task: Task, rule: int):
        """`rule`: the key of the layout's among the accounting's."""
        self.figures = _hardware_figures(task) | _engine_figures(task.accounting, rule) | _constants(task)

    def used(self, names: set[str]) -> tuple[Source, ...]:
        """The figures with these names, in a fixed order."""
        return tuple(f for name, f in self.figures.items() if name in names)

    def least(self, names: Iterable[str]) -> tuple[str, str]:
        """(provenance, name) of the least certain figure; factors left at 1 do not count, nor does what grows all times."""
        known = [self.figures[n] for n in names if n in self.figures and n != "constant.scale"]
        known = [f for f in known if not (f.source == _PRIOR and f.value == 1.0)]
        if not known:
            return "", ""
        worst = max(known, key=lambda f: _TRUST.index(f.provenance))
        return worst.provenance, worst.name


def _hardware_figures(task: Task) -> dict[str, Source]:
    """Figures of the profile, and those that are in the source."""
    h, d = task.hardware, task.hardware.device
    plain: dict[str, Figure] = {f"device.peak.{name}": figure for name, figure in d.peak.items()}
    names = ("memory", "memory_bandwidth", "memory_efficiency", "context", "communicator", "workspace", "launch", "sustained")
    plain |= {f"device.{name}": getattr(d, name) for name in names} | {"overlap_slowdown": h.overlap_slowdown}
    found = {n: Source(n, f.value, f.provenance, f.source) for n, f in plain.items()}
    for name, model in (("gemm", d.gemm), ("attention", d.attention)):
        values = model.model_dump(exclude={"provenance", "source"})
        text = ", ".join(f"{k} {v}" for k, v in values.items())
        found[f"device.{name}"] = Source(f"device.{name}", text, model.provenance, model.source)
    for tier in h.network:
        found |= tier_figures(tier)
    for name, value, provenance, source in _IN_CODE:
        found[name] = Source(name, value, provenance, source)
    return found


_IN_CODE: tuple[tuple[str, str, Provenance, str], ...] = (
    ("code.NARROW_SHARE", "fp8 0.91, fp4 0.80", "fitted", "planner.cost.task: published runs of the Transformer Engine stack"),
    ("code.UNFUSED_RATE", "0.55, 0.08 unaligned", "assumed", "planner.cost.compute: batched products of unfused attention"),
    (
        "code.ODD_RATE",
        "0.75e12 FLOP/s a unit at odd rows, 1.5e12 at even ones",
        "measured",
        "planner.cost.compute: H200, torch 2.11",
    ),
)


def tier_figures(tier: Tier) -> dict[str, Source]:
    """Figures of one network tier."""
    place = f"network.{tier.name}"
    found = {}
    for name in ("bandwidth", "latency", "all_reduce"):
        figure = getattr(tier, name)
        if figure is not None:
            found[f"{place}.{name}"] = Source(f"{place}.{name}", figure.value, figure.provenance, figure.source)
    for name in ("efficiency", "by_domains"):
        curve = getattr(tier, name)
        if curve is not None:
            text = ", ".join(f"{size:g}: {value:g}" for size, value in curve.points)
            found[f"{place}.{name}"] = Source(f"{place}.{name}", text, curve.provenance, curve.source)
    return found


def _engine_figures(accounting: Accounting, rule: int) -> dict[str, Source]:
    """Values of the engine's accounting, of its ZeRO rules the one with a key; a field that a trait replaced has the trait's
    source."""
    base, *traits = accounting.name.split("+")
    origins = dict(accounting.origin)
    before = engine_named(base).accounting
    for i, name in enumerate(traits, start=1):
        after = accounting_named("+".join([base, *traits[:i]]))
        changed = [k for k in vars(after) if k not in ("name", "origin") and getattr(after, k) != getattr(before, k)]
        origins |= dict.fromkeys(changed, f"trait {name}, {TRAITS[name].what}: {TRAITS[name].source}")
        before = after
    found = {}
    for key, value in vars(accounting).items():
        if key not in ("name", "origin"):
            origin = origins.get(key) or origins.get(_SAME_ORIGIN.get(key, ""), "")
            short = _short(value.get(rule) if key == "zero" else value)
            found[f"engine.{key}"] = Source(f"engine.{key}", short, _trust_of(origin), origin or _NO_ORIGIN)
    return found


_SAME_ORIGIN = {
    "elementwise_backward": "elementwise_forward", "kernels_backward": "kernels_forward", "kernels_tp": "kernels_forward",
    "kernels_gather": "kernels_forward", "logit_bytes_split": "logit_bytes", "logit_bytes_fp32": "logit_bytes",
    "kernels_padded": "kernels_expert", "optimizer_whole_bytes": "optimizer_bytes", "whole_sums": "reduce_copies",
}  # fmt: skip
"""Fields whose origin another one's text covers."""

_WORDS: tuple[tuple[str, Provenance], ...] = (
    ("assumed", "assumed"), ("fitted", "fitted"), ("published run", "fitted"), ("regression", "fitted"),
    ("measured", "measured"), ("median", "measured"),
)  # fmt: skip


def _trust_of(origin: str) -> Provenance:
    """How far to trust an accounting value, from the words of its origin; a documented or counted one is a `datasheet`."""
    if not origin:
        return "assumed"
    return next((kind for word, kind in _WORDS if word in origin), "datasheet")


def _short(value: Any) -> Value:
    """An accounting value as a number or short text."""
    if isinstance(value, (bool, str)):
        return str(value)
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, ZeroRule):
        return ", ".join(f"{h.part} {h.size}{' / D' if h.shard else ''}" for h in value.backward) + " bytes a parameter"
    if isinstance(value, tuple):
        numbers = all(isinstance(v, (int, float)) for v in value)
        return ", ".join(f"{v:g}" for v in value) if numbers else f"{len(value)} tensors"
    if isinstance(value, dict):
        nested = any(isinstance(v, (dict, Elementwise)) for v in value.values())
        return "; ".join(f"{k}: {_short(v)}" for k, v in value.items()) if nested else _pairs(value)
    return _pairs(vars(value)) if isinstance(value, Elementwise) else " ".join(str(value).split())


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in values.items()) or "nothing"


def _constants(task: Task) -> dict[str, Source]:
    """Fitted constants, or their priors."""
    fitted = task.calibration.constants
    found = {}
    for name, constant in CONSTANTS.items():
        key = f"constant.{name}"
        figure = fitted.get(name)
        found[key] = (
            Source(key, figure.base, figure.provenance, figure.source)
            if figure is not None
            else Source(key, constant.prior, "assumed", _PRIOR)
        )
    return found


def growth_figures(task: Task) -> tuple[str, ...]:
    """All times grow with the cluster beyond one node."""
    return ("constant.scale",) if task.growth != 1.0 else ()
