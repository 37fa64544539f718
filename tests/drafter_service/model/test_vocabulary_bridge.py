"""A draft model of nearly the base's vocabulary: only shared tokens are drafted, and the output is plain decoding's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from drafter_service.__main__ import fitting
from drafter_service.config import DrafterSettings
from drafter_service.engine import DrafterEngine
from drafter_service.model.vocabulary_bridge import VocabularyBridge
from easyspec.speculation.messages import Calibration, OpenSpeculation
from easyspec.speculation.parameters import SamplingParameters, TreeBudget
from easyspec.speculation.sources import DraftSources, parse_sources
from easyspec.tokenizer_fingerprint import tokenizer_fingerprint
from tests.conftest import started
from tests.fakes.checkpoints import VOCAB_SIZE, write_checkpoint

NUM_ADDED = 8


def test_ids_are_shared_replaced_or_masked() -> None:
    bridge = VocabularyBridge({0: "x", 1: "b", 2: "c", 9: "<tool>"}, {0: "a", 1: "b", 2: "c", 3: "d"}, 5)
    assert bridge.num_ids == 10
    assert bridge.to_draft([0, 1, 2, 9, 3]) == [1, 1, 2, 1, 1]
    masked = bridge.masked(torch.zeros(2, 5))
    assert masked.tolist() == [[-torch.inf, 0.0, 0.0, -torch.inf, -torch.inf]] * 2


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("draft"), num_hidden_layers=2, has_tokenizer=True)


@pytest.fixture(scope="module")
def base_tokenizer(draft: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The draft's, with one entry renamed and some added behind its last row."""
    folder = tmp_path_factory.mktemp("base")
    shutil.copy(draft / "tokenizer.json", folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    added = [{**content["added_tokens"][0], "id": VOCAB_SIZE + i, "content": f"<added-{i}>"} for i in range(NUM_ADDED)]
    renamed = {**content["added_tokens"][0], "content": "<begin>"}
    content["added_tokens"] = [renamed, *added]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def engine(draft: Path, base_tokenizer: Path) -> Iterator[DrafterEngine]:
    settings = DrafterSettings(
        model=str(draft), tokenizer=base_tokenizer, sources="model", num_threads=1, num_kv_slots=2000
    )
    assert fitting(settings, base_tokenizer) is settings
    engine = DrafterEngine(settings)
    with started(engine):
        yield engine


async def test_it_speaks_the_bases_ids_and_drafts_shared_ones(engine: DrafterEngine, base_tokenizer: Path) -> None:
    assert engine.model_info.tokenizer_fingerprint == tokenizer_fingerprint(base_tokenizer)
    prompt = (5, VOCAB_SIZE + 3, 0, 8)  # an id beyond the table, and one that means something else
    drafted: set[int] = set()
    for seed in range(40):  # hot: nearly every token comes up
        sampling = SamplingParameters(seed=seed, temperature=50.0)
        session_id = await engine.open(OpenSpeculation(prompt, sampling, max_total_length=200))
        said = (VOCAB_SIZE + 1, 7)  # the base says what the draft model cannot
        tree = (await engine.draft(session_id, Calibration(len(prompt), said, TreeBudget(3, 8, 24)))).tree
        drafted |= set(tree.token_ids)
        engine.close(session_id)
    assert len(drafted) > VOCAB_SIZE // 2
    assert 0 not in drafted
    assert max(drafted) < VOCAB_SIZE


def test_a_model_that_does_not_fit_is_left_out(draft: Path, tmp_path: Path) -> None:
    other = {"model": {"vocab": {f"t{index}": index for index in range(VOCAB_SIZE)}}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    settings = fitting(DrafterSettings(model=str(draft), tokenizer=tmp_path), tmp_path)
    assert settings.draft_sources == parse_sources(["retrieval", "ngram"])
    assert not settings.draft_sources & DraftSources.MODEL
