"""What a checkpoint says about generating: its end tokens, and how it wants to be sampled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from easyspec.checkpoint.gguf_header import read_header
from easyspec.checkpoint.location import is_gguf
from easyspec.errors import ConfigurationError, InvalidRequestError
from easyspec.speculation.parameters import SamplingParameters
from easyspec.tokenizer_fingerprint import TOKENIZER_FILE, tokens_by_id

_GENERATION_FILE = "generation_config.json"
_SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_GGUF_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "temperature": "general.sampling.temp",
        "top_k": "general.sampling.top_k",
        "top_p": "general.sampling.top_p",
        "min_p": "general.sampling.min_p",
        "repetition_penalty": "general.sampling.penalty_repeat",
    }
)


@dataclass(frozen=True)
class SamplingDefaults:
    """Values for what a request leaves unset; None: the service's own."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The parameters that are set, by the names of `SamplingParameters`."""
        return {name: value for name, value in vars(self).items() if value is not None}


NO_DEFAULTS = SamplingDefaults()


def sampling_defaults(path: Path) -> SamplingDefaults:
    """What generation_config.json, or a GGUF file, asks for.

    Raises ConfigurationError for values that no request may have. `top_k` 0 keeps all tokens there, as unset does here.
    """
    content = generation_config(path)
    source = path if is_gguf(path) else path / _GENERATION_FILE
    given = {name: content[name] for name in _SAMPLING_FIELDS if content.get(name) is not None}
    if given.get("top_k") == 0:
        del given["top_k"]
    try:
        if not all(type(value) in (int, float) for value in given.values()) or type(given.get("top_k", 1)) is not int:
            raise InvalidRequestError("sampling", given, "numbers")
        SamplingParameters(seed=0, **given).check(1)
    except InvalidRequestError as error:
        raise ConfigurationError(
            f"{source} asks for sampling that is not allowed: {error} (--generation-config none leaves it unread)"
        ) from error
    return SamplingDefaults(**given)


def end_token_ids(path: Path, of_config: Any) -> tuple[int, ...]:
    """Every token that ends a text: those of generation_config.json, then of config.json (`of_config`), then the
    tokenizer's own. Raises ConfigurationError for values that are not token ids."""
    found: list[int] = []
    of_tokenizer = None
    if not is_gguf(path) and (path / TOKENIZER_FILE).is_file():
        eos = _read_object(path / "tokenizer_config.json").get("eos_token")
        text = eos.get("content") if isinstance(eos, Mapping) else eos
        if text is not None:
            of_tokenizer = next((token_id for token_id, token in tokens_by_id(path).items() if token == text), None)
    for name, value in (
        (_GENERATION_FILE, generation_config(path).get("eos_token_id")),
        ("config.json", of_config),
        (TOKENIZER_FILE, of_tokenizer),
    ):
        ids = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
        if not all(type(token_id) is int for token_id in ids):
            raise ConfigurationError(f"eos_token_id is {value!r} in {name} of {path}; allowed: token ids")
        found += ids
    return tuple(dict.fromkeys(token_id for token_id in found if token_id >= 0))


def generation_config(path: Path) -> Mapping[str, Any]:
    """The content of generation_config.json, empty where there is none; raises ConfigurationError."""
    if not is_gguf(path):
        return _read_object(path / _GENERATION_FILE)
    metadata = read_header(path).metadata
    return {name: metadata[key] for name, key in _GGUF_KEYS.items() if key in metadata}


def _read_object(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"no usable {file.name} in {file.parent}: {error}") from error
    if not isinstance(content, Mapping):
        raise ConfigurationError(f"no usable {file.name} in {file.parent}: it is not a JSON object")
    return content
