"""`python -m bench.datastore`: how long index and n-gram table of a large corpus take to build, and a lookup.

From text to both files, as `easyspec index build --ngrams` does it. The corpus is the text that a Python installation
has: Python and reStructuredText files of the standard library, its tests and the installed packages, as many as are
asked for; if they are too few, documents are taken again from the beginning, which the output says.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from bench.machine import REPOSITORY
from drafter_service.text.datastore import Datastore
from easyspec.cli.processes import DEFAULT_BASE
from easyspec.datastore.build import DatastoreFiles, build_datastore
from easyspec.datastore.corpus import SEPARATOR, Tokens, load_tokenizer
from easyspec.datastore.ngram_table import NgramTable
from easyspec.datastore.suffix_index import SuffixIndex
from easyspec.tokenizer_fingerprint import tokenizer_fingerprint

_SUFFIXES = {".py", ".pyi", ".rst", ".md", ".txt"}
_MAX_FILE_BYTES = 1 << 20
_CONTEXT_TOKENS = 32
# Of such text with the bundled tokenizer; only decides where the corpus ends.
_CHARS_PER_TOKEN = 2.9


def main(argv: Sequence[str]) -> int:
    """Print one line per measurement."""
    parser = argparse.ArgumentParser(prog="python -m bench.datastore", description=__doc__)
    parser.add_argument("--num-tokens", type=int, default=50_000_000, help="about so many (default: 50 million)")
    parser.add_argument("--num-lookups", type=int, default=5_000)
    arguments = parser.parse_args(argv)
    fingerprint = tokenizer_fingerprint(DEFAULT_BASE)
    work = REPOSITORY / ".bench"
    work.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as name:
        files = DatastoreFiles(Path(name) / "index", Path(name) / "ngrams")
        assert files.index is not None
        assert files.ngrams is not None
        started_s = time.monotonic()
        build_datastore(_documents(arguments.num_tokens), DEFAULT_BASE, files, lambda what, s: _say(what, s, "s"))
        _say("from text to both files", time.monotonic() - started_s, "s")
        peaks_kib = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        _say("peak memory of the two processes", sum(peaks_kib) / 1024, "MiB")
        _say("index on disk", files.index.stat().st_size / 1e6, "MB")
        _say("n-gram table on disk", files.ngrams.stat().st_size / 1e6, "MB")
        started_s = time.monotonic()
        index, table = SuffixIndex(files.index, fingerprint), NgramTable(files.ngrams, fingerprint)
        _say("open and check both", time.monotonic() - started_s, "s")
        _look_up(_some_tokens(), Datastore(index), table, arguments.num_lookups)
    return 0


def _documents(num_tokens: int) -> Iterator[str]:
    """Text of about so many tokens."""
    num_chars_left = num_tokens * _CHARS_PER_TOKEN
    for turn in itertools.count(1):
        if turn > 1:
            print(f"the installation's text is too little: taken for the {turn}. time", flush=True)
        for text in _installed_text():
            yield text
            num_chars_left -= len(text)
            if num_chars_left <= 0:
                return


def _installed_text() -> Iterator[str]:
    seen: set[Path] = set()
    for name in ("stdlib", "purelib"):
        for path in sorted(Path(sysconfig.get_paths()[name]).rglob("*")):
            if path.suffix in _SUFFIXES and path not in seen and path.is_file():
                seen.add(path)
                if path.stat().st_size <= _MAX_FILE_BYTES:
                    yield path.read_text(encoding="utf-8", errors="replace")


def _some_tokens() -> Tokens:
    """Of every 25th document, a separator after each."""
    texts = list(itertools.islice(_installed_text(), 0, 4000, 25))
    encodings = load_tokenizer(DEFAULT_BASE).encode_batch_fast(texts, add_special_tokens=False)
    return np.array([token_id for each in encodings for token_id in (*each.ids, SEPARATOR)], dtype=np.uint32)


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
