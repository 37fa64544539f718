"""The index and n-gram table that `bench sources` drafts from: the bundled models' training text, none held out."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import numpy as np

from bench.machine import REPOSITORY
from easyspec.datastore.corpus import load_tokenizer, write_tokens
from easyspec.datastore.ngram_table import build_ngram_table
from easyspec.datastore.suffix_index import build_suffix_index
from easyspec.tokenizer_fingerprint import tokenizer_fingerprint
from models.heldout import HELDOUT_LIST
from models.recipe.corpus import prose_documents, source_documents
from models.recipe.settings import CorpusSettings

_FOLDER = REPOSITORY / ".bench" / "sources"


def ensure_datastore(tokenizer_folder: Path) -> tuple[str, ...]:
    """The drafter's flags for index and table, made on first use (a minute) and again for another tokenizer."""
    fingerprint = tokenizer_fingerprint(tokenizer_folder)
    held_out = hashlib.sha256(HELDOUT_LIST.read_bytes()).hexdigest()[:8]
    folder = _FOLDER / f"{fingerprint[:16]}-{held_out}"
    index, ngrams = folder / "index", folder / "ngrams"
    if not ngrams.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        corpus = CorpusSettings()
        documents = (document.text for document in (*source_documents(corpus), *prose_documents(corpus.stdlib)))
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            write_tokens(documents, load_tokenizer(tokenizer_folder), file)
            file.flush()
            tokens = np.memmap(file.name, dtype="<u4", mode="r")
            build_suffix_index(tokens, index, fingerprint)
            build_ngram_table(tokens, ngrams, fingerprint)
    return "--index", str(index), "--ngram-prior", str(ngrams)
