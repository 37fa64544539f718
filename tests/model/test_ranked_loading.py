"""Loading on several ranks: they agree, take their part each, and part from each other in order."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.ranks.rank_memory import load_on, replicated_bytes, write_random_llama
from easyspec.errors import ConfigurationError
from easyspec.model.config import load_config
from easyspec.model.loading import LoadedModel, load_model
from tests.fakes.checkpoints import write_checkpoint
from tests.model.test_loading import Settings
from tests.parallel.rank_runner import run_ranks

MIB = 2**20


def load_and_leave(folders: list[Path], num_kv_slots: list[int]) -> Any:
    """This rank's slots, and how many weights its layers have."""
    rank = int(os.environ["RANK"])
    try:
        loaded = load_model(Settings(str(folders[rank]), num_kv_slots=num_kv_slots[rank]))
    except ConfigurationError as error:
        return str(error)
    if rank == 0:
        loaded.dismiss_followers()
    else:
        with torch.inference_mode():
            loaded.follow()
    return loaded.memory.num_slots, num_weights(loaded)


def num_weights(loaded: LoadedModel) -> int:
    """Weights of this rank's layers."""
    return sum(weight.num_outputs * weight.num_inputs for layer in loaded.decoder._layers for weight in layer.weights)


def test_ranks_hold_their_share_and_as_many_slots_as_fit_everywhere(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, has_tokenizer=True)
    num_whole = num_weights(load_model(Settings(str(folder))))
    assert run_ranks(2, load_and_leave, [folder, folder], [96, 80]) == [(80, num_whole // 2)] * 2


def test_another_checkpoint_on_another_machine_is_refused(tmp_path: Path) -> None:
    folders = [write_checkpoint(tmp_path / str(seed), has_tokenizer=True, seed=seed) for seed in (0, 1)]
    said = run_ranks(2, load_and_leave, folders, [64, 64])
    assert said == ["ranks 1 have another checkpoint than rank 0"] * 2


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_memory_while_loading_is_divided_by_the_ranks(tmp_path: Path) -> None:
    folder = write_random_llama(tmp_path)
    replicated = replicated_bytes(load_config(folder))
    ((alone,), *groups) = [load_on(folder, num_ranks) for num_ranks in (1, 2, 4)]
    for memories in groups:
        planned = replicated + (alone["peak_bytes"] - replicated) / len(memories)
        for memory in memories:
            # A page here and there, and buffers of the library.
            assert memory["peak_bytes"] < 1.1 * planned + 16 * MIB, (len(memories), memory["rank"])
