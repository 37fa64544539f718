"""A datastore file is refused unless every byte of it is as it was written, and made for this tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from easyspec.datastore.sections import SectionReader, SectionWriter
from easyspec.errors import ConfigurationError

FINGERPRINT = "f" * 64


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    with SectionWriter(path, "test", FINGERPRINT) as writer:
        writer.metadata = {"answer": 42}
        writer.write("numbers", [bytes([1, 0, 0, 0]), bytes([2, 0, 0, 0])])
        writer.write("bytes", [b"abc"])
    return path


def test_it_reads_what_was_written(path: Path) -> None:
    reader = SectionReader(path, "test", FINGERPRINT)
    assert reader.metadata == {"answer": 42}
    assert reader.section("numbers", "I").tolist() == [1, 2]
    assert bytes(reader.section("bytes", "B")) == b"abc"


def test_any_changed_byte_is_seen(path: Path) -> None:
    content = path.read_bytes()
    used = [*range(28), *range(64, 72), *range(128, len(content))]  # the rest is padding
    for place in used:
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x20]) + content[place + 1 :])
        with pytest.raises(ConfigurationError, match="store"):
            SectionReader(path, "test", FINGERPRINT)


def test_a_file_cut_short_is_seen(path: Path) -> None:
    content = path.read_bytes()
    for length in (0, 1, 63, 64, 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ConfigurationError, match="store"):
            SectionReader(path, "test", FINGERPRINT)


def test_foreign_files_are_named(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="another tokenizer"):
        SectionReader(path, "test", "0" * 64)
    with pytest.raises(ConfigurationError, match="is a test file, not a suffix index file"):
        SectionReader(path, "suffix index", FINGERPRINT)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        SectionReader(tmp_path / "nothing", "test", FINGERPRINT)
    (tmp_path / "text").write_text("import this\n" * 100)
    with pytest.raises(ConfigurationError, match="not a datastore file"):
        SectionReader(tmp_path / "text", "test", FINGERPRINT)


def test_a_failed_writer_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with SectionWriter(tmp_path / "store", "test", FINGERPRINT) as writer:
            writer.write("bytes", [b"abc"])
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power"):
        write()
    assert list(tmp_path.iterdir()) == []
