"""The index and n-gram table that `bench sources` drafts from: the bundled models' training text, none held out."""

from __future__ import annotations

import hashlib
from pathlib import Path

from bench.harness.machine import REPOSITORY
from easyspec.datastore.build import DatastoreFiles, build_datastore
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
    if not (index.is_file() and ngrams.is_file()):
        folder.mkdir(parents=True, exist_ok=True)
        corpus = CorpusSettings()
        documents = (document.text for document in (*source_documents(corpus), *prose_documents(corpus.stdlib)))
        build_datastore(documents, tokenizer_folder, DatastoreFiles(index, ngrams))
    return "--index", str(index), "--ngram-prior", str(ngrams)
