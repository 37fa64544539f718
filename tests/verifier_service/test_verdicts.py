"""A model whose numbers are none says so, and only where its tokens would be said."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file

from easyspec.errors import BrokenModelError, EasyspecError
from easyspec.ops.executor import choose_executor
from easyspec.speculation.acceptance import StopLimits
from easyspec.speculation.messages import OpenVerification, Verdict
from easyspec.speculation.parameters import Grammar, GrammarKind, SamplingParameters, StopConditions
from easyspec.speculation.sampling import TokenHistory
from easyspec.speculation.token_tree import EMPTY_TREE, TokenTree
from tests.conftest import started
from tests.fakes.checkpoints import change_tensor, write_checkpoint
from verifier_service.config import VerifierSettings
from verifier_service.engine import VerifierEngine
from verifier_service.verdicts import Case, decide

GREEDY = SamplingParameters(seed=0, temperature=0.0)
# Two draft tokens at the root; the first is right.
TREE = TokenTree((3, 4), (0, 0))


def decided(broken_row: int, value: float) -> Verdict | EasyspecError:
    """The verdict on TREE where the model says 3, then 5, and one row's logits are not numbers."""
    logits = torch.zeros(3, 8)
    logits[0, 3] = logits[1, 5] = logits[2, 6] = 1.0
    logits[broken_row, 7] = value
    case = Case(TREE, 4, GREEDY, TokenHistory([1, 2]), StopLimits(frozenset(), 100))
    executor = choose_executor("reference", torch.device("cpu"), num_threads=1)
    (outcome,) = decide(executor, logits, [case])
    return outcome


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_only_rows_that_are_visited_count(value: float) -> None:
    assert isinstance(decided(0, value), BrokenModelError)
    assert isinstance(decided(1, value), BrokenModelError)
    unvisited = decided(2, value)
    assert isinstance(unvisited, Verdict)
    assert unvisited.token_ids == (3, 5)


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VerifierEngine]:
    """Its weights are numbers, and its logits are not."""
    folder = write_checkpoint(tmp_path_factory.mktemp("huge"), has_tokenizer=True, num_hidden_layers=1, eos_token_id=0)
    norm = load_file(folder / "model.safetensors")["model.norm.weight"]
    change_tensor(folder, "model.norm.weight", torch.full_like(norm, 3e38))
    engine = VerifierEngine(VerifierSettings(model=str(folder), num_threads=1, num_kv_slots=500))
    with started(engine):
        yield engine


@pytest.mark.parametrize("grammar", [None, Grammar(GrammarKind.REGEX, "[a-z]+")])
async def test_a_model_that_overflows_ends_the_request_with_an_error(
    overflowing: VerifierEngine, grammar: Grammar | None
) -> None:
    sampling = SamplingParameters(seed=0, temperature=0.0, grammar=grammar)
    session_id = await overflowing.open(OpenVerification((5, 8), sampling, StopConditions(4), num_top_logprobs=1))
    with pytest.raises(BrokenModelError, match="values that are not numbers"):
        await overflowing.verify(session_id, 2, EMPTY_TREE)
    overflowing.close(session_id)
