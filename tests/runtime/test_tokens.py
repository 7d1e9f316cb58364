"""Token files: what an epoch holds, documents, mixtures, identity; and texts made into them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import plans
import pytest
import torch

from planner.errors import InputError
from planner.runtime import tokens
from planner.runtime.data import Batches
from planner.runtime.tokenize import inspect, tokenize
from planner.runtime.tokens import Mixture, Permutation, TokenFile


def token_file(path: Path, n: int, kind: Any = np.uint16) -> Path:
    np.arange(n).astype(kind).tofile(path)
    return path


def documents(path: Path, lengths: list[int]) -> Path:
    """A file in which document d holds d * 1000, d * 1000 + 1, ..."""
    np.concatenate([d * 1000 + np.arange(n) for d, n in enumerate(lengths)]).astype(np.int32).tofile(path)
    tokens.write_index(path.with_suffix(".idx"), np.int32, np.array(lengths))
    return path


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 1000])
def test_permutation_is_one(n: int) -> None:
    first = [Permutation(n, 3, 0)[i] for i in range(n)]
    assert sorted(first) == list(range(n))
    assert first == [Permutation(n, 3, 0)[i] for i in range(n)]
    if n > 10:
        assert first != [Permutation(n, 3, 1)[i] for i in range(n)] != list(range(n))


def test_an_epoch_trains_every_token_once(tmp_path: Path) -> None:
    file = TokenFile(token_file(tmp_path / "t.bin", 1601), 2000, seed=1, seq_len=16)
    assert file.sequences == 100
    for epoch in range(2):
        targets = np.concatenate([file.sequence(epoch * 100 + i)[1:] for i in range(100)])
        assert sorted(targets.tolist()) == list(range(1, 1601))
    assert [file.sequence(i)[0] for i in range(100)] != [file.sequence(100 + i)[0] for i in range(100)]
    assert all((np.diff(file.sequence(i)) == 1).all() for i in range(100))


def test_documents_are_shuffled_and_none_is_lost(tmp_path: Path) -> None:
    lengths = [5, 40, 1, 33, 7, 100, 2, 13]
    file = TokenFile(documents(tmp_path / "d.bin", lengths), 10_000, seed=1, seq_len=10)
    assert file.sequences == 20
    for epoch in range(3):
        origin, ends = file._documents(epoch)
        assert sorted(origin.tolist()) == np.cumsum(lengths).tolist()
        assert ends[-1] == sum(lengths)
        whole = np.concatenate([file._cut(i * 10, i * 10 + 10, epoch) for i in range(20)])
        runs = np.split(whole, np.flatnonzero(np.diff(whole) != 1) + 1)  # a new document begins
        assert sorted((int(r[0]) // 1000, len(r)) for r in runs[:-1])
        assert len(set(whole.tolist())) == 200
    starts = {epoch: file._cut(0, 5, epoch).tolist() for epoch in range(6)}
    assert len({tuple(s) for s in starts.values()}) > 1


def test_index_is_megatrons(tmp_path: Path) -> None:
    path = documents(tmp_path / "d.bin", [3, 2])
    raw = path.with_suffix(".idx").read_bytes()
    expected = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + b"\x04" + (2).to_bytes(8, "little") + (3).to_bytes(8, "little")
    expected += np.array([3, 2], np.int32).tobytes() + np.array([0, 12], np.int64).tobytes()
    assert raw == expected + np.array([0, 1, 2], np.int64).tobytes()
    kind, lengths = tokens.read_index(path.with_suffix(".idx"))
    assert (kind, lengths.tolist()) == (np.int32, [3, 2])


def test_mixture_holds_the_weights_and_skips_nothing(tmp_path: Path) -> None:
    files = [TokenFile(token_file(tmp_path / f"{i}.bin", 171), 200, i, 16) for i in range(3)]
    mixture = Mixture(files, [7, 2, 1], seed=4)
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for sample in range(2 * Mixture.PERIOD):
        source, own = mixture.place(sample)
        seen[source].append(own)
    assert [len(seen[i]) for i in range(3)] == [14_000, 4_000, 2_000]
    assert all(seen[i] == list(range(len(seen[i]))) for i in range(3))
    first = [mixture.place(i)[0] for i in range(1000)]
    assert 600 < first.count(0) < 800
    assert tokens.shares([1, 1, 1], 10) == [4, 3, 3]


def stream(plan: Any, data: tuple[str, ...], steps: range, origin: tuple[int, int] = (0, 0)) -> list[list[int]]:
    """First tokens of the sequences of each step, over all data parallel ranks."""
    found = []
    for step in steps:
        rows: list[int] = []
        for rank in range(plan.layout.dp):
            world: Any = SimpleNamespace(positions=np.arange, dp_rank=rank, device=torch.device("cpu"))
            batches = Batches(plan, world, 0, data)
            batches.seek(*origin)
            rows += batches.get(step)[0][:, 0].tolist()
        found.append(rows)
    return found


def test_no_sequence_is_trained_twice_or_skipped_when_the_batch_changes(tmp_path: Path) -> None:
    data = (str(token_file(tmp_path / "t.bin", 64 * 16 + 1, np.uint32)),)
    model = plans.llama(vocab=70_000)
    before = stream(plans.plan(model, dp=4), data, range(3))
    after = stream(plans.plan(model, dp=2, global_batch=4), data, range(3, 13), origin=(3, 24))
    everything = [start for step in [*before, *after] for start in step]
    assert sorted(everything) == [16 * i for i in range(64)]
    assert before == stream(plans.plan(model), data, range(3)), "dp does not change the order"


def test_sources_and_their_errors(tmp_path: Path) -> None:
    path = token_file(tmp_path / "t.bin", 500)
    assert tokens.parse_source(f"{path}:0.25") == (path, 0.25)
    assert tokens.parse_source(str(path)) == (path, 1.0)
    with pytest.raises(InputError, match="PLN618"):
        tokens.parse_source(f"{path}:0")
    with pytest.raises(InputError, match=r"too short[\s\S]*cannot read"):
        tokens.open_sources((str(path), str(tmp_path / "none.bin")), 500, 0, 500)
    with pytest.raises(InputError, match="outside the vocabulary"):
        TokenFile(path, 10, 0, 400).sequence(0)
    with pytest.raises(InputError, match="PLN618"):
        tokens.open_sources((f"{path}:1", f"{path}:1e-9"), 500, 0, 16)
    documents(path, [3, 4])
    np.arange(8).astype(np.int32).tofile(path)
    with pytest.raises(InputError, match=r"do not belong together[\s\S]*7 tokens, it holds 8"):
        TokenFile(path, 500, 0, 2)
    path.with_suffix(".idx").write_bytes(b"MMIDIDX\x00\x00")
    with pytest.raises(InputError, match="no index of documents"):
        TokenFile(path, 500, 0, 2)


def test_identity_sees_length_ends_and_index(tmp_path: Path) -> None:
    path = token_file(tmp_path / "t.bin", 500_000, np.uint32)
    found = {tokens.identity(path)}
    raw = bytearray(path.read_bytes())
    for change in (lambda: raw.__setitem__(-1, 9), lambda: raw.__setitem__(5, 9), lambda: raw.extend(b"\0\0\0\0")):
        change()
        path.write_bytes(bytes(raw))
        found.add(tokens.identity(path))
    path.with_suffix(".idx").write_bytes(b"x")
    assert len(found | {tokens.identity(path)}) == 5


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    made = pytest.importorskip("tokenizers")
    vocabulary = {w: i for i, w in enumerate(["<end>", "[UNK]", "a", "b", "c"])}
    encoder = made.Tokenizer(made.models.WordLevel(vocabulary, unk_token="[UNK]"))
    encoder.pre_tokenizer = made.pre_tokenizers.Whitespace()
    encoder.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}}')
    return tmp_path


def test_tokenize(tokenizer: Path) -> None:
    lines, text = tokenizer / "a.jsonl", tokenizer / "b.txt"
    lines.write_text('{"text": "a b"}\n\n{"text": "c"}\n')
    text.write_text("b b b\na")
    report = tokenize([lines, text], str(tokenizer), tokenizer / "out.bin")
    assert np.fromfile(tokenizer / "out.bin", np.uint16).tolist() == [2, 3, 0, 4, 0, 3, 3, 3, 2, 0]
    assert (report["documents"], report["tokens"], report["eos"]) == (3, 10, 0)
    assert json.loads((tokenizer / "out.json").read_text()) == report
    assert tokens.read_index(tokenizer / "out.idx")[1].tolist() == [3, 2, 5]
    seen = inspect(tokenizer / "out.bin", 5, 4)
    assert (seen["type"], seen["documents"], seen["sequences"], seen["largest_id"]) == ("uint16", 3, 2, 4)


def test_tokenize_errors(tokenizer: Path) -> None:
    lines = tokenizer / "a.jsonl"
    lines.write_text('{"text": "a b"}\n{"body": "c"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl:2 is no document"):
        tokenize([lines], str(tokenizer), tokenizer / "out.bin")
    assert not (tokenizer / "out.bin").exists()
    with pytest.raises(InputError, match=r"does not end in \.bin"):
        tokenize([lines], str(tokenizer), tokenizer / "out")
    with pytest.raises(InputError, match="is no token"):
        tokenize([lines], str(tokenizer), tokenizer / "out.bin", eos="</s>")
    lines.write_text('{"text": ""}\n')
    with pytest.raises(InputError, match="hold no token"):
        tokenize([lines], str(tokenizer), tokenizer / "out.bin", eos="none")
