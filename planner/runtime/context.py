"""Context parallelism: the ranks of a cp group hold neighbouring pieces of each sequence, and share attention by heads.

Ulysses (Jacobs 2023, arXiv 2309.14509): an all-to-all before attention gives each rank the whole sequence of heads / cp
heads, one after it gives back its own tokens of all heads. Attention itself is the ordinary one, on any device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd


@dataclass(frozen=True)
class Context:
    """The cp group of this rank, with more than one rank. Its ranks are in the order of their tokens."""

    group: dist.ProcessGroup
    size: int

    def whole_sequence(self, x: Tensor) -> Tensor:
        """Own tokens of all heads [b, s/cp, heads, d] to all tokens of own heads [b, s, heads/cp, d]. Collective."""
        b, s, heads, d = x.shape
        by_owner = x.view(b, s, self.size, heads // self.size, d).permute(2, 0, 1, 3, 4)
        by_piece = self._exchange(by_owner)
        return by_piece.transpose(0, 1).reshape(b, self.size * s, heads // self.size, d)

    def whole_heads(self, x: Tensor) -> Tensor:
        """The inverse: [b, s, heads/cp, d] to [b, s/cp, heads, d]. Collective."""
        b, s, heads, d = x.shape
        by_owner = x.view(b, self.size, s // self.size, heads, d).transpose(0, 1)
        by_heads = self._exchange(by_owner)
        return by_heads.permute(1, 2, 0, 3, 4).reshape(b, s // self.size, self.size * heads, d)

    def _exchange(self, x: Tensor) -> Tensor:
        """Row i of dimension 0 goes to rank i; the result's row i came from rank i."""
        out: Tensor = all_to_all_single_autograd(x.contiguous(), None, None, self.group)
        return out
