"""Training tokens. The global batch is a pure function of (seed, step): every layout trains on the same tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from planner.errors import input_error
from planner.planfile import Plan
from planner.runtime.mesh import World

ALPHABET = 64
"""Tokens that the synthetic stream uses at most: few, so that a model learns within tens of steps."""


class SyntheticTokens:
    """A fixed Markov chain: the next token is the present one plus a small, mostly equal, step around a ring."""

    def __init__(self, vocab: int, seed: int):
        self.ring = min(vocab, ALPHABET)
        self.seed = seed

    def sequence(self, step: int, index: int, length: int) -> npt.NDArray[np.int64]:
        """`length` tokens of sequence `index` of `step`."""
        rng = np.random.default_rng((self.seed, step, index))
        moves = rng.choice(np.array([1, 2, 5, 11]), size=length, p=np.array([0.7, 0.15, 0.1, 0.05]))
        moves[0] = rng.integers(self.ring)
        return np.asarray(np.cumsum(moves) % self.ring, dtype=np.int64)


class FileTokens:
    """Random windows of a flat binary file of token ids: uint16, or uint32 for vocabularies above 65,536."""

    def __init__(self, path: Path, vocab: int, seed: int):
        kind = np.uint16 if vocab <= 1 << 16 else np.uint32
        try:
            self.tokens = np.memmap(path, dtype=kind, mode="r")
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            fix = "give a flat binary file of uint16 or uint32 token ids"
            raise input_error("PLN593", f"cannot read the token file {path}", why, fix) from None
        self.path, self.vocab, self.seed = path, vocab, seed

    def sequence(self, step: int, index: int, length: int) -> npt.NDArray[np.int64]:
        """`length` tokens from a place that (seed, step, index) decides."""
        room = len(self.tokens) - length
        if room < 0:
            why = f"it holds {len(self.tokens):,} tokens, a sequence needs {length:,}"
            raise input_error("PLN593", f"the token file {self.path} is too short", why, "give a longer file")
        start = int(np.random.default_rng((self.seed, step, index)).integers(room + 1))
        tokens = np.asarray(self.tokens[start : start + length], dtype=np.int64)
        if int(tokens.max()) >= self.vocab:
            why = f"token {int(tokens.max())} is outside the vocabulary of {self.vocab}"
            raise input_error("PLN593", f"the token file {self.path} does not fit the model", why, "tokenize it again")
        return tokens


class Batches:
    """This rank's share of each global batch: its sequences (dp), and its piece of each of them (cp)."""

    def __init__(self, plan: Plan, world: World, seed: int, path: Path | None = None):
        vocab = plan.model.vocab
        self.source = FileTokens(path, vocab, seed) if path else SyntheticTokens(vocab, seed)
        self.seq_len = plan.job.seq_len
        self.count = plan.job.global_batch // plan.layout.dp
        self.start = self.count * world.dp_rank
        self.tokens = world.tokens(self.seq_len)
        self.device = world.device

    def get(self, step: int) -> tuple[Tensor, Tensor]:
        """(tokens, targets) of this rank, both [global_batch / dp, s / cp] int64; targets are one ahead."""
        indices = range(self.start, self.start + self.count)
        rows = np.stack([self.source.sequence(step, i, self.seq_len + 1) for i in indices])
        start, stop = self.tokens.start, self.tokens.stop
        batch = torch.from_numpy(rows[:, start : stop + 1]).to(self.device)
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
