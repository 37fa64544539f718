from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from easyspec.checkpoint.tokenizer_files import load_tokenizer

_BASE = Path(__file__).parents[2] / "models" / "base"


def folder_with(folder: Path, config: dict[str, Any] | None, **fields: Any) -> Path:
    """The bundled tokenizer, described in another way, beside a model's configuration or alone."""
    described = json.loads((_BASE / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**described, **fields}))
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(_BASE / name, folder)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "TokenizersBackend"])
@pytest.mark.parametrize("config", [None, {"model_type": "llama"}])
def test_a_tokenizer_described_by_its_file_is_the_one_that_transformers_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, config: dict[str, Any] | None
) -> None:
    folder = folder_with(tmp_path, config, tokenizer_class=name)
    found = AutoTokenizer.from_pretrained(str(_BASE))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **options: pytest.fail("asked"))
    ours = load_tokenizer(folder)
    assert ours.backend_tokenizer.to_str() == found.backend_tokenizer.to_str()
    assert (ours.special_tokens_map, ours.chat_template) == (found.special_tokens_map, found.chat_template)
    assert ours.all_special_ids == found.all_special_ids


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ({"model_type": "qwen2"}, {}),  # transformers knows better than such files
        ({"model_type": "llama"}, {"tokenizer_class": "LlamaTokenizer"}),
        ({"model_type": "llama"}, {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}),
    ],
)
def test_other_tokenizers_are_left_to_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], fields: dict[str, Any]
) -> None:
    asked = []
    found = AutoTokenizer.from_pretrained(str(_BASE))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda path, **options: asked.append(path) or found)
    folder = folder_with(tmp_path, config, **fields)
    assert load_tokenizer(folder) is found
    assert asked == [str(folder)]


def test_a_tokenizer_described_by_its_file_needs_no_torch() -> None:
    program = (
        "import sys; from pathlib import Path; from easyspec.checkpoint.tokenizer_files import load_tokenizer; "
        f"load_tokenizer(Path({str(_BASE)!r})); print('torch' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
    )
