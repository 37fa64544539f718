"""`easyspec index`: files of a corpus that drafters guess from. Imports neither torch nor transformers."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from easyspec.errors import ConfigurationError
from easyspec.tokenizer_fingerprint import tokenizer_fingerprint

index = typer.Typer(help="Files of a corpus that drafters guess from.", no_args_is_help=True)

_Corpus = Annotated[
    list[Path], typer.Argument(help="Text files, folders of them, or .jsonl files with a `text` per line.")
]
_Tokenizer = Annotated[Path, typer.Option("--tokenizer", help="Checkpoint folder whose tokenizer.json is used.")]
_Output = Annotated[Path, typer.Option("--output", help="File to write; it appears when it is complete.")]


@index.command()
def build(corpus: _Corpus, tokenizer: _Tokenizer, output: _Output) -> None:
    """Write a suffix index, for `--index` of the drafter: the source `retrieval`."""
    from easyspec.datastore.suffix_index import build_suffix_index

    _build(corpus, tokenizer, output, build_suffix_index)


@index.command()
def ngrams(corpus: _Corpus, tokenizer: _Tokenizer, output: _Output) -> None:
    """Write a table of n-grams, for `--ngram-prior` of the drafter: the source `ngram`."""
    from easyspec.datastore.ngram_table import build_ngram_table

    _build(corpus, tokenizer, output, build_ngram_table)


def _build(corpus: list[Path], tokenizer_folder: Path, output: Path, build_file: Callable[..., None]) -> None:
    import numpy as np

    from easyspec.datastore.corpus import load_tokenizer, read_documents, write_tokens

    fingerprint = tokenizer_fingerprint(tokenizer_folder)
    tokenizer = load_tokenizer(tokenizer_folder)
    if not output.parent.is_dir():
        raise ConfigurationError(f"output is {str(output)!r}; allowed: a file in a folder that exists")
    started_s = time.monotonic()
    with tempfile.NamedTemporaryFile(dir=output.parent, prefix=".tokens-") as file:
        num_tokens = write_tokens(read_documents(corpus), tokenizer, file)
        file.flush()
        if num_tokens == 0:
            raise ConfigurationError("the corpus holds no text")
        typer.echo(f"{num_tokens:,} tokens in {time.monotonic() - started_s:.1f} s", err=True)
        build_file(np.memmap(file.name, dtype="<u4", mode="r"), output, fingerprint)
    num_bytes = output.stat().st_size
    typer.echo(f"{output}: {num_bytes / 1e6:.1f} MB, {time.monotonic() - started_s:.1f} s in all", err=True)
