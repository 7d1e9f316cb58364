"""Lines of one rank's memory as they are found."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from planner.cost import step
from planner.planning.detail.case import Case, Kind
from planner.planning.detail.tables import Bytes, Inputs


@dataclass
class Held:
    """Lines of one rank's memory as they are found."""

    c: Case
    rank: int
    found: list[Bytes] = field(default_factory=list)

    def add(self, part: str, name: str, n_bytes: float, inputs: Inputs, *figures: str) -> None:
        """One line, unless it is empty: less than a byte is rounding."""
        if n_bytes and (part == "rounding" or abs(n_bytes) >= 1):
            self.found.append(Bytes(part, name, float(n_bytes), inputs, *self.c.book.least(figures), figures))

    @cached_property
    def ending(self) -> str | None:
        """The end of a backward that is the rank's peak (`peaks.endings`), None where its middle is."""
        return step.peak_ending(self.c.cost, self.c.q, self.c.x, self.c.stages, self.rank, int(self.c.pooled[self.rank]))

    @property
    def updating(self) -> bool:
        """Whether the rank's peak is the optimizer's update."""
        return self.ending == "update"

    @cached_property
    def peak(self) -> step.AtPeak:
        """What the rank has then."""
        return step.at_peak(self.c.q, self.c.x, self.c.stages, self.rank, self.ending)

    @property
    def most(self) -> int:
        """Micro-batches (of a chunk each) in flight at most."""
        return int(self.c.held.flight[self.rank])

    @property
    def flight(self) -> int:
        """Those in flight at the peak."""
        return round(self.peak.share * self.most)

    @property
    def kinds(self) -> list[tuple[Kind, int]]:
        """The kinds of layers that the rank holds, with their counts."""
        return [(k, int(n)) for k, n in zip(self.c.kinds, self.c.counts[self.rank], strict=True) if n]

    def largest(self, name: str) -> Kind:
        """The kind of layers whose primitive `name` is the largest: it decides a peak."""
        present = [k for k, _ in self.kinds] or [self.c.base]
        return max(present, key=lambda k: int(getattr(k.p, name)[0]))
