"""The bench of kernels runs with a tiny shape; its figures are looked at where nothing else runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.kernels import kernels
from easyspec.errors import ConfigurationError
from tests.ops.small_model import PATHS

TINY = ["--shape", "tiny", "--rows", "1", "3", "--contexts", "5", "300", "--threads", "1", "--repeats", "2"]


@pytest.mark.skipif(not PATHS, reason="the library was not built")
def test_every_table_has_every_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kernels.json"
    formats = ["float32", "int4"]
    assert kernels.BENCHMARK.main([*TINY, "--code-path", "portable", "--formats", *formats, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert (report["executor"], report["num_threads"]) == ("native-portable", 1)
    assert report["commit"]
    cells = [(each["what"], each["format"], each["context"], each["num_rows"]) for each in report["results"]]
    assert len(set(cells)) == len(cells)
    assert set(cells) == {
        *(("products", name, 0, rows) for name in formats for rows in (1, 3)),
        *(("attention", "bfloat16", context, rows) for context in (5, 300) for rows in (1, 3)),
        *(("pass", name, context, rows) for name in formats for context in (5, 300) for rows in (1, 3)),
    }
    assert all(each["median_ms"] > 0 and each["gb_per_s"] > 0 for each in report["results"])
    assert "native-portable, 1 threads, tiny" in capsys.readouterr().out


def test_without_a_library_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "library_problem", lambda: "its library was not built")
    with pytest.raises(ConfigurationError, match="not built"):
        kernels.BENCHMARK.main(TINY)
