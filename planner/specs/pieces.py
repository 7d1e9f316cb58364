"""How the runtime cuts the loss of a micro-batch into pieces; the memory model counts by the same rule."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
PIECE_BYTES = 2.0**31
"""Most bytes of one piece's logits: 8,000 tokens of a vocabulary of 128k in bf16. Products of that many rows run at the full
rate on any device, and each further piece adds a pass over the head's gradient in fp32."""


def piece_count(tokens: Floats | float, row_bytes: Floats | float) -> Floats:
    """Pieces of `tokens` rows of logits, `row_bytes` each on one rank."""
    return np.ceil(np.asarray(tokens * row_bytes / PIECE_BYTES, dtype=float))


def piece_tokens(tokens: Floats | float, row_bytes: Floats | float) -> Floats:
    """Rows of the largest piece: all pieces are as long, but for the last."""
    return np.ceil(tokens / piece_count(tokens, row_bytes))
