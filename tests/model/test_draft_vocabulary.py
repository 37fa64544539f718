"""A draft model that names some of its tokens: the same logits for these, and none for the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from easyspec.errors import ConfigurationError
from easyspec.model.config import load_config
from easyspec.model.draft_vocabulary import DraftVocabulary
from easyspec.ops.executor import choose_executor
from easyspec.speculation.parameters import SamplingParameters
from tests.fakes.checkpoints import VOCAB_SIZE, change_config, write_checkpoint
from tests.fakes.gguf_files import write_gguf
from tests.model.passes import Passes, random_token_ids

NAMED = [0, 3, 4, 100, VOCAB_SIZE - 1]
OTHERS = [token_id for token_id in range(VOCAB_SIZE) if token_id not in NAMED]


def check(all_tokens: Path, some_tokens: Path) -> None:
    token_ids = random_token_ids(20, VOCAB_SIZE)
    assert set(token_ids) - set(NAMED)  # what is read need not be what is named
    whole, some = Passes(all_tokens).prefill(token_ids), Passes(some_tokens).prefill(token_ids)
    assert torch.equal(some[:, NAMED], whole[:, NAMED])
    assert (some[:, OTHERS] == float("-inf")).all()


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_named_tokens_have_the_bits_that_they_have_among_all(tmp_path: Path, is_tied: bool, dtype: torch.dtype) -> None:
    folders = [write_checkpoint(tmp_path / name, tie_word_embeddings=is_tied, dtype=dtype) for name in ("all", "some")]
    change_config(folders[1], draft_vocabulary=NAMED)
    check(*folders)


def test_blocks_of_a_gguf_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", tie_word_embeddings=True, has_tokenizer=True)
    metadata = {"easyspec.draft_vocabulary": NAMED}
    check(
        write_gguf(folder, tmp_path / "all.gguf", "Q4_1"),
        write_gguf(folder, tmp_path / "some.gguf", "Q4_1", metadata=metadata),
    )


def test_more_rows_after_fewer(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    change_config(folder, draft_vocabulary=NAMED)
    passes = Passes(folder)
    for num_tokens in (1, 9, 3):
        logits = passes.prefill(random_token_ids(num_tokens, VOCAB_SIZE))
        assert logits.shape == (num_tokens, VOCAB_SIZE)
        assert torch.equal(logits.isfinite().sum(1), torch.full((num_tokens,), len(NAMED)))


@pytest.mark.parametrize("executor", ["reference", "native"])
@pytest.mark.parametrize("num_named", [5, 700])
def test_ranks_of_named_columns_are_those_among_all_tokens(executor: str, num_named: int) -> None:
    ranker = choose_executor(executor, torch.device("cpu"), num_threads=1)
    generator = torch.Generator().manual_seed(num_named)
    names = torch.randperm(3_000, generator=generator)[:num_named].sort().values
    vocabulary = DraftVocabulary(names, 3_000)
    logits = torch.randn(3, num_named, generator=generator) * 4.0
    samplings = [SamplingParameters(temperature=temperature, seed=9) for temperature in (0.0, 0.7, 2.0)]
    own = ranker.rank_tokens(logits, range(5, 8), samplings, 5, names)
    assert own == ranker.rank_tokens(vocabulary.spread(logits), range(5, 8), samplings, 5)


@pytest.mark.parametrize("token_ids", [[], [3, 2], [2, 2], [-1, 2], [VOCAB_SIZE], ["1"], [True], 5, "12"])
def test_impossible_vocabularies_are_refused(tmp_path: Path, token_ids: Any) -> None:
    folder = write_checkpoint(tmp_path)
    change_config(folder, draft_vocabulary=token_ids)
    with pytest.raises(
        ConfigurationError, match=rf"draft_vocabulary .*; allowed: rising numbers, 0 to {VOCAB_SIZE - 1}"
    ):
        load_config(folder)
