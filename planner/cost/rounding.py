"""From float seconds and bytes to the integers of the cost model: always up, so that nothing is understated."""

from __future__ import annotations

from typing import Any

import numpy as np

from planner.cost.task import Floats, Ints


def ceil(values: Any) -> Ints:
    """Round up to int64; a relative slack of 1e-12 keeps whole numbers whole in spite of float rounding."""
    return np.ceil(values * (1.0 - 1e-12)).astype(np.int64)


def nanoseconds(seconds: Floats) -> Ints:
    """Whole nanoseconds of `seconds`, rounded up."""
    return ceil(seconds * 1e9)
