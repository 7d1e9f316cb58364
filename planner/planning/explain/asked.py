"""A space as a person restricts it: pins and forbids, that can be lifted one at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from planner.cost.task import Task
from planner.engines.base import Engine
from planner.search.space import Space, axis_forbidden, axis_named, declared_space, with_pins

Pins = Mapping[str, Sequence[object]]

ANY = Space((1,), (1,), (1,), (1,), (0,), ((0, 1),), (0,))
"""One row: what pins are checked on."""


@dataclass(frozen=True)
class Asked:
    """Restrictions on the declared space; pins hold whether or not their values are declared."""

    pins: Pins = field(default_factory=dict)
    """By the full name of the axis."""
    forbid: Sequence[str] = ()

    @classmethod
    def of(cls, pins: Pins, forbid: Sequence[str] = (), flag: str = "--pin") -> Asked:
        """Pins under any name of their axes, checked. Raises InputError for an unknown axis or value, naming `flag`."""
        named = {axis_named(name, flag): list(values) for name, values in pins.items()}
        with_pins(ANY, named, flag)
        return cls(named, tuple(forbid))

    def space(self, task: Task, engine: Engine) -> Space:
        """What is left of the declared space of a task."""
        return with_pins(declared_space(task, engine, {}, self.forbid), self.pins)

    @property
    def axes(self) -> list[str]:
        """The restricted axes."""
        return list(dict.fromkeys([*self.pins, *map(axis_forbidden, self.forbid)]))

    def without(self, axis: str) -> Asked:
        """The same with one axis free; a schedule and its virtual stages go together."""
        lifted = {"schedule", "virtual_stages"} if axis in ("schedule", "virtual_stages") else {axis}
        pins = {name: values for name, values in self.pins.items() if name not in lifted}
        return Asked(pins, tuple(name for name in self.forbid if axis_forbidden(name) not in lifted))

    def also(self, pins: Pins) -> Asked:
        """The same with these pins in place of what there was about their axes. Raises InputError for an unknown axis."""
        named, result = Asked.of(pins).pins, self
        for axis in named:
            result = result.without(axis)
        return replace(result, pins={**result.pins, **named})
