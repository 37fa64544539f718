"""Requests' own texts share a budget."""

from __future__ import annotations

import tracemalloc

import numpy as np

from drafter_service.text.guessers import TOKEN_BYTES, TextDrafting, TextMemory, TextResources
from easyspec.speculation.parameters import SamplingParameters
from easyspec.speculation.sources import DraftSources

SOURCES = DraftSources.RETRIEVAL | DraftSources.NGRAM


def test_many_requests_stay_within_the_budget_and_take_it_up_again() -> None:
    num_tokens = 8_000
    resources = TextResources(memory=TextMemory(num_tokens * TOKEN_BYTES))
    texts = np.random.default_rng(0).integers(0, 50_000, (8, num_tokens)).tolist()
    tracemalloc.start()
    try:
        committed: list[list[int]] = [[] for _ in texts]
        requests = [TextDrafting(resources, SOURCES, SamplingParameters(seed=1), each) for each in committed]
        assert resources.memory.most_tokens == 1_000
        for start in range(0, num_tokens, 500):
            for request, token_ids, text in zip(requests, committed, texts, strict=True):
                token_ids += text[start : start + 500]
                request.read()
        assert tracemalloc.get_traced_memory()[0] < num_tokens * TOKEN_BYTES
    finally:
        tracemalloc.stop()
    del request, requests[1:]
    assert resources.memory.most_tokens == num_tokens


def test_a_request_keeps_some_text_however_many_there_are() -> None:
    memory = TextMemory(1 << 20)
    resources = TextResources(memory=memory)
    requests = [TextDrafting(resources, SOURCES, SamplingParameters(seed=1), ()) for _ in range(1000)]
    assert memory.most_tokens == 512
    assert len(requests) == 1000
