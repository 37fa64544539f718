"""Where a model's files are: a folder, a GGUF file, or a hub id whose files are fetched."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from easyspec.errors import ConfigurationError

GGUF_SUFFIX = ".gguf"
TOKENIZER_PATTERNS = ("*.json", "*.jinja", "*.model")
_ALL_PATTERNS = (*TOKENIZER_PATTERNS, "*.safetensors")
# The same weights once more in their makers' own layout, and other models in folders below.
_NEEDLESS_PATTERNS = ("consolidated*", "original/*", "*/*.safetensors")
_HUB_FILE = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)/(?P<file>[\w./-]+\.gguf)")


def is_gguf(path: Path) -> bool:
    """Whether a model's path is a GGUF file; every other path is a folder."""
    return path.suffix == GGUF_SUFFIX


def weight_bytes(path: Path) -> int:
    """Size of a model's weight files; 0 if there are none."""
    files = [path] if is_gguf(path) else list(path.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files if file.is_file())


def model_path(model: str, patterns: Sequence[str] = _ALL_PATTERNS) -> Path:
    """The folder or GGUF file of a model.

    `model` is that path itself, a folder with a single GGUF file and no config.json, a hub id (OWNER/NAME) or a GGUF
    file of one (OWNER/NAME/FILE.gguf). Files matching `patterns` are fetched into the hub's cache unless they are
    there. Raises ConfigurationError.
    """
    path = Path(model).expanduser()
    if path.is_file() and is_gguf(path):
        return path
    if path.is_dir():
        files = sorted(path.glob(f"*{GGUF_SUFFIX}"))
        if len(files) > 1 and not (path / "config.json").is_file():
            names = ", ".join(file.name for file in files)
            raise ConfigurationError(f"model is {model!r}, a folder of several GGUF files; name one of: {names}")
        return files[0] if files and not (path / "config.json").is_file() else path
    if path.exists():
        raise ConfigurationError(f"model is {model!r}, a file; allowed: a checkpoint folder, a .gguf file or a hub id")
    return _fetched(model, patterns)


def _fetched(model: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download

    try:
        if (found := _HUB_FILE.fullmatch(model)) is not None:
            return Path(hf_hub_download(found["id"], found["file"]))
        found_folder = Path(
            snapshot_download(model, allow_patterns=list(patterns), ignore_patterns=list(_NEEDLESS_PATTERNS))
        )
    except Exception as error:  # the library raises a dozen types: of the name, the network, the hub
        raise ConfigurationError(
            f"model is {model!r}: neither a folder, nor a .gguf file, nor a hub id that can be fetched "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'})"
        ) from error
    if (found_folder / "config.json").is_file():
        return found_folder
    try:
        files = [f"{model}/{name}" for name in sorted(list_repo_files(model)) if is_gguf(Path(name))]
    except Exception:  # as above; the caller goes on with what it has
        files = []
    if files:
        raise ConfigurationError(f"model is {model!r}, a hub id with GGUF files; name one: {', '.join(files)}")
    return found_folder
