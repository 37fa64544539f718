"""A verdict is one look at the device, whatever the sampling parameters; log-probabilities are a second one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from easyspec.model.loading import load_model
from easyspec.speculation.messages import OpenVerification
from easyspec.speculation.parameters import SamplingParameters, StopConditions
from easyspec.speculation.token_tree import EMPTY_TREE, TokenTree
from tests.fakes.device_looks import counted_looks, pretend_remote
from verifier_service.config import VerifierSettings
from verifier_service.scheduler import SchedulerLimits
from verifier_service.verifier import OpenTask, Verifier, VerifierLimits, VerifyTask

PROMPT = (5, 8, 13, 21, 34, 55)
TREE = TokenTree((3, 4, 5, 6), (0, 0, 1, 1))
GREEDY = SamplingParameters(seed=0, temperature=0.0)
EVERYTHING = SamplingParameters(
    seed=5,
    temperature=0.8,
    top_k=40,
    top_p=0.9,
    min_p=0.01,
    repetition_penalty=1.2,
    frequency_penalty=0.3,
    presence_penalty=0.1,
    logit_bias={3: 1.5},
)


@pytest.fixture
def verifier(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Verifier:
    pretend_remote(monkeypatch)
    settings = VerifierSettings(model=str(base_folder), num_threads=1, num_kv_slots=1024)
    loaded = load_model(settings)
    limits = VerifierLimits(settings.served_model_name, loaded.info.max_model_len, 64)
    return Verifier(loaded.decoder, loaded.memory, limits, SchedulerLimits(512, 256, 64, 8, 1.0, 1.7))


def _open(verifier: Verifier, sampling: SamplingParameters, **options: Any) -> int:
    request = OpenVerification(PROMPT, sampling, StopConditions(None, ignore_eos=True), **options)
    task = OpenTask(request)
    verifier.accept(task)
    return task.future.result(0)


def _verify(verifier: Verifier, sessions: Sequence[tuple[int, int, TokenTree]]) -> list[int]:
    """Judge a tree for each session (id, length, tree); their lengths after it."""
    tasks = [VerifyTask(*session) for session in sessions]
    for task in tasks:
        verifier.accept(task)
    while not all(task.future.done() for task in tasks):
        verifier.step()
    return [
        length + len(task.future.result(0)[0].token_ids) for (_, length, _), task in zip(sessions, tasks, strict=True)
    ]


@pytest.mark.parametrize("samplings", [(GREEDY,), (EVERYTHING,), (GREEDY, EVERYTHING, GREEDY)])
@pytest.mark.parametrize("tree", [EMPTY_TREE, TREE])
def test_one_look_a_verdict(verifier: Verifier, samplings: Sequence[SamplingParameters], tree: TokenTree) -> None:
    sessions = [_open(verifier, sampling) for sampling in samplings]
    lengths = _verify(verifier, [(session_id, len(PROMPT), EMPTY_TREE) for session_id in sessions])
    with counted_looks() as looks:
        _verify(verifier, [(*session, tree) for session in zip(sessions, lengths, strict=True)])
    assert looks == {"tolist": 1}


def test_log_probabilities_of_all_sessions_are_a_second_look(verifier: Verifier) -> None:
    sessions = [_open(verifier, GREEDY, num_top_logprobs=num_top) for num_top in (0, 3, None, 20)]
    lengths = _verify(verifier, [(session_id, len(PROMPT), EMPTY_TREE) for session_id in sessions])
    with counted_looks() as looks:
        _verify(verifier, [(*session, TREE) for session in zip(sessions, lengths, strict=True)])
    assert looks == {"tolist": 2}
