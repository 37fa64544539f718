"""The tokenizer of a folder or a GGUF file, as the libraries have it. They are imported when they are needed: it takes
seconds, as most of transformers brings torch along."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog

from easyspec.checkpoint.gguf_header import read_header
from easyspec.checkpoint.gguf_tokenizer import byte_level_backend, is_plain_byte_level, special_tokens
from easyspec.checkpoint.location import is_gguf
from easyspec.errors import ConfigurationError
from easyspec.tokenizer_fingerprint import TOKENIZER_FILE

# Rules of cutting texts before merging that transformers knows, one pattern each.
_SPLIT_BY_PATTERN = ("llama-bpe", "llama3", "llama-v3", "qwen2", "qwen35", "tekken", "smaug-bpe", "gpt-4o", "llama4")
# Classes of tokenizer_config.json that add nothing to tokenizer.json: the name of it in transformers 4, and in 5.
_GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
_UNKNOWN_RULE = "texts are cut as GPT-2 cuts them; some prompts may get other tokens than the model expects"


def load_tokenizer(path: Path) -> Any:
    """transformers' fast tokenizer, with its chat templates; raises ConfigurationError where there is none."""
    from transformers import PreTrainedTokenizerFast

    header = read_header(path) if is_gguf(path) else None
    try:
        if header is not None and is_plain_byte_level(header):
            backend, template = byte_level_backend(header), header.chat_template or None
            return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special_tokens(header))
        if header is not None:
            rule = str(header.metadata.get("tokenizer.ggml.pre", ""))
            if header.metadata.get("tokenizer.ggml.model") == "gpt2" and rule not in _SPLIT_BY_PATTERN:
                structlog.get_logger().warning(
                    "unknown_tokenizer_rule", file=str(path), rule=rule, consequence=_UNKNOWN_RULE
                )
            # Alone in a folder: transformers would let files beside it have the last word.
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / path.name).symlink_to(path.resolve())
                tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=path.name, local_files_only=True)
        elif _is_described_by_its_file(path):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
        else:
            from transformers import AutoTokenizer  # which brings torch

            tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # the library raises a dozen types here
        raise ConfigurationError(f"tokenizer in {path} cannot be loaded: {error}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigurationError(f"tokenizer in {path} is {type(tokenizer).__name__}; a fast one is needed")
    return tokenizer


def _is_described_by_its_file(folder: Path) -> bool:
    """Whether AutoTokenizer would find nothing but the tokenizer of `tokenizer.json`. It reads the model's
    configuration to tell, which brings torch."""
    described = _json(folder / "tokenizer_config.json")
    model_type = _json(folder / "config.json").get("model_type", "llama")
    return (
        described.get("tokenizer_class") in _GENERIC_CLASSES and "auto_map" not in described and model_type == "llama"
    )


def _json(path: Path) -> Mapping[str, Any]:
    """An object of a file, empty if there is none."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}


def load_backend(path: Path) -> Any:
    """The tokenizers library's own, without anything that transformers adds; raises ConfigurationError."""
    header = read_header(path) if is_gguf(path) else None
    if header is not None and not is_plain_byte_level(header):
        return load_tokenizer(path).backend_tokenizer
    from tokenizers import Tokenizer

    try:
        if header is not None:
            return byte_level_backend(header)
        return Tokenizer.from_file(str(path / TOKENIZER_FILE))
    except Exception as error:  # the library raises plain Exceptions
        raise ConfigurationError(f"tokenizer in {path} cannot be loaded: {error}") from error
