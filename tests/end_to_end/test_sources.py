"""Any source gives the same output; and no request is drafted from another."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from drafter_service.config import DrafterSettings
from drafter_service.engine import DrafterEngine
from drafter_service.text_engine import TextDrafterEngine
from easyspec.datastore.corpus import SEPARATOR
from easyspec.datastore.ngram_table import build_ngram_table
from easyspec.datastore.suffix_index import build_suffix_index
from easyspec.errors import ConfigurationError, InvalidRequestError
from easyspec.speculation.messages import Calibration, OpenSpeculation, OpenVerification
from easyspec.speculation.parameters import SamplingParameters, StopConditions, TreeBudget
from easyspec.speculation.sources import ALL_SOURCES, TEXT_SOURCES, DraftSources
from easyspec.tokenizer_fingerprint import tokenizer_fingerprint
from tests.end_to_end.test_losslessness import random_case
from tests.engine_driver import Output, drafting, generate
from tests.fakes.checkpoints import change_config
from verifier_service.engine import VerifierEngine

SUBSETS = tuple(DraftSources(bits) for bits in range(1, int(ALL_SOURCES) + 1))
EngineT = TypeVar("EngineT", DrafterEngine, TextDrafterEngine)
GREEDY = SamplingParameters(seed=0, temperature=0.0)


def write_datastore(folder: Path, corpus: Sequence[Sequence[int]], fingerprint: str) -> None:
    """An index and an n-gram table of the corpus."""
    tokens = np.array([token for document in corpus for token in (*document, SEPARATOR)], dtype=np.uint32)
    build_suffix_index(tokens, folder / "index", fingerprint)
    build_ngram_table(tokens, folder / "ngrams", fingerprint)


@asynccontextmanager
async def started(engine: EngineT) -> AsyncIterator[EngineT]:
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def drafter_with_model(draft: Path, datastore: Path) -> DrafterEngine:
    return DrafterEngine(
        DrafterSettings(
            model=str(draft),
            num_threads=1,
            num_kv_slots=16_384,
            draft_ahead=0,  # what is guessed while a tree is verified depends on how long that takes
            ask="always",  # who takes part else, and how deep, follows from measured times
            layer_parallel_size=4,  # where none is named the plan is timed, and need not be the same twice
            index=datastore / "index",
            ngram_prior=datastore / "ngrams",
        )
    )


def text_drafter(tokenizer: Path, datastore: Path | None = None) -> TextDrafterEngine:
    settings = DrafterSettings(sources="retrieval,ngram", tokenizer=tokenizer)
    if datastore is not None:
        settings = settings.model_copy(update={"index": datastore / "index", "ngram_prior": datastore / "ngrams"})
    return TextDrafterEngine(settings)


@pytest.fixture(scope="module")
def exits_folder(draft_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The draft with exits, which are not trained: they guess, badly."""
    folder = Path(shutil.copytree(draft_folder, tmp_path_factory.mktemp("exits"), dirs_exist_ok=True))
    change_config(folder, exit_layers=[3, 5])
    return folder


async def test_every_set_of_sources_says_what_plain_decoding_says(
    verifier: VerifierEngine, exits_folder: Path, tmp_path: Path
) -> None:
    """All sets run at the same time through one drafter, whose corpus has every other output, cut in two."""
    draft_folder = exits_folder
    cases = [(random_case(1000 + index), SUBSETS[index % len(SUBSETS)]) for index in range(4 * len(SUBSETS))]
    plain = await asyncio.gather(*(generate(verifier, case.request) for case, _ in cases))
    texts = [
        case.request.prompt_token_ids[-4:] + output.token_ids for (case, _), output in zip(cases, plain, strict=True)
    ]
    corpus = [piece for text in texts[::2] for piece in (text[: len(text) // 2], text[len(text) // 2 - 3 :])]
    write_datastore(tmp_path, corpus, tokenizer_fingerprint(draft_folder))
    async with started(drafter_with_model(draft_folder, tmp_path)) as drafter:

        async def speculate(index: int) -> Output:
            case, sources = cases[index]
            async with drafting(drafter, case.request, case.plan, sources) as drafts:
                return await generate(verifier, case.request, drafts, case.budget)

        drafted = await asyncio.gather(*(speculate(index) for index in range(len(cases))))
    accepted = dict.fromkeys(DraftSources, 0)
    for (case, sources), expected, output in zip(cases, plain, drafted, strict=True):
        assert output.said == expected.said, (case, sources)
        for round_ in output.rounds:
            node_sources = round_.draft.node_sources
            assert len(node_sources) == len(round_.draft.tree)
            assert all(node and node in sources for node in node_sources)
            for row in round_.answer.verdict.accepted_rows:
                for source in node_sources[row - 1]:
                    accepted[source] += 1
    assert all(count > 5 for count in accepted.values()), accepted


async def test_a_drafter_without_a_model_guesses_what_its_corpus_has(
    verifier: VerifierEngine, draft_folder: Path, tmp_path: Path
) -> None:
    """Deeper than the levels of the budget, which are the model's."""
    request = OpenVerification((5, 9, 11), GREEDY, StopConditions(60, ignore_eos=True))
    plain = await generate(verifier, request)
    write_datastore(tmp_path, [request.prompt_token_ids + plain.token_ids], tokenizer_fingerprint(draft_folder))
    async with (
        started(text_drafter(draft_folder, tmp_path)) as drafter,
        drafting(drafter, request, sources=None) as drafts,
    ):
        assert drafter.model_info.num_parameters == drafter.model_info.num_layers == 0
        output = await generate(verifier, request, drafts, TreeBudget(num_levels=1, width=1, num_nodes=8))
    assert output.said == plain.said
    assert len(output.rounds) < 20


async def test_what_is_not_there_is_refused(draft_folder: Path) -> None:
    async with started(text_drafter(draft_folder)) as drafter:
        with pytest.raises(InvalidRequestError, match="sources is 'model'; allowed: some of retrieval, ngram"):
            await drafter.open(OpenSpeculation((1,), GREEDY, sources=DraftSources.MODEL))


@pytest.mark.parametrize("sources", ["early_exit", "model,early_exit"])
async def test_exits_that_a_checkpoint_lacks_keep_the_drafter_from_starting(draft_folder: Path, sources: str) -> None:
    engine = DrafterEngine(DrafterSettings(model=str(draft_folder), num_threads=1, num_kv_slots=1024, sources=sources))
    with pytest.raises(ConfigurationError, match=f"sources is '{sources}', but the draft model .* has no exit_layers"):
        await engine.start()
    await engine.stop()


async def test_exits_may_be_asked_for_where_they_are_and_are_refused_with_a_reason_where_not(
    draft_folder: Path, exits_folder: Path, tmp_path: Path
) -> None:
    write_datastore(tmp_path, [[1, 2, 3] * 9], tokenizer_fingerprint(draft_folder))
    request = OpenSpeculation((1, 2), GREEDY, sources=DraftSources.EARLY_EXIT)
    async with started(drafter_with_model(exits_folder, tmp_path)) as drafter:
        assert DraftSources.EARLY_EXIT not in drafter.sources
        session_id = await drafter.open(request)
        draft = await drafter.draft(session_id, Calibration(2, (3,), TreeBudget(3, 3, 12)))
        assert set(draft.node_sources) == {DraftSources.EARLY_EXIT}
        assert len(draft.node_sources) == len(draft.tree) == 12
    async with started(drafter_with_model(draft_folder, tmp_path)) as drafter:
        with pytest.raises(InvalidRequestError, match=r"'early_exit'.*model, retrieval, ngram .*has no exit_layers"):
            await drafter.open(request)


async def guesses(engine: DrafterEngine | TextDrafterEngine, prompt: Sequence[int], last: int) -> set[int]:
    """Every token in the tree that follows a prompt and one token more."""
    session_id = await engine.open(OpenSpeculation(tuple(prompt), GREEDY, sources=TEXT_SOURCES))
    draft = await engine.draft(session_id, Calibration(len(prompt), (last,), TreeBudget(4, 4, 60)))
    engine.close(session_id)
    return set(draft.tree.token_ids)


async def test_no_request_is_drafted_from_another(draft_folder: Path) -> None:
    """Two requests begin alike; what the first says next must not turn up in the second, in mid-stream or after."""
    async with started(text_drafter(draft_folder)) as engine:
        secret = [40, 41, 42, 43, 44]
        first = await engine.open(OpenSpeculation((1, 2, 3, *secret) * 4, GREEDY))
        await engine.draft(first, Calibration(32, (1, 2, 3, *secret), TreeBudget(4, 4, 60)))
        assert await guesses(engine, [1, 2, 3, *secret, 1, 2], 3) >= {40}  # such a tree would have it
        assert not await guesses(engine, [1, 2, 3, 9, 1, 2], 3) & set(secret)
        engine.close(first)
        assert not await guesses(engine, [1, 2, 3, 9, 1, 2], 3) & set(secret)


async def test_the_same_requests_get_the_same_trees(
    verifier: VerifierEngine, draft_folder: Path, tmp_path: Path
) -> None:
    """Two drafters that saw the same requests in the same order draft alike: nothing depends on time or hashing.

    (Gates of early exits weigh measured time, so those are left out; theirs is a matter of a test with a clock.)
    """
    write_datastore(tmp_path, [[*range(50)] * 3], tokenizer_fingerprint(draft_folder))

    async def trees() -> list[object]:
        seen: list[object] = []
        async with started(drafter_with_model(draft_folder, tmp_path)) as drafter:
            for seed in (4, 18):  # without a grammar, which is compiled on the side and ready some time later
                case = random_case(seed)
                async with drafting(drafter, case.request, sources=ALL_SOURCES & ~DraftSources.EARLY_EXIT) as drafts:
                    seen += (await generate(verifier, case.request, drafts, TreeBudget(3, 3, 12))).trees
        return seen

    assert await trees() == await trees()


@pytest.mark.parametrize("option", ["index", "ngram_prior"])
async def test_a_damaged_file_keeps_the_drafter_from_starting(draft_folder: Path, tmp_path: Path, option: str) -> None:
    write_datastore(tmp_path, [[1, 2, 3] * 9], tokenizer_fingerprint(draft_folder))
    path = tmp_path / ("index" if option == "index" else "ngrams")
    content = bytearray(path.read_bytes())
    content[70] ^= 1
    path.write_bytes(content)
    engine = text_drafter(draft_folder, tmp_path)
    with pytest.raises(ConfigurationError, match="is damaged"):
        await engine.start()
    await engine.stop()
