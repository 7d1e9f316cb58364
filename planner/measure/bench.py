"""What every benchmark gets: its device, its clock, the time left, and where rows and progress go."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from planner.measure.records import SECTIONS, Row
from planner.measure.timing import Clock

T = TypeVar("T")

SHARES = {
    "overheads": 0.02, "gemm": 0.30, "attention": 0.15, "memory": 0.08, "sustained": 0.12, "collectives": 0.25, "overlap": 0.08
}  # fmt: skip
"""Share of the time budget of each section."""


@dataclass
class Bench:
    """One process on one device."""

    kind: str
    rank: int
    world: int
    budget: float
    """Seconds for all sections."""
    clock: Clock
    rows: list[Row] = field(default_factory=list)
    section: str = ""
    _end: float = 0.0
    agree: Callable[[bool], bool] | None = None
    """Whether any rank says so; set while process groups exist, because all must take the same turn."""

    @property
    def device(self) -> str:
        """Name of the device for torch."""
        return "cuda" if self.kind == "cuda" else "cpu"

    def start(self, section: str) -> None:
        """Begin a section: its share of the budget counts from now."""
        self.section = section
        self._end = time.monotonic() + SHARES[section] * self.budget
        self.progress(0.0, section)

    def record(self, name: str, value: float, **sizes: int) -> None:
        """Keep a number."""
        self.rows.append(Row(self.section, name, sizes, float(value)))

    def cases(self, items: Sequence[T], least: int = 1, together: bool = False) -> Iterator[T]:
        """The items in turn while the section's time lasts, at least some of them.

        `together`: all ranks stop at the same item, as collectives need.
        """
        for i, item in enumerate(items):
            late = time.monotonic() > self._end
            if together and self.agree is not None:
                late = self.agree(late)
            if late and i >= least:
                return
            self.progress(i / len(items), f"{self.section} {i + 1}/{len(items)}")
            yield item

    def each(self, count: int) -> float:
        """Seconds for one of `count` timings of this section, half of its share left for set-up."""
        return 0.5 * SHARES[self.section] * self.budget / max(count, 1)

    def progress(self, share: float, what: str) -> None:
        """Tell the parent how far the first rank is: a line of JSON."""
        if self.rank:
            return
        before = sum(SHARES[s] for s in SECTIONS[: SECTIONS.index(self.section)])
        message: dict[str, Any] = {"done": before + share * SHARES[self.section], "what": what}
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()
