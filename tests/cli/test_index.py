"""`easyspec index`: from text to files that a drafter opens."""

from __future__ import annotations

from pathlib import Path

import pytest

from easyspec.datastore.corpus import load_tokenizer
from easyspec.datastore.ngram_table import NgramTable
from easyspec.datastore.suffix_index import SuffixIndex
from easyspec.tokenizer_fingerprint import tokenizer_fingerprint
from tests.cli.conftest import Command


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "below").mkdir(parents=True)
    (folder / "one.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 3)
    (folder / "below" / "two.jsonl").write_text('{"text": "stop here"}\n\n{"text": "stop here"}\n')
    (folder / "binary").write_bytes(bytes([0xFF, 0xFE, 0x00]))
    return folder


async def test_files_are_built_and_open(easyspec_command: Command, checkpoint: Path, corpus: Path) -> None:
    fingerprint = tokenizer_fingerprint(checkpoint)
    folder = corpus.parent
    wanted = ["--tokenizer", str(checkpoint), "--output"]
    for name, command in (("index", "build"), ("ngrams", "ngrams")):
        ended = await easyspec_command("index", command, str(corpus), *wanted, str(folder / name))
        assert ended.code == 0, ended.stderr
    ended = await easyspec_command(
        "index", "build", str(corpus), *wanted, str(folder / "index.2"), "--ngrams", str(folder / "ngrams.2")
    )
    assert ended.code == 0, ended.stderr
    for name in ("index", "ngrams"):
        assert (folder / f"{name}.2").read_bytes() == (folder / name).read_bytes()
    stop = load_tokenizer(checkpoint).encode("stop here", add_special_tokens=False).ids
    index, table = SuffixIndex(folder / "index", fingerprint), NgramTable(folder / "ngrams", fingerprint)
    assert index.num_tokens == table.num_tokens
    (match,) = index.longest_matches(stop[:-1], 1, 16)
    assert (stop[-1],) in index.continuations(match, 10, 1)
    successors = table.successors(stop[:1])
    assert successors is not None
    assert stop[1] in successors.token_ids
    assert sorted(path.name for path in folder.iterdir()) == [
        "corpus",
        "index",
        "index.2",
        "ngrams",
        "ngrams.2",
    ]  # nothing else is left


async def test_what_cannot_be_built_is_said_in_one_line(
    easyspec_command: Command, checkpoint: Path, corpus: Path
) -> None:
    output = str(corpus.parent / "index")
    for arguments, problem in (
        ([str(corpus / "nothing"), "--tokenizer", str(checkpoint), "--output", output], "does not exist"),
        ([str(corpus), "--tokenizer", str(corpus), "--output", output], "tokenizer"),
        ([str(corpus), "--tokenizer", str(checkpoint), "--output", "/nowhere/index"], "a folder that exists"),
        ([str(corpus / "binary"), "--tokenizer", str(checkpoint), "--output", output], "holds no text"),
    ):
        ended = await easyspec_command("index", "build", *arguments)
        assert ended.code == 2
        assert problem in ended.stderr
        assert "Traceback" not in ended.stderr
