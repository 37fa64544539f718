"""The tokenizer of a folder or a GGUF file, as the libraries have it. They are imported when they are needed: it takes
seconds, as transformers brings torch along."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import structlog

from easyspec.checkpoint.gguf_header import GgufHeader, read_header
from easyspec.checkpoint.location import is_gguf
from easyspec.errors import ConfigurationError
from easyspec.tokenizer_fingerprint import TOKENIZER_FILE

# Texts are cut by these rules before merging. transformers knows the first, which are cut by one pattern each.
_SPLIT_BY_PATTERN = ("llama-bpe", "llama3", "llama-v3", "qwen2", "qwen35", "tekken", "smaug-bpe", "gpt-4o", "llama4")
_SPLIT_AS_GPT2 = ("", "default", "gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "mpt", "olmo", "roberta-bpe")
_SPLIT_WITH_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


def load_tokenizer(path: Path) -> Any:
    """transformers' fast tokenizer, with its chat templates; raises ConfigurationError where there is none."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    header = read_header(path) if is_gguf(path) else None
    try:
        if header is not None:
            # Alone in a folder: transformers would let files beside it have the last word.
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / path.name).symlink_to(path.resolve())
                tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=path.name, local_files_only=True)
        else:
            tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # the library raises a dozen types here
        raise ConfigurationError(f"tokenizer in {path} cannot be loaded: {error}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigurationError(f"tokenizer in {path} is {type(tokenizer).__name__}; a fast one is needed")
    if header is not None:
        _cut_as_trained(tokenizer.backend_tokenizer, header)
    return tokenizer


def load_backend(path: Path) -> Any:
    """The tokenizers library's own, without anything that transformers adds; raises ConfigurationError."""
    if is_gguf(path):
        return load_tokenizer(path).backend_tokenizer
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path / TOKENIZER_FILE))
    except Exception as error:  # the library raises plain Exceptions
        raise ConfigurationError(f"tokenizer in {path} cannot be loaded: {error}") from error


def _cut_as_trained(backend: Any, header: GgufHeader) -> None:
    """Give a byte-level tokenizer the rule by which its file says texts are cut before merging."""
    rule = str(header.metadata.get("tokenizer.ggml.pre", ""))
    if header.metadata.get("tokenizer.ggml.model") != "gpt2" or rule in (*_SPLIT_BY_PATTERN, *_SPLIT_AS_GPT2):
        return
    if rule not in _SPLIT_WITH_SINGLE_DIGITS:
        structlog.get_logger().warning(
            "unknown_tokenizer_rule",
            file=str(header.path),
            rule=rule,
            consequence="texts are cut as GPT-2 cuts them; some prompts may get other tokens than the model expects",
        )
        return
    from tokenizers import pre_tokenizers

    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
