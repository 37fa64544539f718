"""From settings to a model ready to run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog
import torch

from easyspec.checkpoint.location import model_path
from easyspec.errors import ConfigurationError
from easyspec.model.config import ModelConfig, load_config
from easyspec.model.decoder import Decoder
from easyspec.model.fingerprint import model_fingerprint
from easyspec.model.kv_budget import context_within, num_pool_slots
from easyspec.model.kv_cache import KvMemory
from easyspec.model.weight_reader import WeightFormat
from easyspec.model.weight_source import open_weights
from easyspec.ops.executor import choose_executor
from easyspec.parallel.launch import local_rank
from easyspec.parallel.lifeline import Lifeline, open_lifeline
from easyspec.parallel.rank_placement import RankPlacement
from easyspec.parallel.ranks import Ranks, join_group
from easyspec.settings import EngineSettings
from easyspec.speculation.messages import ModelInfo
from easyspec.tokenizer_fingerprint import tokenizer_fingerprint

# Fewer weights than these are read by one thread before a second one has joined in.
_MIN_SHARED_WEIGHTS = 2_000_000
# Hexadecimal digits that fit an int64.
_COMPARED_DIGITS = 15


@dataclass(frozen=True)
class LoadedModel:
    """A decoder, its KV memory, how it introduces itself, the folder it came from, and the tie to the other ranks.

    `info.max_model_len` is what fits that memory.
    """

    decoder: Decoder
    memory: KvMemory
    info: ModelInfo
    folder: Path
    lifeline: Lifeline

    def dismiss_followers(self) -> None:
        """On rank 0, at the end of its last pass: the other ranks may go."""
        self.lifeline.leave()
        self.decoder.dismiss_followers()

    def follow(self) -> None:
        """On the others: compute a part of rank 0's passes until it dismisses them; raises EngineLostError."""
        self.decoder.follow(self.memory.pool)
        self.lifeline.leave()


def load_model(
    settings: EngineSettings, *, placement: RankPlacement = RankPlacement.TENSOR, is_auto_8bit: bool = False
) -> LoadedModel:
    """Read checkpoint and tokenizer onto the device; raises ConfigurationError.

    Under torchrun it reads this rank's part, and all ranks agree on the size of their pools. `is_auto_8bit`: the
    executor `auto` rounds inputs to 8 bits, where that changes no answer.
    """
    device = _device(settings.device)
    folder = model_path(settings.model)
    config = load_config(folder, settings.dtype, settings.max_model_len)
    num_threads = settings.num_threads or _num_threads(config)
    torch.set_num_threads(num_threads)
    executor = choose_executor(settings.executor, device, num_threads, is_auto_8bit=is_auto_8bit)
    weights = WeightFormat(settings.weights)
    ranks = join_group(device)
    lifeline = open_lifeline(ranks.rank, ranks.size, ranks.share)
    # Other ranks leave out what rank 0 adds once, so that only it asks for all tensors.
    open_tensors = partial(open_weights, is_whole=ranks.rank == 0)
    decoder = Decoder(
        folder, config, executor, ranks=ranks, placement=placement, weights=weights, open_tensors=open_tensors
    )
    memory_wishes = settings.num_kv_slots, settings.kv_memory_fraction, settings.kv_memory_gib
    step_bytes = decoder.step_bytes(settings.max_batch_rows, config.max_model_len)
    fitting = num_pool_slots(decoder.layer_config, device, *memory_wishes, step_bytes)
    fingerprint = model_fingerprint(folder, config, executor.name, weights.value)
    num_slots = _agreed_slots(ranks, fitting, fingerprint, device)
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
        fingerprint=fingerprint,
        executor=executor.name,
        weight_format=decoder.weight_format,
    )
    memory = KvMemory(decoder.new_pool(num_slots), shares_prefixes=settings.share_prefixes)
    return LoadedModel(decoder, memory, info, folder, lifeline)


def _agreed_slots(ranks: Ranks, fitting: int, fingerprint: str, device: torch.device) -> int:
    """What fits on every rank. Raises ConfigurationError unless all have the same model, each from its own disk."""
    own = torch.tensor([fitting, int(fingerprint[:_COMPARED_DIGITS], 16)], device=device)
    all_slots, all_models = ranks.gather(own).unbind(dim=1)
    others = [rank for rank, model in enumerate(all_models.tolist()) if model != all_models[0]]
    if others:
        raise ConfigurationError(f"ranks {', '.join(map(str, others))} have another checkpoint than rank 0")
    return int(all_slots.min())


def _num_threads(config: ModelConfig) -> int:
    """1 where there is too little to share; otherwise one a core."""
    c = config
    in_layer = c.hidden_size * (3 * c.intermediate_size + 2 * (c.num_heads + c.num_kv_heads) * c.head_dim)
    num_weights = c.num_layers * in_layer + c.vocab_size * c.hidden_size
    return 1 if num_weights < _MIN_SHARED_WEIGHTS else len(os.sched_getaffinity(0))


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("device is 'cuda'; allowed here: cpu, as torch finds no GPU")
    if name == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(local_rank())
    return torch.device("cuda", local_rank())
