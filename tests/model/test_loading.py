from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from easyspec.errors import ConfigurationError
from easyspec.model.loading import load_model
from easyspec.tokenizer_fingerprint import tokenizer_fingerprint
from tests.fakes.checkpoints import VOCAB_SIZE, change_config, write_checkpoint


@dataclass(frozen=True)
class Settings:
    IS_AUTO_8BIT: ClassVar[bool] = False
    model: str
    served_model_name: str = "tiny"
    device: str = "cpu"
    dtype: str = "auto"
    executor: str = "auto"
    weights: str = "auto"
    num_threads: int | None = None
    num_kv_slots: int | None = 64
    kv_memory_fraction: float | None = None
    kv_memory_gib: float | None = None
    share_prefixes: bool = True
    max_model_len: int | None = None
    max_tree_nodes: int = 16
    max_batch_rows: int = 64


def test_a_checkpoint_introduces_itself(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen2", has_tokenizer=True, eos_token_id=[3, 4], dtype=torch.bfloat16)
    loaded = load_model(Settings(str(tmp_path), max_model_len=48))
    info = loaded.info
    assert (info.name, info.vocab_size, info.max_model_len, info.num_layers) == ("tiny", VOCAB_SIZE, 48, 3)
    assert (info.dtype, tuple(info.eos_token_ids)) == ("bfloat16", (3, 4, 0))
    assert info.num_parameters == loaded.decoder.num_parameters
    assert info.tokenizer_fingerprint == tokenizer_fingerprint(tmp_path)
    assert (loaded.memory.num_slots, loaded.memory.num_used_slots) == (64, 0)
    assert loaded.memory.pool.keys.dtype == torch.bfloat16


def test_num_threads_is_set(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, has_tokenizer=True)
    num_threads = torch.get_num_threads()
    try:
        load_model(Settings(str(tmp_path), num_threads=2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(num_threads)


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    with pytest.raises(ConfigurationError, match=r"tokenizer\.json cannot be read"):
        load_model(Settings(str(tmp_path)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="device is 'cuda'; allowed here: cpu"):
        load_model(Settings(str(write_checkpoint(tmp_path, has_tokenizer=True)), device="cuda"))


def test_weights_of_more_than_the_config_says_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, has_tokenizer=True)
    change_config(tmp_path, num_hidden_layers=2)
    with pytest.raises(ConfigurationError, match=r"'model\.layers\.2\..* not used by the model of config\.json"):
        load_model(Settings(str(tmp_path)))
