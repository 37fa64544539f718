"""Which numbers of ranks a model can be split over, and what is said about the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from easyspec.errors import ConfigurationError
from easyspec.model.config import ModelConfig, load_config
from easyspec.parallel.shard import Shard

LLAMA = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 24,
    "num_key_value_heads": 6,
    "intermediate_size": 768,
}


def config(folder: Path, **fields: object) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps({**LLAMA, "head_dim": 32, **fields}))
    return load_config(folder)


@pytest.mark.parametrize(
    ("fields", "size", "allowed"),
    [
        # 5 and 16 do not divide 24 heads; 4 neither divides 6 KV heads nor is a multiple; 8 splits heads and MLP.
        ({}, 5, "1, 2, 3, 6, 12, 24"),
        ({}, 16, "1, 2, 3, 6, 12, 24"),
        ({}, 4, "1, 2, 3, 6, 12, 24"),
        ({"num_key_value_heads": 1}, 5, "1, 2, 3, 4, 6, 8, 12, 24"),
        ({"num_key_value_heads": 24, "intermediate_size": 700}, 8, "1, 2, 4"),
    ],
)
def test_sizes_that_do_not_split_are_refused_with_those_that_do(
    tmp_path: Path, fields: dict[str, object], size: int, allowed: str
) -> None:
    model = config(tmp_path, **fields)
    with pytest.raises(ConfigurationError, match=rf"tensor_parallel_size is {size}: .* allowed: {allowed}$"):
        Shard(0, size).check(model)
    for working in allowed.split(", "):
        Shard(0, int(working)).check(model)


@pytest.mark.parametrize("size", [1, 2, 3, 6, 12, 24])
def test_shares_are_equal_and_together_everything(tmp_path: Path, size: int) -> None:
    model = config(tmp_path)
    shards = [Shard(rank, size) for rank in range(size)]
    assert [head for shard in shards for head in shard.rows(24)] == list(range(24))
    for shard in shards:
        own = shard.of(model)
        # A rank has the KV heads that its query heads read: 4 queries to each.
        assert [head // 4 for head in shard.rows(24)] == [
            shard.kv_heads(6).start + query // (own.num_heads // own.num_kv_heads) for query in range(own.num_heads)
        ]
        assert len(shard.kv_heads(6)) == own.num_kv_heads == max(1, 6 // size)


@pytest.mark.parametrize("vocab_size", [1, 5, 16, 1000, 1001])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_any_vocabulary_is_split_the_last_shares_are_short(vocab_size: int, size: int) -> None:
    shares = [Shard(rank, size).vocabulary(vocab_size) for rank in range(size)]
    assert [token_id for share in shares for token_id in share] == list(range(vocab_size))
    share = Shard(0, size).vocabulary_share(vocab_size)
    assert all(len(own) <= share for own in shares)
    assert len(shares[0]) == share


def test_split_mlps_are_refused_with_the_numbers_of_ranks_that_work(tmp_path: Path) -> None:
    model = config(tmp_path, intermediate_size=700)
    Shard(0, 4).check_mlp(model)
    with pytest.raises(
        ConfigurationError,
        match=r"rank_placement is 'layers-sharded-mlp' on 3 ranks: an MLP of 700 .*; allowed: 1, 2, 4, 5 ranks, or",
    ):
        Shard(0, 3).check_mlp(model)
