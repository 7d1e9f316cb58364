"""What a verification found: checks with their verdicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass
class Findings:
    """What one check saw while it looked."""

    text: str = ""
    """What was established, in one line."""
    figures: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """What is wrong; none when the check passes."""

    def expect(self, holds: bool, problem: str) -> None:
        """Note a problem unless something holds."""
        if not holds:
            self.problems.append(problem)

    def equal(self, what: str, stated: object, found: object) -> None:
        """Note a problem unless what the plan states is what was found."""
        self.expect(stated == found, f"{what}: the plan says {_text(stated)}, it is {_text(found)}")


def _text(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Check:
    """One check and its verdict."""

    name: str
    title: str
    verdict: Literal["pass", "FAIL", "skipped"]
    text: str
    """What was established; the first problem where the check failed; why it was skipped."""
    problems: tuple[str, ...]
    figures: dict[str, Any]
    seconds: float

    def to_data(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "name": self.name, "title": self.title, "verdict": self.verdict, "text": self.text,
            "problems": list(self.problems), "figures": self.figures, "seconds": round(self.seconds, 3),
        }  # fmt: skip


@dataclass(frozen=True)
class Report:
    """All checks of a plan."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed: one that was skipped did not."""
        return all(c.verdict == "pass" for c in self.checks)

    @property
    def reason(self) -> str:
        """The first check that failed and why, in one line; empty when all passed."""
        failed = next((c for c in self.checks if c.verdict == "FAIL"), None)
        return "" if failed is None else f"{failed.name}: {failed.text}"

    def to_data(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"passed": self.passed, "reason": self.reason, "checks": [c.to_data() for c in self.checks]}
