"""`planner data`: token files for training, made and looked at."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from planner.cli import common

app = typer.Typer(help="Make and look at token files.", no_args_is_help=True, rich_markup_mode=None)


@app.command("tokenize")
@common.guarded
def tokenize(
    texts: Annotated[list[Path], typer.Argument(metavar="TEXT...", help="Files: .txt is one document, .jsonl one a line.")],
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", help="tokenizer.json, a folder with one, or a model's name on the Hugging Face hub.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The token file NAME.bin; NAME.idx and NAME.json go beside it.")],
    field: Annotated[str, typer.Option("--field", help="The text's key in .jsonl.")] = "text",
    eos: Annotated[
        str | None, typer.Option("--eos", help="Token after each document [the tokenizer's]; none for no token.")
    ] = None,
) -> None:
    """Turn texts into a token file, with an index of its documents that Megatron-LM reads too."""
    from planner.runtime import tokenize as work

    common.writable(out)
    report = work.tokenize(texts, tokenizer, out, field, eos)
    print(f"{report['documents']:,} documents, {report['tokens']:,} tokens of {report['type']}", file=sys.stderr)
    typer.echo(str(out))


@app.command("inspect")
@common.guarded
def inspect(
    path: Annotated[Path, typer.Argument(metavar="TOKENS", help="A token file (.bin).")],
    vocab: Annotated[int, typer.Option("--vocab", min=1, help="Vocabulary of the model, which says the type of a token.")] = 1,
    seq_len: Annotated[int, typer.Option("--seq-len", min=1, help="Tokens of one sequence.")] = 4096,
) -> None:
    """Tokens, documents, sequences and the largest id of a token file, as JSON."""
    from planner.runtime import tokenize as work

    common.write_result(common.to_json(work.inspect(path, vocab, seq_len)))
