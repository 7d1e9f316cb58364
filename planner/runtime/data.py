"""Training data. The stream of sequences is a pure function of (seed, sources): every layout trains on the same ones.

Sequences are numbered from 0 on; a step takes the next `global_batch` of them, whatever the step's number. What a
checkpoint holds of the data is therefore one number, and no sequence is trained twice or left out, also when the global
batch changes at a resume.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from planner.planfile import Plan
from planner.runtime import tokens
from planner.runtime.mesh import World
from planner.runtime.storage import SourceIdentity

ALPHABET = 64
"""Tokens that the synthetic stream uses at most: few, so that a model learns within tens of steps."""


class Source(Protocol):
    """What a batch is made of."""

    def sequence(self, sample: int) -> npt.NDArray[np.int64]:
        """seq_len + 1 token ids of sample number `sample`."""
        ...


class SyntheticTokens:
    """A fixed Markov chain: the next token is the present one plus a small, mostly equal, step around a ring."""

    def __init__(self, vocab: int, seed: int, seq_len: int):
        self.ring = min(vocab, ALPHABET)
        self.seed, self.seq_len = seed, seq_len

    def sequence(self, sample: int) -> npt.NDArray[np.int64]:
        """seq_len + 1 tokens of sample number `sample`."""
        rng = np.random.default_rng((self.seed, sample))
        moves = rng.choice(np.array([1, 2, 5, 11]), size=self.seq_len + 1, p=np.array([0.7, 0.15, 0.1, 0.05]))
        moves[0] = rng.integers(self.ring)
        return np.asarray(np.cumsum(moves) % self.ring, dtype=np.int64)


class Batches:
    """This rank's share of each global batch: its sequences (dp), and its pieces of each of them (cp)."""

    def __init__(self, plan: Plan, world: World, seed: int, data: tuple[str, ...] = ()):
        vocab, self.seq_len = plan.model.vocab, plan.job.seq_len
        self.source: Source = SyntheticTokens(vocab, seed, self.seq_len)
        self._identity: list[SourceIdentity] = []
        if data:
            self.source, named = tokens.open_sources(data, vocab, seed, self.seq_len)
            self._identity = [_identify(path, weight) for path, weight in named]
        self.global_batch = plan.job.global_batch
        self.count = self.global_batch // plan.layout.dp
        self.start = self.count * world.dp_rank
        self.at = world.positions(self.seq_len)
        self.device = world.device
        self._origin = (0, 0)
        self._prepared: tuple[int, Tensor, Tensor] | None = None
        """First sample, tokens and targets of a batch read ahead."""

    def identity(self) -> list[SourceIdentity]:
        """What the sources were when they were opened; empty for the synthetic stream."""
        return self._identity

    def seek(self, step: int, sample: int) -> None:
        """Let `step` begin with `sample`."""
        self._origin = (step, sample)

    def position(self, step: int) -> int:
        """The first sample of a step."""
        at, sample = self._origin
        return sample + (step - at) * self.global_batch

    def get(self, step: int) -> tuple[Tensor, Tensor]:
        """(tokens, targets) of this rank, both [global_batch / dp, s / cp] int64; targets are one ahead."""
        first = self.position(step) + self.start
        ready, self._prepared = self._prepared, None
        return ready[1:] if ready is not None and ready[0] == first else self._read(first)

    def prepare(self, step: int) -> None:
        """Read a later step's batch while a device works at this one. On a CPU nothing would be won, and memory is counted."""
        if self.device.type == "cuda":
            first = self.position(step) + self.start
            self._prepared = first, *self._read(first)

    def _read(self, first: int) -> tuple[Tensor, Tensor]:
        rows = np.stack([self.source.sequence(i) for i in range(first, first + self.count)])
        # Row after row in memory: torch's stages compare the strides of what they get.
        both = [torch.from_numpy(np.ascontiguousarray(rows[:, at])) for at in (self.at, self.at + 1)]
        if self.device.type == "cuda":
            both = [t.pin_memory() for t in both]
        tokens, targets = (t.to(self.device, non_blocking=True) for t in both)
        return tokens, targets


def _identify(path: Path, weight: float) -> SourceIdentity:
    return SourceIdentity(path=str(path), size=path.stat().st_size, digest=tokens.identity(path), weight=weight)
