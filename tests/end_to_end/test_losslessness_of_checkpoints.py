"""Experts, windows and blocks of four bits say what plain decoding says with any drafter, in float32 and bfloat16."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from drafter_service.engine import DrafterEngine
from drafter_service.text_engine import TextDrafterEngine
from easyspec.speculation.messages import OpenVerification
from easyspec.speculation.parameters import SamplingParameters, StopConditions
from easyspec.speculation.sources import TEXT_SOURCES, DraftSources
from easyspec.tokenizer_fingerprint import tokenizer_fingerprint
from tests.end_to_end.test_sources import drafter_with_model, started, text_drafter, write_datastore
from tests.engine_driver import Output, drafting, generate
from tests.fakes.checkpoints import VOCAB_SIZE, write_checkpoint
from tests.fakes.drafts import write_draft
from tests.fakes.families import FAMILY_OPTIONS
from tests.fakes.gguf_files import write_gguf
from tests.model.passes import random_token_ids
from verifier_service.config import VerifierSettings
from verifier_service.engine import VerifierEngine

# Prompts and outputs are longer than the windows, of 40 tokens.
PROMPT_TOKENS, OUTPUT_TOKENS = 50, 40
SAMPLINGS = (
    SamplingParameters(seed=0, temperature=0.0),
    SamplingParameters(seed=1, temperature=0.0, repetition_penalty=1.3),
    SamplingParameters(seed=2, temperature=0.8),
    SamplingParameters(seed=3, temperature=1.0, top_p=0.9, top_k=20),
)
# Families, and whether the base is a GGUF file of blocks of four bits.
CHECKPOINTS = {
    "mixture of experts": ("qwen3_moe", False),
    "experts, windows and sinks": ("gpt_oss", False),
    "windows": ("gemma2", False),
    "windows of 40 in every layer": ("mistral", False),
    "Q4_1": ("llama", True),
    "Q4_0": ("qwen2", True),
}


@dataclass(frozen=True)
class Pair:
    """A base model, and a draft model that is nearly the same."""

    base: Path
    tokenizer: Path
    draft: Path


@pytest.fixture(scope="module", params=CHECKPOINTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    model_type, is_gguf = CHECKPOINTS[request.param]
    folder, draft = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("draft")
    options = {"num_hidden_layers": 3, "std": 0.2, "eos_token_id": 0, **FAMILY_OPTIONS[model_type]}
    write_checkpoint(folder, model_type, has_tokenizer=True, **options)
    base = write_gguf(folder, folder / "base.gguf", request.param) if is_gguf else folder
    return Pair(base, folder, write_draft(draft, folder, noise=0.05))


def requests() -> list[OpenVerification]:
    stop = StopConditions(OUTPUT_TOKENS, ignore_eos=True)
    return [
        OpenVerification(tuple(random_token_ids(PROMPT_TOKENS, VOCAB_SIZE, seed)), sampling, stop)
        for sampling in SAMPLINGS
        for seed in (1, 2)
    ]


@asynccontextmanager
async def started_verifier(pair: Pair, dtype: str) -> AsyncIterator[VerifierEngine]:
    settings = VerifierSettings.model_validate(
        {"model": str(pair.base), "num_threads": 1, "num_kv_slots": 4096, "dtype": dtype}
    )
    engine = VerifierEngine(settings)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def speculate(
    verifier: VerifierEngine, drafter: DrafterEngine | TextDrafterEngine, sources: DraftSources
) -> list[Output]:
    """All requests at the same time."""

    async def ask(request: OpenVerification) -> Output:
        async with drafting(drafter, request, sources=sources) as drafts:
            return await generate(verifier, request, drafts)

    return await asyncio.gather(*map(ask, requests()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_every_kind_of_checkpoint_says_what_plain_decoding_says(pair: Pair, dtype: str, tmp_path: Path) -> None:
    """Trees of a draft model, of text (a corpus of half of every output), and of both."""
    async with started_verifier(pair, dtype) as verifier:
        plain = [await generate(verifier, request) for request in requests()]
        corpus = [output.token_ids[OUTPUT_TOKENS // 2 :] for output in plain]
        write_datastore(tmp_path, corpus, tokenizer_fingerprint(pair.tokenizer))
        with_model = started(drafter_with_model(pair.draft, tmp_path))
        with_text = started(text_drafter(pair.tokenizer, tmp_path))
        async with with_model as model_drafter, with_text as text_alone:
            for drafter, sources in (
                (model_drafter, DraftSources.MODEL),
                (model_drafter, DraftSources.MODEL | TEXT_SOURCES),
                (text_alone, TEXT_SOURCES),
            ):
                drafted = await speculate(verifier, drafter, sources)
                assert [output.said for output in drafted] == [output.said for output in plain], sources
                for greedy in (True, False):
                    kind = [o for o, r in zip(drafted, requests(), strict=True) if r.sampling.is_greedy == greedy]
                    assert sum(output.num_accepted for output in kind) > 15, (sources, greedy)
