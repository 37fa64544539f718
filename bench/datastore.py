"""`python -m bench.datastore`: how long index and n-gram table of a large corpus take to build, and a lookup.

The corpus is the standard library's tokens over and over, each time with another 2 % of them replaced, which keeps
matches short enough to be of use and long enough to be costly.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.machine import REPOSITORY
from drafter_service.sources.datastore import Datastore
from easyspec.cli.processes import DEFAULT_BASE
from easyspec.datastore.corpus import SEPARATOR, Tokens, load_tokenizer, write_tokens
from easyspec.datastore.ngram_table import NgramTable, build_ngram_table
from easyspec.datastore.suffix_index import SuffixIndex, build_suffix_index
from easyspec.tokenizer_fingerprint import tokenizer_fingerprint
from models.recipe.corpus import source_documents
from models.recipe.settings import CorpusSettings

_EDITED_SHARE = 0.02
_CONTEXT_TOKENS = 32


def main(argv: Sequence[str]) -> int:
    """Print one line per measurement."""
    parser = argparse.ArgumentParser(prog="python -m bench.datastore", description=__doc__)
    parser.add_argument("--num-tokens", type=int, default=50_000_000)
    parser.add_argument("--num-lookups", type=int, default=5_000)
    arguments = parser.parse_args(argv)
    fingerprint = tokenizer_fingerprint(DEFAULT_BASE)
    work = REPOSITORY / ".bench"
    work.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = Path(name)
        tokens = _corpus(folder / "tokens", arguments.num_tokens)
        for label, build, path in (
            ("suffix index", build_suffix_index, folder / "index"),
            ("n-gram table", build_ngram_table, folder / "ngrams"),
        ):
            started_s = time.monotonic()
            build(tokens, path, fingerprint)
            _say(f"{label} of {len(tokens):,} tokens", time.monotonic() - started_s, "s")
            _say(f"{label} on disk", path.stat().st_size / 1e6, "MB")
        _say("peak memory so far", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "MiB")
        started_s = time.monotonic()
        index, table = SuffixIndex(folder / "index", fingerprint), NgramTable(folder / "ngrams", fingerprint)
        _say("open and check both", time.monotonic() - started_s, "s")
        _look_up(tokens, Datastore(index), table, arguments.num_lookups)
    return 0


def _corpus(path: Path, num_tokens: int) -> Tokens:
    started_s = time.monotonic()
    corpus = CorpusSettings()
    with path.open("wb") as file:
        num_source = write_tokens(
            (document.text for document in source_documents(corpus)), load_tokenizer(DEFAULT_BASE), file
        )
    _say(f"tokenize {num_source:,} tokens", time.monotonic() - started_s, "s")
    source = np.fromfile(path, dtype="<u4")
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        for begin in range(0, num_tokens, len(source)):
            copy = source[: num_tokens - begin].copy()
            places = rng.integers(0, len(copy), int(_EDITED_SHARE * len(copy)))
            copy[places] = np.where(copy[places] == SEPARATOR, SEPARATOR, rng.integers(0, 4096, len(places)))
            file.write(copy.tobytes())
    return np.memmap(path, dtype="<u4", mode="r")


def _look_up(tokens: Tokens, datastore: Datastore, table: NgramTable, num_lookups: int) -> None:
    rng = np.random.default_rng(1)
    contexts: list[list[int]] = []
    while len(contexts) < num_lookups:
        end = int(rng.integers(_CONTEXT_TOKENS, len(tokens)))
        context = tokens[end - _CONTEXT_TOKENS : end].tolist()
        if SEPARATOR not in context:
            context[-int(rng.integers(3, 17))] = int(rng.integers(4096))  # so that a suffix matches, not all of it
            contexts.append(context)
    for label, look_up in (
        ("retrieval lookup", datastore.look_up),
        ("n-gram lookup", lambda context: table.successors(context[-3:])),
    ):
        times_ms = []
        for context in contexts:
            started_ns = time.perf_counter_ns()
            look_up(context)
            times_ms.append((time.perf_counter_ns() - started_ns) / 1e6)
        for percentile in (50, 95, 99):
            _say(f"{label}, p{percentile}", float(np.percentile(times_ms, percentile)), "ms")


def _say(label: str, value: float, unit: str) -> None:
    print(f"{label:40} {value:10.3f} {unit}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
