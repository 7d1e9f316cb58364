"""How one value of a configuration is read: its spellings, its type, and what it is when the file leaves it out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from planner.errors import Location, input_error

Config = dict[str, Any]
Locate = Callable[..., Location]
"""The place of a key of the file, given as its path."""

REQUIRED: Any = object()
"""Default of a field that a file has to give."""
_ABSENT: Any = object()
AS_ABSENT: Any = object()
"""An explicit null means the same as leaving the field out."""


@dataclass(frozen=True)
class Field:
    """One field of a family: `names` are its spellings, old and new, dots for nesting; the first that is there counts."""

    names: tuple[str, ...]
    what: str
    fits: Callable[[Any], bool]
    default: Any = REQUIRED
    null: Any = AS_ABSENT


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= least


def size(*names: str, default: Any = REQUIRED, null: Any = AS_ABSENT) -> Field:
    """A whole number above zero."""
    return Field(names, "a whole number above zero", _whole(1), default, null)


def layers(*names: str, default: Any = REQUIRED) -> Field:
    """How many layers there are."""
    return Field(names, "a whole number from 1 to 10,000", lambda v: _whole(1)(v) and v <= 10_000, default)


def number_of(*names: str, default: Any = 0, null: Any = AS_ABSENT) -> Field:
    """A whole number, zero allowed."""
    return Field(names, "a whole number", _whole(0), default, null)


def number(*names: str, default: Any, null: Any = AS_ABSENT) -> Field:
    """A number."""
    return Field(names, "a number", lambda v: isinstance(v, (int, float)) and not isinstance(v, bool), default, null)


def flag(*names: str, default: bool) -> Field:
    """True or false."""
    return Field(names, "true or false", lambda v: isinstance(v, bool), default)


def text(*names: str, default: str) -> Field:
    """A name."""
    return Field(names, "a name", lambda v: isinstance(v, str), default)


def names_of(*names: str) -> Field:
    """A list of names, one a layer; None when left out."""
    return Field(names, "a list of names", lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v), None)


def numbers(*names: str) -> Field:
    """A list of whole numbers; None when left out."""
    return Field(names, "a list of whole numbers", lambda v: isinstance(v, list) and all(_whole(0)(x) for x in v), None)


class Terms:
    """The terms of one configuration: a family's table, looked up in the file.

    `terms["hidden"]` is a constant of the family, a field of the file, or the result of the family's rule.
    """

    def __init__(self, config: Config, family: str, table: dict[str, Any], locate: Locate):
        self.config, self.family, self.table, self.locate = config, family, table, locate

    def __getitem__(self, term: str) -> Any:
        entry = self.table[term]
        if isinstance(entry, Field):
            return self.read(entry)
        return entry(self) if callable(entry) else entry

    def read(self, field: Field) -> Any:
        """The value of a field, checked. Raises InputError."""
        there = [(name, _get(self.config, name)) for name in field.names]
        given = [(name, value) for name, value in there if value is not None and value is not _ABSENT]
        if not given:
            null = any(value is None for _, value in there)
            value = field.null if null and field.null is not AS_ABSENT else field.default
            if value is REQUIRED:
                self.refuse(f"{self.family} configuration lacks {field.names[0]}", "sizes cannot be derived", "add it")
            return value
        for name, value in given:
            if not field.fits(value):
                self.refuse(f"{self.family} configuration: {name} = {shown(value)}", f"it is {field.what}", "correct it", name)
        whole = [(name, value) for name, value in given if isinstance(value, int) and not isinstance(value, bool)]
        if len({value for _, value in whole}) > 1:
            both = " and ".join(f"{name} = {value}" for name, value in whole)
            self.refuse(f"{self.family} configuration: {both}", "two names of one size disagree", "keep one", whole[1][0])
        return given[0][1]

    def lacking(self) -> list[str]:
        """Required fields that the file does not have."""
        fields = [e for e in self.table.values() if isinstance(e, Field) and e.default is REQUIRED]
        absent = [[_ABSENT] if f.null is not AS_ABSENT else [None, _ABSENT] for f in fields]
        return [f.names[0] for f, no in zip(fields, absent, strict=True) if all(_get(self.config, n) in no for n in f.names)]

    def refuse(self, what: str, why: str, fix: str, key: str = "") -> NoReturn:
        """Raise InputError at the place of `key`."""
        raise input_error("PLN112", what, why, fix, self.locate(*key.split(".")) if key else self.locate())


def _get(config: Config, path: str) -> Any:
    """The value at a dotted path; _ABSENT when there is none."""
    value: Any = config
    for part in path.split("."):
        if not isinstance(value, dict) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def shown(value: Any) -> str:
    """A value for a message, shortened."""
    whole = repr(value)
    return whole if len(whole) <= 60 else whole[:57] + "..."
