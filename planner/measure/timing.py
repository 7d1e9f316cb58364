"""Seconds of one call: the device's own clock where it has one, the median of several calls anywhere."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

Call = Callable[[], object]
AHEAD = 12e-6
"""Host seconds that one eager call may take to launch: how long the device is held back so that launches do not count."""
_QUEUE = 300
"""Launches in flight: below the depth of the driver's queue, where launching would block."""


class Clock:
    """Times calls on one kind of device."""

    def __init__(self, kind: str) -> None:
        self.cuda = kind == "cuda"

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            import torch

            torch.cuda.synchronize()

    def seconds(self, call: Call, budget: float) -> float:
        """Median seconds of a call, spending about `budget` seconds on it; warmed up before."""
        call()
        call()
        self.synchronize()
        once = max(self._wall(call), 1e-7)
        if not self.cuda:
            times = [once] + [self._wall(call) for _ in range(max(2, min(50, int(budget / once))) - 1)]
            return statistics.median(times)
        once = max(self._batches(call, 3, 1), 1e-7)
        inner = max(1, min(20, round(1e-4 / once)))
        return self._batches(call, max(5, min(_QUEUE // inner, int(budget / (inner * once)))), inner)

    def together(self, call: Call, count: int) -> float:
        """Mean seconds of `count` calls launched back to back: of collectives, whose ranks must agree on the count."""
        self.synchronize()
        if not self.cuda:
            return self._wall(lambda: [call() for _ in range(count)]) / count
        return self._batches(call, 1, count, ahead=5 * AHEAD)

    def at_once(self, call: Call) -> float:
        """Seconds of one call that launches a few dozen things, on several streams maybe: they start once all are launched."""
        if not self.cuda:
            return self._wall(call)
        import torch

        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(int(2e9 * 60 * 5 * AHEAD))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def host_seconds(self, call: Call, count: int) -> float:
        """Mean host seconds to launch a call; `count` of them, fewer than the queue is deep."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        spent = time.perf_counter() - start
        self.synchronize()
        return spent / count

    def _wall(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start

    def _batches(self, call: Call, outer: int, inner: int, ahead: float = AHEAD) -> float:
        """Median over `outer` batches of `inner` calls between CUDA events, launched while the device sleeps."""
        import torch

        marks = [torch.cuda.Event(enable_timing=True) for _ in range(outer + 1)]  # type: ignore[no-untyped-call]
        torch.cuda._sleep(int(2e9 * min(0.02, ahead * outer * (inner + 1))))  # type: ignore[no-untyped-call]
        marks[0].record()
        for mark in marks[1:]:
            for _ in range(inner):
                call()
            mark.record()
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)) / 1e3 / inner
