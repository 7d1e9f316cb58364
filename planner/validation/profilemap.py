"""Which profile and which engine accounting stand for a run: an ordered list of rules over a table's columns, as data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from planner.engines.registry import accounting_named
from planner.engines.traits import TRAITS
from planner.errors import input_error
from planner.specs import files
from planner.specs.base import Spec

_COMPARISON = re.compile(r"^(<=|>=|<|>|==|!=)\s*(-?[0-9.]+)$")


class Rule(Spec):
    """Rows whose columns match every pattern of `when`; each pattern is a regular expression (case does not matter, found
    anywhere), a comparison such as `">1"`, or `"blank"`."""

    when: dict[str, str] = Field(default_factory=dict)

    @field_validator("when")
    @classmethod
    def _patterns_compile(cls, patterns: dict[str, str]) -> dict[str, str]:
        for column, pattern in patterns.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{column}: '{pattern}' is no regular expression: {error}") from None
        return patterns

    def matches(self, row: Mapping[str, str]) -> bool:
        """Whether a row's columns (as text, blank for nothing) match."""
        return all(_matches(row.get(column, ""), pattern) for column, pattern in self.when.items())


def _matches(value: str, pattern: str) -> bool:
    if pattern == "blank":
        return value == ""
    comparison = _COMPARISON.match(pattern)
    if comparison is None:
        return re.search(pattern, value, re.IGNORECASE) is not None
    try:
        number, bound = float(value), float(comparison[2])
    except ValueError:
        return False
    operator = comparison[1]
    return {
        "<": number < bound, ">": number > bound, "<=": number <= bound,
        ">=": number >= bound, "==": number == bound, "!=": number != bound,
    }[operator]  # fmt: skip


class ProfileRule(Rule):
    """The hardware profile of some rows."""

    profile: str


class EngineRule(Rule):
    """The engine accounting of some rows."""

    engine: str
    memory: Literal["allocated", "reserved", "device"] = "allocated"
    """What a memory figure of these rows is, where the row does not say."""
    rank: Literal["worst", "first"] = "worst"
    """Which pipeline rank the figure is of."""


class TraitRule(Rule):
    """A trait that some rows add to their engine's accounting."""

    add: str

    @field_validator("add")
    @classmethod
    def _trait_exists(cls, name: str) -> str:
        if name not in TRAITS:
            raise ValueError(f"no engine trait called '{name}'; there are {', '.join(TRAITS)}")
        return name


class Exclusion(Rule):
    """Rows kept out of a metric by a written rule: over the configuration or a missing field, never the measured value."""

    metric: Literal["time", "memory"]
    why: str = Field(min_length=1)


class BlankRule(Rule):
    """A column that a framework fills with another one's value where a source leaves it blank."""

    column: str
    source: str = Field(alias="as")


class StalledRule(Spec):
    """Bounds on the measured times of like runs beyond which one stalled, see `planner.validation.stalled`."""

    slower: float = Field(gt=1)
    """Times the step of a like run on no more devices."""
    dearer: float = Field(gt=1)
    """Times the device time of a like run on more devices."""


class ProfileMap(Spec):
    """First match wins, in profiles and in engines; every matching trait and exclusion counts."""

    profiles: list[ProfileRule] = Field(default_factory=list)
    engines: list[EngineRule] = Field(default_factory=list)
    traits: list[TraitRule] = Field(default_factory=list)
    exclude: list[Exclusion] = Field(default_factory=list)
    blanks: list[BlankRule] = Field(default_factory=list)
    stalled: StalledRule | None = None
    """Bounds for runs that stalled; without them none is left out for it."""

    def profile_of(self, row: Mapping[str, str]) -> str | None:
        """Name or path of the row's hardware profile."""
        return next((r.profile for r in self.profiles if r.matches(row)), None)

    def engine_of(self, row: Mapping[str, str]) -> EngineRule | None:
        """The row's engine accounting, its traits added."""
        rule = next((r for r in self.engines if r.matches(row)), None)
        if rule is None:
            return None
        present = rule.engine.split("+")
        added = [t.add for t in self.traits if t.matches({**row, "engine": rule.engine}) and t.add not in present]
        return rule.model_copy(update={"engine": "+".join([rule.engine, *dict.fromkeys(added)])})

    def completed(self, row: Mapping[str, str]) -> dict[str, str]:
        """The row with its framework's defaults in blank columns."""
        found = dict(row)
        for rule in self.blanks:
            if not found.get(rule.column) and rule.matches(found):
                found[rule.column] = found.get(rule.source, "")
        return found

    def excluded(self, row: Mapping[str, str], metric: str) -> str:
        """Why a row stays out of a metric, empty when it does not."""
        return next((e.why for e in self.exclude if e.metric == metric and e.matches(row)), "")


def load_map(path: str | None) -> ProfileMap:
    """The shipped map, or the rules of a file before it. Raises InputError."""
    shipped = files.build(ProfileMap, files.parse_document(str(resources.files("planner.validation") / "profilemap.yaml")))
    if path is None:
        return shipped
    own = files.build(ProfileMap, files.parse_document(path))
    base = Path(path).parent
    for rule in own.engines:
        accounting_named(rule.engine)
    profiles = [
        r.model_copy(update={"profile": str(base / r.profile)}) if (base / r.profile).is_file() else r for r in own.profiles
    ]
    if not (own.profiles or own.engines or own.traits or own.exclude or own.blanks or own.stalled):
        raise input_error(
            "PLN140", f"{path} holds no rules", "a map has profiles, engines, traits, exclude, blanks or stalled", ""
        )
    return ProfileMap(
        profiles=profiles + shipped.profiles, engines=own.engines + shipped.engines,
        traits=own.traits + shipped.traits, exclude=own.exclude + shipped.exclude, blanks=own.blanks + shipped.blanks,
        stalled=own.stalled or shipped.stalled,
    )  # fmt: skip
