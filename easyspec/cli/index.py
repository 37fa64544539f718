"""`easyspec index`: files of a corpus that drafters guess from. Imports neither torch nor transformers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

index = typer.Typer(help="Files of a corpus that drafters guess from.", no_args_is_help=True)

_Corpus = Annotated[
    list[Path], typer.Argument(help="Text files, folders of them, or .jsonl files with a `text` per line.")
]
_Tokenizer = Annotated[Path, typer.Option("--tokenizer", help="Checkpoint folder whose tokenizer.json is used.")]
_Output = Annotated[Path, typer.Option("--output", help="File to write; it appears when it is complete.")]
_Ngrams = Annotated[
    Path | None, typer.Option("--ngrams", help="Write a table of n-grams too: sooner than with a command of its own.")
]


@index.command()
def build(corpus: _Corpus, tokenizer: _Tokenizer, output: _Output, ngrams: _Ngrams = None) -> None:
    """Write a suffix index, for `--index` of the drafter: the source `retrieval`."""
    _build(corpus, tokenizer, output, ngrams)


@index.command(name="ngrams")
def ngrams_alone(corpus: _Corpus, tokenizer: _Tokenizer, output: _Output) -> None:
    """Write a table of n-grams, for `--ngram-prior` of the drafter: the source `ngram`."""
    _build(corpus, tokenizer, None, output)


def _build(corpus: list[Path], tokenizer: Path, index_path: Path | None, ngrams_path: Path | None) -> None:
    from easyspec.datastore.build import DatastoreFiles, build_datastore
    from easyspec.datastore.corpus import read_documents

    def say(what: str, duration_s: float) -> None:
        typer.echo(f"{what}: {duration_s:.1f} s", err=True)

    started_s = time.monotonic()
    build_datastore(read_documents(corpus), tokenizer, DatastoreFiles(index_path, ngrams_path), say)
    typer.echo(f"{time.monotonic() - started_s:.1f} s in all", err=True)
