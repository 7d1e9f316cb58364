"""Device and node counts as people give them: one, a list, a range, or a mixture of these."""

from __future__ import annotations

import re
from collections.abc import Iterable

from planner.errors import InputError, input_error

MAX_COUNTS = 1000
"""Counts that one table may have."""
_FIX = "write 64, a list 64,128,256 or a range 8:64:8 (first, last, step)"
_WHOLE = r"[0-9]{1,9}"


def parse_counts(given: str | int | Iterable[int], flag: str) -> tuple[int, ...]:
    """Counts in ascending order, each once. `given`: "8", "8,16,32", "8:64:8" (the last one included, step 1 when left out),
    "1,2,4:16:4", or numbers. Raises InputError, naming `flag`.
    """
    if isinstance(given, str):
        found = [count for item in given.split(",") for count in _item(item.strip(), given, flag)]
    else:
        numbers = [given] if isinstance(given, int) else list(given)
        if wrong := [n for n in numbers if not isinstance(n, int) or isinstance(n, bool)]:
            raise input_error("PLN126", f"{flag} {wrong[0]!r}: not a whole number", "", _FIX)
        found = numbers
    if not found or min(found) < 1:
        raise input_error("PLN131", f"{flag} {given}: a cluster has at least one", "", f"give {flag} 1 or more")
    counts = tuple(sorted(set(found)))
    if len(counts) > MAX_COUNTS:
        raise _too_many(given, flag, len(counts))
    return counts


def several(given: str | None) -> bool:
    """Whether a text asks for a table of counts, even of one row."""
    return given is not None and ("," in given or ":" in given)


def _item(text: str, given: str, flag: str) -> Iterable[int]:
    """The counts of one item of a list."""
    match = re.fullmatch(rf"({_WHOLE})(?::({_WHOLE})(?::({_WHOLE}))?)?", text, flags=re.ASCII)
    if not match:
        what = f"{flag} {given}" if text == given else f"{flag} {given}: {text or 'an empty item'}"
        raise input_error("PLN126", f"{what} is not a count or a range", "", _FIX)
    first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
    if last < first or step < 1:
        why = "its step is zero" if step < 1 else "it ends before it begins"
        raise input_error("PLN126", f"{flag} {given}: {text} is an empty range", why, _FIX)
    counts = range(first, last + 1, step)
    if len(counts) > MAX_COUNTS:
        raise _too_many(given, flag, len(counts))
    return counts


def _too_many(given: object, flag: str, found: int) -> InputError:
    why = f"at most {MAX_COUNTS} are compared"
    return input_error("PLN126", f"{flag} {given}: {found:,} counts", why, "take a larger step, such as 8:1024:8")
