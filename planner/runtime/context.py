"""Context parallelism: the ranks of a cp group hold pieces of each sequence, and share attention by heads or around a ring.

Ring attention is in `ring`. Ulysses (Jacobs 2023, arXiv 2309.14509): an all-to-all before attention gives each rank the whole
sequence of heads / cp heads, one after it gives back its own tokens of all heads. Attention itself is the ordinary one, on any
device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd


def pieces(seq_len: int, size: int, rank: int, ring: bool) -> tuple[range, ...]:
    """Positions of a sequence that one of `size` cp ranks holds, in the order in which it holds them.

    Neighbouring tokens; around a ring piece r from either end of the sequence cut in 2 cp, so that causal attention, for
    which late tokens read more keys, is equal work on all ranks.
    """
    if not ring:
        each = seq_len // size
        return (range(each * rank, each * (rank + 1)),)
    each = seq_len // (2 * size)
    return tuple(range(each * at, each * (at + 1)) for at in (rank, 2 * size - 1 - rank))


@dataclass(frozen=True)
class Ulysses:
    """The cp group of this rank, with more than one rank. Its ranks are in the order of their tokens."""

    group: dist.ProcessGroup
    size: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, whole: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Causal attention of own tokens [b, s/cp, heads, d], same shape out, by `whole` attention of whole sequences of
        heads / cp heads. Collective."""
        return self.whole_heads(whole(*(self.whole_sequence(t) for t in (q, k, v))))

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
