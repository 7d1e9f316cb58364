"""Ending work early: signals as a flag, a time limit, and the points at which work looks at both.

A signal may land anywhere, inside an import or inside a solver; an exception raised there could surface as anything. So the
program's handlers, installed before its heavy imports, set a flag, and `check` raises at points where the state is sound.
Lives here because every room may have such points. Comes in: signals, a limit in seconds. Goes out: KeyboardInterrupt and
TimeoutError, from `check` alone. As a library planner installs nothing: Python's own Ctrl-C is as good there.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType

_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)
"""Reading of `time.perf_counter` at which the limit has passed."""
_shielded: ContextVar[bool] = ContextVar("shielded", default=False)
_received = 0
_raises = False


def install() -> None:
    """Turn SIGINT and SIGTERM into a flag from now on; a second one ends the process at once. Ignored signals stay so."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    global _received
    if _received:
        if sys.stderr is not None and sys.stderr.isatty():
            os.write(2, b"\x1b[?25h\n")  # a progress bar hides the cursor
        os._exit(128 + number)
    _received = number
    if _raises:
        raise KeyboardInterrupt


def received() -> int:
    """The signal that came, 0 while there is none."""
    return _received


@contextmanager
def at_once() -> Iterator[None]:
    """Inside, a signal raises KeyboardInterrupt wherever it lands: for commands that have no result to save."""
    global _raises
    before, _raises = _raises, True
    try:
        if _received:
            raise KeyboardInterrupt
        yield
    finally:
        _raises = before


@contextmanager
def limit(seconds: float | None) -> Iterator[None]:
    """Inside, `check` raises once `seconds` have passed; None for no limit of its own. The nearer of nested limits holds."""
    outer = _deadline.get()
    ends = [end for end in (outer, None if seconds is None else time.perf_counter() + seconds) if end is not None]
    token = _deadline.set(min(ends, default=None))
    try:
        yield
    finally:
        _deadline.reset(token)


@contextmanager
def shielded() -> Iterator[None]:
    """Inside, `check` never raises: for what is short and says what was found so far."""
    token = _shielded.set(True)
    try:
        yield
    finally:
        _shielded.reset(token)


def passed() -> bool:
    """Whether the time limit has passed."""
    end = _deadline.get()
    return end is not None and time.perf_counter() > end


def due() -> bool:
    """Whether `check` would raise."""
    return bool(_received) or passed()


def check() -> None:
    """Raise KeyboardInterrupt after a signal, TimeoutError after the limit. Call it where the state is sound."""
    if _shielded.get():
        return
    if _received:
        raise KeyboardInterrupt
    if passed():
        raise TimeoutError
