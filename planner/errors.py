"""One family of errors: every message has a code, a place, a reason with numbers, and a fix.

Lives here: `Problem` (one finding) and the exceptions that carry problems to the command line.
Comes in: nothing of the project. Goes out: what every other room raises.

Codes: 1xx input, 2xx divisibility and shape, 3xx memory, 4xx performance and policy, 5xx engine and target.
Exit codes: 2 input, 3 proven infeasible, 4 time limit, 5 optional part missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True, order=True)
class Location:
    """A place in a file; `line` and `col` count from 1, 0 when unknown."""

    file: str = ""
    line: int = 0
    col: int = 0

    def __str__(self) -> str:
        if not self.file:
            return ""
        return f"{self.file}:{self.line}:{self.col}" if self.line else self.file


@dataclass(frozen=True)
class Problem:
    """One finding. `what` is one line; `why` holds the numbers; `fix` is a concrete edit."""

    code: str
    what: str
    why: str = ""
    fix: str = ""
    location: Location = Location()
    severity: str = "error"
    field: str = ""
    """The key of the layout or job that it is about, such as "tp"."""

    def at(self, location: Location) -> Problem:
        """The same finding at another place."""
        return replace(self, location=location)

    def __str__(self) -> str:
        place = str(self.location)
        head = f"{place}: {self.code} {self.what}" if place else f"{self.code} {self.what}"
        lines = [head]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class PlannerError(Exception):
    """Base of everything that the command line reports without a traceback."""

    exit_code = 70

    def __init__(self, problems: Problem | Iterable[Problem]):
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(p) for p in self.problems))


class InputError(PlannerError):
    """The user's input is wrong: a file, a flag, a value."""

    exit_code = 2


class InfeasibleError(PlannerError):
    """Proven: no layout of the declared space fits."""

    exit_code = 3


class MissingPartError(PlannerError):
    """An optional part (an extra, a launcher's program) is not installed."""

    exit_code = 5


def input_error(code: str, what: str, why: str = "", fix: str = "", location: Location | None = None) -> InputError:
    """An `InputError` with one problem."""
    return InputError(Problem(code, what, why, fix, location or Location()))
