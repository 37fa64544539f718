from __future__ import annotations

from pathlib import Path

import pytest

from easyspec.cli.doctor.checkpoints import checkpoint_findings
from easyspec.cli.doctor.report import Finding, State
from tests.fakes.checkpoints import write_checkpoint
from tests.fakes.gguf_files import write_gguf
from tests.fakes.tiny_tokenizer import write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for blocks of 256."""
    folder = tmp_path_factory.mktemp("wide")
    write_checkpoint(folder, num_hidden_layers=1, hidden_size=256, intermediate_size=256)
    return write_tokenizer(folder)


def found(base: Path, draft: Path | None = None) -> dict[str, Finding]:
    return {finding.check: finding for finding in checkpoint_findings(base, draft)}


def test_a_file_that_fits_a_folder(folder: Path, tmp_path: Path) -> None:
    findings = found(write_gguf(folder, tmp_path / "fine.gguf", "Q4_K"), folder)
    assert {finding.state for finding in findings.values()} <= {State.OK, State.WARNING}
    assert findings["base config"].message == "GGUF, llama, 1 layers of 256, 512 positions"
    assert "9 of Q4_K" in findings["base weights"].message
    assert findings["pair tokenizer"].state is State.OK
    assert findings["pair size"].state is State.WARNING  # the folder's weights are larger


def test_what_will_not_run(folder: Path, tmp_path: Path) -> None:
    strange = found(write_gguf(folder, tmp_path / "strange.gguf", metadata={"general.architecture": "mamba"}))
    assert strange["base config"].state is State.PROBLEM
    unread = found(write_gguf(folder, tmp_path / "unread.gguf", "Q2_K"))["base weights"]
    assert (unread.state, "Q2_K" in unread.message, "Q4_K" in unread.advice) == (State.PROBLEM, True, True)
    path = write_gguf(folder, tmp_path / "short.gguf")
    path.write_bytes(path.read_bytes()[:-100])
    assert found(path)["base weights"].advice == "download it again"
    path.write_bytes(b"GGUF" + bytes(100))
    assert found(path)["base config"].state is State.PROBLEM
