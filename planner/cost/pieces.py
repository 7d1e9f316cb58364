"""What a head costs that makes its loss and gradients piece by piece (`specs.pieces` cuts)."""

from __future__ import annotations

import numpy as np

from planner.cost.task import Floats
from planner.specs.pieces import piece_count


def gradient_bytes(tokens: Floats, row_bytes: Floats, compute_bytes: int) -> tuple[Floats, Floats]:
    """Bytes a parameter of the head: (of its gradient while pieces add up, of the result beside it).

    A single piece makes the result at once; several add up in fp32, to be converted at the end.
    """
    several = (piece_count(tokens, row_bytes) > 1) & (compute_bytes < 4)
    return np.where(several, 4.0, compute_bytes), np.where(several, float(compute_bytes), 0.0)


def more_traffic(tokens: Floats, row_bytes: Floats, compute_bytes: int) -> Floats:
    """Bytes moved a parameter of the head because its gradient adds up in fp32: read and written by each piece, converted."""
    count = piece_count(tokens, row_bytes)
    return np.where((count > 1) & (compute_bytes < 4), 8.0 * count + compute_bytes, 0.0)
