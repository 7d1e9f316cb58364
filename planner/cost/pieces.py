"""How the loss of a micro-batch is cut into pieces, where an engine makes head, loss and their gradients piece by piece.

The runtime cuts by this, and the memory model counts by it. It needs no torch.
"""

from __future__ import annotations

import numpy as np

from planner.cost.task import Floats

PIECE_BYTES = 2.0**31
"""Most bytes of one piece's logits: 8,000 tokens of a vocabulary of 128k in bf16. Products of that many rows run at the full
rate on any device, and each further piece adds a pass over the head's gradient in fp32."""


def piece_count(tokens: Floats | float, row_bytes: Floats | float) -> Floats:
    """Pieces of `tokens` rows of logits, `row_bytes` each on one rank."""
    return np.ceil(tokens * row_bytes / PIECE_BYTES)


def piece_tokens(tokens: Floats | float, row_bytes: Floats | float) -> Floats:
    """Rows of the largest piece: all pieces are as long, but for the last."""
    return np.ceil(tokens / piece_count(tokens, row_bytes))


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
