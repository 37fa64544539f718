"""Whatever is drafted, the tokens are those of plain decoding."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from easyspec.ops.executor import choose_executor
from easyspec.speculation.acceptance import StopLimits
from easyspec.speculation.messages import Verdict
from easyspec.speculation.parameters import FinishReason, SamplingParameters
from easyspec.speculation.sampling import TokenHistory
from easyspec.speculation.token_tree import EMPTY_TREE, TokenTree
from tests.speculation.reference import reference_choice
from tests.speculation.strategies import sampling_parameters
from verifier_service.verdicts import Case, decide

V = 9
EXECUTORS = [choose_executor(name, torch.device("cpu"), num_threads=1) for name in ("native", "reference")]
TreeSource = Callable[[list[int]], TokenTree]
Output = tuple[list[int], FinishReason | None]


def base_logits(token_ids: Sequence[int]) -> torch.Tensor:
    """A deterministic base model: anything goes, as long as it is a function of all tokens so far."""
    key = 1
    for token_id in token_ids:
        key = (key * 1_000_003 + token_id + 1) % (2**61 - 1)
    return torch.randn(V, generator=torch.Generator().manual_seed(key)) * 2


def decode_plainly(prompt: list[int], sampling: SamplingParameters, limits: StopLimits) -> Output:
    """One token after the other by the literal rule."""
    output: list[int] = []
    while True:
        logits = base_logits([*prompt, *output]).tolist()
        output.append(reference_choice(logits, sampling, len(prompt) + len(output), prompt, output))
        if output[-1] in limits.stop_token_ids:
            return output, FinishReason.STOP
        if len(prompt) + len(output) == limits.max_total_length:
            return output, FinishReason.LENGTH


def decode(
    prompt: list[int],
    sampling: SamplingParameters,
    limits: StopLimits,
    draft: TreeSource,
    emitted: Sequence[int] = (),
) -> Output:
    """Rounds of draft, verify, commit; `emitted` continues an earlier stream."""
    output = list(emitted)
    history = TokenHistory(prompt, output)
    while True:
        committed = [*prompt, *output]
        tree = draft(committed)
        case = Case(tree, len(committed), sampling, history, limits)
        logits = torch.stack([base_logits([*committed, *row.path_token_ids]) for row in case.choice_rows()])
        (verdict,), (other,) = (decide(executor, logits, [case]) for executor in EXECUTORS)
        assert isinstance(verdict, Verdict)
        assert verdict == other
        history.commit(verdict.token_ids)
        output += verdict.token_ids
        if verdict.finish_reason is not None:
            return output, verdict.finish_reason


def drafter(truth: list[int], skill: float, seed: int) -> TreeSource:
    """Random trees; each node carries the true token of its place with probability `skill`."""
    rng = random.Random(seed)

    def draft(committed: list[int]) -> TokenTree:
        token_ids: list[int] = []
        parent_rows: list[int] = []
        depths = [0]
        for _ in range(rng.randrange(10)):
            parent_row = max(rng.randrange(len(depths)), rng.randrange(len(depths)))
            place = len(committed) + depths[parent_row]
            right = place < len(truth) and rng.random() < skill
            token_id = truth[place] if right else rng.randrange(V)
            if (token_id, parent_row) not in zip(token_ids, parent_rows, strict=True):
                token_ids.append(token_id)
                parent_rows.append(parent_row)
                depths.append(depths[parent_row] + 1)
        return TokenTree(tuple(token_ids), tuple(parent_rows))

    return draft


@given(
    st.lists(st.integers(0, V - 1), min_size=1, max_size=6),
    sampling_parameters(V),
    st.frozensets(st.integers(0, V - 1), max_size=2),
    st.integers(1, 14),
    st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    st.integers(0, 2**32),
)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_any_tree_emits_what_plain_decoding_emits(
    prompt: list[int], sampling: SamplingParameters, stops: frozenset[int], room: int, skill: float, seed: int
) -> None:
    limits = StopLimits(stops, len(prompt) + room)
    expected = decode_plainly(prompt, sampling, limits)
    truth = prompt + expected[0]
    assert decode(prompt, sampling, limits, lambda _: EMPTY_TREE) == expected
    assert decode(prompt, sampling, limits, drafter(truth, skill, seed)) == expected


SETTINGS = [
    SamplingParameters(seed=7, temperature=0.0, repetition_penalty=1.2),
    SamplingParameters(seed=7, temperature=0.8, top_p=0.9),
    SamplingParameters(seed=2**64 - 1, frequency_penalty=0.7, min_p=0.05),
]


def chain(truth: list[int]) -> TreeSource:
    """All that is left of the truth and a token more, with a wrong sibling beside each."""

    def draft(committed: list[int]) -> TokenTree:
        token_ids: list[int] = []
        parent_rows: list[int] = []
        parent_row = 0
        for token_id in [*truth[len(committed) :], 0]:
            token_ids += [(token_id + 1) % V, token_id]
            parent_rows += [parent_row, parent_row]
            parent_row = len(token_ids)
        return TokenTree(tuple(token_ids), tuple(parent_rows))

    return draft


@pytest.mark.parametrize("sampling", SETTINGS)
def test_stops_and_limits_at_every_offset_of_an_accepted_block(sampling: SamplingParameters) -> None:
    prompt = [3, 1, 4]
    whole, _ = decode_plainly(prompt, sampling, StopLimits(frozenset(), 3 + 12))
    draft = chain(prompt + whole)
    for offset, token_id in enumerate(whole):
        cut = StopLimits(frozenset(), 3 + offset + 1)
        assert decode(prompt, sampling, cut, draft) == (whole[: offset + 1], FinishReason.LENGTH)
        first = whole.index(token_id)
        stop = StopLimits(frozenset({token_id}), 3 + 12)
        assert decode(prompt, sampling, stop, draft) == (whole[: first + 1], FinishReason.STOP)
        both = StopLimits(frozenset({token_id}), 3 + first + 1)
        assert decode(prompt, sampling, both, draft) == (whole[: first + 1], FinishReason.STOP)


@pytest.mark.parametrize("sampling", SETTINGS)
def test_a_stream_continues_anywhere_on_another_replica(sampling: SamplingParameters) -> None:
    limits = StopLimits(frozenset(), 3 + 10)
    whole = decode_plainly([3, 1, 4], sampling, limits)
    for length in range(10):
        draft = drafter([3, 1, 4, *whole[0]], 0.8, length)
        assert decode([3, 1, 4], sampling, limits, draft, emitted=whole[0][:length]) == whole


def test_good_trees_are_accepted() -> None:
    """Else the properties above would hold for a walk that accepts nothing."""
    num_rounds = 0
    sampling, limits = SETTINGS[1], StopLimits(frozenset(), 3 + 12)
    whole = decode_plainly([3, 1, 4], sampling, limits)
    right = chain([3, 1, 4, *whole[0]])

    def draft(committed: list[int]) -> TokenTree:
        nonlocal num_rounds
        num_rounds += 1
        return right(committed)

    assert decode([3, 1, 4], sampling, limits, draft) == whole
    assert num_rounds == 1
