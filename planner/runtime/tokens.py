"""Token files on disk: memory-mapped `.bin` of uint16 or uint32, with documents where an index lies beside them.

`NAME.idx` is Megatron-LM's index (magic MMIDIDX): type of a token, length of each document. `planner data tokenize` writes
both, and so do Megatron-LM's and NeMo's tools. Without an index the file is one run of tokens, such as nanoGPT's, of
uint16, or uint32 for vocabularies above 65,536.
"""

from __future__ import annotations

import hashlib
import struct
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from planner.errors import InputError, Problem, input_error

MAGIC = b"MMIDIDX\x00\x00"
TYPES: dict[int, type[np.generic]] = {4: np.int32, 8: np.uint16}
"""Megatron's codes of the types that token ids come in; its int32 holds the same bytes as uint32."""
Ids = npt.NDArray[np.int64]

SAMPLED_BLOCKS, BLOCK = 64, 1 << 16


def read_index(path: Path) -> tuple[type[np.generic], Ids]:
    """(type of a token, length of each document in tokens) of a Megatron index. Raises InputError."""
    try:
        raw = path.read_bytes()
        if raw[:9] != MAGIC:
            raise ValueError("it does not begin like Megatron's")
        version, code, sequences, _ = struct.unpack_from("<QBQQ", raw, 9)
        if version != 1 or code not in TYPES:
            raise ValueError(f"version {version} and token type {code} are not known")
        lengths = np.frombuffer(raw, np.int32, sequences, 34).astype(np.int64)
    except (OSError, ValueError, struct.error) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise input_error("PLN617", f"{path} is no index of documents", why, "make it again, or remove it") from None
    return TYPES[code], lengths


def write_index(path: Path, kind: type[np.generic], lengths: Ids) -> None:
    """Write Megatron's index of documents of these lengths, one sequence a document."""
    code = 8 if np.dtype(kind).itemsize == 2 else 4
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * np.dtype(kind).itemsize if len(lengths) else np.zeros(0)
    with path.open("wb") as stream:
        stream.write(MAGIC + struct.pack("<QBQQ", 1, code, len(lengths), len(lengths) + 1))
        stream.write(lengths.astype(np.int32).tobytes())
        stream.write(starts.astype(np.int64).tobytes())
        stream.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())


def identity(path: Path) -> str:
    """SHA-256 of a file's size, of 64 KiB at both ends and at 62 places in between, and of its index.

    A changed length always shows; a changed byte inside a large file shows when it lies in a block: this tells another
    file, or a file made again, not a deliberate edit.
    """
    size = path.stat().st_size
    sha = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        for i in range(SAMPLED_BLOCKS):
            stream.seek(max(0, size - BLOCK) * i // (SAMPLED_BLOCKS - 1))
            sha.update(stream.read(BLOCK))
    index = path.with_suffix(".idx")
    if index.is_file():
        sha.update(index.read_bytes())
    return sha.hexdigest()


class Permutation:
    """A fixed shuffle of range(n), any element in constant time and memory: a Feistel network of four rounds over the
    next power of four, walked until the result is inside (Black & Rogaway 2002, "Ciphers with arbitrary finite domains")."""

    def __init__(self, n: int, *key: int):
        self.n = n
        self.half = max(1, (max(1, n - 1).bit_length() + 1) // 2)
        digest = hashlib.sha256(repr(key).encode()).digest()
        self.keys = struct.unpack("<4Q", digest)

    def __getitem__(self, i: int) -> int:
        mask = (1 << self.half) - 1
        while True:
            left, right = i >> self.half, i & mask
            for key in self.keys:
                left, right = right, left ^ (_mix(right ^ key) & mask)
            i = (left << self.half) | right
            if i < self.n:
                return i


def _mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele 2014)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


class TokenFile:
    """Sequences of one token file. An epoch holds each once, in an order that (seed, epoch) decides.

    A sequence of s tokens has s + 1 ids; the last is the first of the next one, so that every token is a target once an
    epoch, except the first of the file and the rest after the last whole sequence. With an index, each epoch lays the
    documents behind one another in an order of its own before it cuts (16 bytes a document in memory).
    """

    def __init__(self, path: Path, vocab: int, seed: int, seq_len: int):
        self.path, self.vocab, self.seed, self.seq_len = path, vocab, seed, seq_len
        index = path.with_suffix(".idx")
        kind: type[np.generic] = np.uint16 if vocab <= 1 << 16 else np.uint32
        self.lengths: Ids | None = None
        if index.is_file():
            kind, self.lengths = read_index(index)
        try:
            self.tokens = np.memmap(path, dtype=kind, mode="r")
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            fix = "give a flat binary file of uint16 or uint32 token ids"
            raise input_error("PLN593", f"cannot read the token file {path}", why, fix) from None
        if self.lengths is not None and int(self.lengths.sum()) != len(self.tokens):
            why = f"its index counts {int(self.lengths.sum()):,} tokens, it holds {len(self.tokens):,}"
            raise input_error("PLN617", f"{path} and its index do not belong together", why, "make both again")
        self.sequences = (len(self.tokens) - 1) // seq_len
        if self.sequences < 1:
            why = f"it holds {len(self.tokens):,} tokens, a sequence needs {seq_len + 1:,}"
            raise input_error("PLN593", f"the token file {path} is too short", why, "give a longer file")
        self._documents = lru_cache(maxsize=2)(self._shuffled_documents)

    def sequence(self, sample: int) -> Ids:
        """seq_len + 1 ids of sample number `sample`, counted from the first epoch's beginning."""
        epoch, place = divmod(sample, self.sequences)
        start = Permutation(self.sequences, self.seed, epoch)[place] * self.seq_len
        ids = self._cut(start, start + self.seq_len + 1, epoch)
        if int(ids.max()) >= self.vocab or int(ids.min()) < 0:
            why = f"token {int(ids.max())} is outside the vocabulary of {self.vocab}"
            raise input_error("PLN593", f"the token file {self.path} does not fit the model", why, "tokenize it again")
        return ids

    def _cut(self, start: int, end: int, epoch: int) -> Ids:
        """Ids from `start` to `end` of the epoch's run of documents."""
        if self.lengths is None:
            return np.asarray(self.tokens[start:end], dtype=np.int64)
        origin, ends = self._documents(epoch)
        parts, d = [], int(np.searchsorted(ends, start, side="right"))
        while start < end:
            stop = min(end, int(ends[d]))
            offset = int(origin[d]) - int(ends[d])  # place in the file less place in the run, of the document's end
            parts.append(self.tokens[start + offset : stop + offset])
            start, d = stop, d + 1
        return np.concatenate(parts).astype(np.int64)

    def _shuffled_documents(self, epoch: int) -> tuple[Ids, Ids]:
        """(end in the file, end in the epoch's run) of each document, in the epoch's order."""
        assert self.lengths is not None
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.lengths))
        return np.cumsum(self.lengths)[order], np.cumsum(self.lengths[order])


def parse_source(text: str) -> tuple[Path, float]:
    """`PATH` or `PATH:WEIGHT`. Raises InputError for a weight that is none."""
    head, colon, tail = text.rpartition(":")
    if not colon or not head or "/" in tail or Path(text).is_file():
        return Path(text), 1.0
    try:
        weight = float(tail)
    except ValueError:
        return Path(text), 1.0
    if not 0 < weight < float("inf"):
        raise input_error("PLN618", f"--data {text}: the weight is not above 0", "", "write PATH:0.3")
    return Path(head), weight


class Mixture:
    """Several sources by weight. Every period of samples holds exactly each source's share, in an order of its own."""

    PERIOD = 10_000

    def __init__(self, sources: list[TokenFile], weights: list[float], seed: int):
        self.sources, self.seed = sources, seed
        self.counts = shares(weights, self.PERIOD)
        if 0 in self.counts:
            path = sources[self.counts.index(0)].path
            why = f"less than one of {self.PERIOD:,} sequences"
            raise input_error("PLN618", f"the weight of {path} is too small", why, "raise it or leave the file out")
        self._order = lru_cache(maxsize=2)(self._ordered)

    def sequence(self, sample: int) -> Ids:
        """Sample number `sample` of the mixture: seq_len + 1 ids."""
        source, own = self.place(sample)
        return self.sources[source].sequence(own)

    def place(self, sample: int) -> tuple[int, int]:
        """(source, number of the sample within the source)."""
        if len(self.sources) == 1:
            return 0, sample
        period, place = divmod(sample, self.PERIOD)
        order, earlier = self._order(period)
        source = int(order[place])
        return source, period * self.counts[source] + int(earlier[place])

    def _ordered(self, period: int) -> tuple[Ids, Ids]:
        """(source, earlier samples of that source in the period) of each place in a period."""
        order = np.repeat(np.arange(len(self.counts)), self.counts)
        np.random.default_rng((self.seed, 1, period)).shuffle(order)
        earlier = np.zeros(len(order), dtype=np.int64)
        for source, count in enumerate(self.counts):
            earlier[order == source] = np.arange(count)
        return order, earlier


def shares(weights: list[float], total: int) -> list[int]:
    """Whole numbers that sum to `total`, nearest to the weights' shares (largest remainders)."""
    exact = [w / sum(weights) * total for w in weights]
    counts = [int(x) for x in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_rest[: total - sum(counts)]:
        counts[i] += 1
    return counts


def open_sources(texts: tuple[str, ...], vocab: int, seed: int, seq_len: int) -> tuple[Mixture, list[tuple[Path, float]]]:
    """The mixture of `PATH[:WEIGHT]` texts, and what they name. Raises InputError with every problem."""
    named = [parse_source(text) for text in texts]
    files: list[TokenFile] = []
    problems: list[Problem] = []
    for i, (path, _) in enumerate(named):
        try:
            files.append(TokenFile(path, vocab, seed + i, seq_len))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return Mixture(files, [w for _, w in named], seed), named
