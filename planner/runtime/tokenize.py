"""Texts to token files: documents one behind another, each followed by the end token, with an index of their lengths."""

from __future__ import annotations

import gzip
import json
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from planner.errors import MissingPartError, Problem, input_error
from planner.runtime import tokens

BATCH = 512
"""Documents that the tokenizer takes at once, on all cores."""


def tokenize(texts: list[Path], tokenizer: str, out: Path, field: str = "text", eos: str | None = None) -> dict[str, Any]:
    """Write `out` (.bin), its .idx and a .json that describes them; returns what the latter says.

    A token takes two bytes for vocabularies up to 65,536, else four. Raises InputError, and MissingPartError without
    the package tokenizers. Nothing appears under its name before all of it is written.
    """
    if out.suffix != ".bin":
        raise input_error("PLN624", f"-o {out} does not end in .bin", "its index is found beside it by name", "write NAME.bin")
    encoder, end = _encoder(tokenizer, eos)
    kind: type[np.generic] = np.uint16 if encoder.get_vocab_size() <= 1 << 16 else np.int32
    lengths, total = array("q"), 0
    part = out.with_suffix(".bin.part")
    documents = (d for path in texts for d in _documents(path, field))
    with part.open("wb") as stream:
        while batch := list(islice(documents, BATCH)):
            for encoding in encoder.encode_batch(batch, add_special_tokens=False):
                ids = encoding.ids + ([end] if end is not None else [])
                if ids:
                    stream.write(np.asarray(ids).astype(kind).tobytes())
                    lengths.append(len(ids))
                    total += len(ids)
    report = {
        "tokens": total, "documents": len(lengths), "type": "uint16" if kind is np.uint16 else "uint32",
        "vocab": encoder.get_vocab_size(), "eos": end, "tokenizer": tokenizer, "texts": [str(p) for p in texts],
    }  # fmt: skip
    if not total:
        part.unlink()
        raise input_error("PLN624", "the texts hold no token", "", "give other files")
    tokens.write_index(out.with_suffix(".idx"), kind, np.frombuffer(lengths, np.int64))
    out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    part.replace(out)
    return report


def _encoder(name: str, eos: str | None) -> tuple[Any, int | None]:
    """(tokenizer, id of the end token or None). Raises InputError and MissingPartError."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        problem = Problem("PLN624", "tokenizers is not installed", "texts become tokens by it", "pip install 'planner[data]'")
        raise MissingPartError(problem) from None
    path = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
    try:
        encoder = Tokenizer.from_file(str(path)) if path.exists() else Tokenizer.from_pretrained(name)
    except Exception as error:  # the package raises bare exceptions
        why = " ".join(str(error).split())[:200]
        raise input_error("PLN624", f"cannot read the tokenizer {name}", why, "give a tokenizer.json") from None
    if eos == "none":
        return encoder, None
    wanted = eos or _stated_end(path.with_name("tokenizer_config.json"))
    if wanted is None:
        fix = "give --eos TOKEN, or --eos none"
        raise input_error("PLN624", f"the end token of {name} is not stated", "there is no tokenizer_config.json", fix)
    found = encoder.token_to_id(wanted)
    if found is None:
        raise input_error("PLN624", f"{wanted} is no token of {name}", "", "give another --eos, or --eos none")
    return encoder, int(found)


def _stated_end(config: Path) -> str | None:
    try:
        stated = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError):
        return None
    return stated.get("content") if isinstance(stated, dict) else stated


def _documents(path: Path, field: str) -> Iterator[str]:
    """The documents of a file; `.gz` is unpacked. Raises InputError with the line."""
    name = path.name.removesuffix(".gz")
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as stream:
            if not name.endswith((".jsonl", ".ndjson")):
                yield stream.read()
                return
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield _text(line, field, f"{path}:{number}")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise input_error("PLN624", f"cannot read {path}", why, "give UTF-8 text or JSON lines") from None


def _text(line: str, field: str, place: str) -> str:
    try:
        text = json.loads(line)[field]
        if isinstance(text, str):
            return text
        why = f"its {field} is no text"
    except (ValueError, KeyError, TypeError):
        why = f"it is no JSON object with {field}"
    raise input_error("PLN624", f"{place} is no document", why, "give --field, or repair the line")


def inspect(path: Path, vocab: int, seq_len: int) -> dict[str, Any]:
    """What a token file holds. Raises InputError."""
    file = tokens.TokenFile(path, vocab, 0, seq_len)
    largest = max(int(file.tokens[i : i + (1 << 24)].max()) for i in range(0, len(file.tokens), 1 << 24))
    return {
        "tokens": len(file.tokens), "type": str(file.tokens.dtype).replace("int32", "uint32").replace("uuint", "uint"),
        "documents": None if file.lengths is None else len(file.lengths),
        "sequences": file.sequences, "largest_id": largest, "digest": tokens.identity(path),
    }  # fmt: skip
