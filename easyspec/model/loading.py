"""From settings to a model ready to run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog
import torch

from easyspec.errors import ConfigurationError
from easyspec.model.config import ModelConfig, checkpoint_folder, load_config
from easyspec.model.decoder import Decoder
from easyspec.model.fingerprint import model_fingerprint
from easyspec.model.kv_budget import context_within, num_pool_slots
from easyspec.model.kv_cache import KvMemory, KVPool
from easyspec.speculation.messages import ModelInfo
from easyspec.tokenizer_fingerprint import tokenizer_fingerprint

_MIN_SHARED_WEIGHTS = 2**20


class ModelSettings(Protocol):
    """The settings that loading needs; the services' settings have them."""

    @property
    def model(self) -> str: ...
    @property
    def served_model_name(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def num_threads(self) -> int | None: ...
    @property
    def num_kv_slots(self) -> int | None: ...
    @property
    def kv_memory_fraction(self) -> float | None: ...
    @property
    def share_prefixes(self) -> bool: ...
    @property
    def max_model_len(self) -> int | None: ...
    @property
    def max_tree_nodes(self) -> int: ...


@dataclass(frozen=True)
class LoadedModel:
    """A decoder, its KV memory, how it introduces itself, and the folder it came from.

    `info.max_model_len` is what fits that memory.
    """

    decoder: Decoder
    memory: KvMemory
    info: ModelInfo
    folder: Path


def load_model(settings: ModelSettings, *, is_exact: bool) -> LoadedModel:
    """Read checkpoint and tokenizer onto the device; raises ConfigurationError."""
    device = _device(settings.device)
    folder = checkpoint_folder(settings.model)
    config = load_config(folder, settings.dtype, settings.max_model_len)
    num_threads = settings.num_threads or _num_threads(config)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    decoder = Decoder(folder, config, device, is_exact=is_exact)
    num_slots = num_pool_slots(config, device, settings.num_kv_slots, settings.kv_memory_fraction)
    context = context_within(num_slots, settings.max_tree_nodes, config, settings.max_model_len)
    if context < config.max_model_len:
        structlog.get_logger().warning("context_cut_to_kv_memory", max_model_len=context, num_kv_slots=num_slots)
    info = ModelInfo(
        name=settings.served_model_name,
        vocab_size=config.vocab_size,
        max_model_len=context,
        tokenizer_fingerprint=tokenizer_fingerprint(folder),
        num_parameters=decoder.num_parameters,
        dtype=str(config.dtype).removeprefix("torch."),
        eos_token_ids=config.eos_token_ids,
        num_layers=config.num_layers,
        fingerprint=model_fingerprint(folder, config),
    )
    memory = KvMemory(KVPool(config, num_slots, device), shares_prefixes=settings.share_prefixes)
    return LoadedModel(decoder, memory, info, folder)


def _num_threads(config: ModelConfig) -> int | None:
    """1 where the largest matrix of a layer is too small to share; otherwise torch's own choice."""
    largest = config.hidden_size * max(2 * config.intermediate_size, config.num_heads * config.head_dim)
    return 1 if largest < _MIN_SHARED_WEIGHTS else None


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("device is 'cuda'; allowed here: cpu, as torch finds no GPU")
    return torch.device(name)
