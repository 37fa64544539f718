"""Plain data -> bytes on the wire -> plain data is the identity; unset fields mean what the protos say."""

from __future__ import annotations

import struct
from typing import TypeVar

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from easyspec.errors import InvalidRequestError
from easyspec.rpc import convert
from easyspec.speculation.messages import (
    Calibration,
    Draft,
    DraftTimings,
    KvUsage,
    ModelInfo,
    OpenSpeculation,
    OpenVerification,
    TokenLogprobs,
    Verdict,
    VerifyTimings,
)
from easyspec.speculation.parameters import (
    MAX_PLAIN_ROUNDS,
    FinishReason,
    Grammar,
    GrammarKind,
    LayerPlanRequest,
    MlpPlacement,
    SamplingParameters,
    StopConditions,
    TreeBudget,
)
from easyspec.speculation.sources import ALL_SOURCES, DraftSources
from easyspec.speculation.token_tree import EMPTY_TREE, TokenTree
from easyspec.v1 import drafter_pb2, types_pb2, verifier_pb2

MessageT = TypeVar("MessageT", bound=Message)

uint32s = st.integers(0, 2**32 - 1)
uint64s = st.integers(0, 2**64 - 1)
token_ids = st.lists(uint32s, max_size=8).map(tuple)
float32s = st.floats(width=32, allow_nan=False)
names = st.text(max_size=8)

samplings = st.builds(
    SamplingParameters,
    seed=uint64s,
    temperature=float32s,
    top_k=st.none() | uint32s,
    top_p=float32s,
    min_p=float32s,
    repetition_penalty=float32s,
    presence_penalty=float32s,
    frequency_penalty=float32s,
    logit_bias=st.dictionaries(uint32s, float32s, max_size=4),
    grammar=st.none() | st.builds(Grammar, kind=st.sampled_from(GrammarKind), text=names),
)
logprobs = st.lists(
    st.builds(TokenLogprobs, logprob=float32s, top=st.lists(st.tuples(uint32s, float32s), max_size=3).map(tuple)),
    max_size=3,
).map(tuple)
stops = st.builds(
    StopConditions,
    max_tokens=st.none() | uint32s,
    stop_token_ids=st.frozensets(uint32s, max_size=4),
    ignore_eos=st.booleans(),
)
budgets = st.builds(TreeBudget, num_levels=uint32s, width=uint32s, num_nodes=uint32s)
plans = st.builds(
    LayerPlanRequest,
    layer_parallel_size=st.none() | uint32s,
    mlp=st.none() | st.sampled_from(MlpPlacement),
    calibration=st.booleans(),
)
trees = st.builds(TokenTree, token_ids=token_ids, parent_rows=token_ids)


def sent(message: MessageT) -> MessageT:
    """What the other side receives."""
    return type(message).FromString(message.SerializeToString())


@given(samplings)
def test_sampling(sampling: SamplingParameters) -> None:
    assert convert.sampling_from_pb(sent(convert.sampling_to_pb(sampling))) == sampling


@given(st.floats(0, 100))
def test_sampling_is_rounded_once(temperature: float) -> None:
    once = convert.sampling_from_pb(sent(convert.sampling_to_pb(SamplingParameters(1, temperature=temperature))))
    twice = convert.sampling_from_pb(sent(convert.sampling_to_pb(once)))
    assert once.temperature == struct.unpack("f", struct.pack("f", temperature))[0]
    assert twice == once


@given(samplings, token_ids, token_ids, stops, names, names, st.none() | uint32s, st.booleans())
def test_open_verification(
    sampling: SamplingParameters,
    prompt: tuple[int, ...],
    output: tuple[int, ...],
    stop: StopConditions,
    model: str,
    request_id: str,
    num_top_logprobs: int | None,
    prompt_logprobs: bool,
) -> None:
    request = OpenVerification(prompt, sampling, stop, output, model, request_id, num_top_logprobs, prompt_logprobs)
    assert convert.open_verification_from_pb(sent(convert.open_verification_to_pb(request))) == request


@given(
    st.builds(
        OpenSpeculation,
        token_ids,
        samplings,
        plans,
        st.none() | uint32s,
        names,
        names,
        num_output_tokens=uint32s,
        draft_ahead=st.booleans(),
    )
)
def test_open_speculation(request: OpenSpeculation) -> None:
    assert convert.open_speculation_from_pb(sent(convert.open_speculation_to_pb(request))) == request


@given(uint32s, trees, st.integers(0, MAX_PLAIN_ROUNDS))
def test_verify_tree(base_length: int, tree: TokenTree, num_plain_rounds: int) -> None:
    message = sent(convert.verify_tree_to_pb(base_length, tree, num_plain_rounds))
    assert convert.verify_tree_from_pb(message) == (base_length, tree, num_plain_rounds)


def test_plain_rounds_ahead_are_bounded() -> None:
    with pytest.raises(InvalidRequestError, match=r"num_plain_rounds.*at most 64"):
        convert.verify_tree_from_pb(convert.verify_tree_to_pb(1, EMPTY_TREE, MAX_PLAIN_ROUNDS + 1))


@given(
    st.builds(
        Verdict,
        uint32s,
        token_ids,
        token_ids,
        st.none() | st.sampled_from(FinishReason),
        st.none() | uint32s,
        logprobs,
        logprobs,
    )
)
def test_verdict(verdict: Verdict) -> None:
    message = sent(convert.verdict_to_pb(verdict))
    assert message.num_accepted == len(verdict.accepted_rows)
    assert convert.verdict_from_pb(message) == verdict


@given(st.builds(Calibration, uint32s, token_ids, budgets))
def test_calibration(calibration: Calibration) -> None:
    assert convert.calibration_from_pb(sent(convert.calibration_to_pb(calibration))) == calibration


draft_timings = st.builds(DraftTimings, uint64s, uint64s, uint64s, uint32s, st.none() | uint64s)


@given(st.builds(Draft, uint32s, trees, draft_timings))
def test_draft(draft: Draft) -> None:
    assert convert.draft_from_pb(sent(convert.draft_to_pb(draft))) == draft


@given(st.builds(VerifyTimings, uint64s, uint64s, uint32s, uint32s))
def test_verify_timings(timings: VerifyTimings) -> None:
    assert convert.verify_timings_from_pb(sent(convert.verify_timings_to_pb(timings))) == timings


@given(
    st.builds(ModelInfo, names, uint32s, uint32s, names, uint64s, names, token_ids, uint32s),
    st.builds(KvUsage, uint32s, uint32s, uint32s, uint32s, uint64s, uint64s, uint64s),
)
def test_information(info: ModelInfo, usage: KvUsage) -> None:
    assert convert.model_info_from_pb(sent(convert.model_info_to_pb(info))) == info
    assert convert.kv_usage_from_pb(sent(convert.kv_usage_to_pb(usage))) == usage


def test_unset_fields_take_the_documented_defaults() -> None:
    assert convert.sampling_from_pb(types_pb2.SamplingParameters(seed=0)) == SamplingParameters(
        seed=0,
        temperature=1.0,
        top_k=None,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        logit_bias={},
    )
    assert convert.stop_from_pb(types_pb2.StopConditions()) == StopConditions(None, frozenset(), ignore_eos=False)
    assert convert.layer_plan_from_pb(types_pb2.LayerPlan()) == LayerPlanRequest(None, None, calibration=True)


def test_zero_is_a_value_and_not_unset() -> None:
    message = types_pb2.SamplingParameters(seed=0, temperature=0.0, top_k=0, top_p=0.0, repetition_penalty=0.0)
    sampling = convert.sampling_from_pb(sent(message))
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.repetition_penalty) == (0.0, 0, 0.0, 0.0)
    assert convert.stop_from_pb(sent(types_pb2.StopConditions(max_tokens=0))).max_tokens == 0
    assert convert.layer_plan_from_pb(sent(types_pb2.LayerPlan(calibration=False))).calibration is False


def test_a_seed_is_required_unless_the_caller_draws_one() -> None:
    with pytest.raises(InvalidRequestError, match=r"sampling\.seed is None"):
        convert.sampling_from_pb(types_pb2.SamplingParameters())
    assert convert.sampling_from_pb(types_pb2.SamplingParameters(), default_seed=9).seed == 9
    assert convert.sampling_from_pb(types_pb2.SamplingParameters(seed=3), default_seed=9).seed == 3


def test_missing_parts_and_unknown_enum_values_are_named() -> None:
    with pytest.raises(InvalidRequestError, match=r"calibration\.budget is None"):
        convert.calibration_from_pb(drafter_pb2.Calibration(base_length=1, token_ids=[1]))
    with pytest.raises(InvalidRequestError, match=r"tree\.tree is None"):
        convert.verify_tree_from_pb(verifier_pb2.VerifyTree(base_length=1))
    unknown_mlp = types_pb2.LayerPlan.FromString(b"\x10\x07")
    with pytest.raises(InvalidRequestError, match=r"layer_plan\.mlp is 7"):
        convert.layer_plan_from_pb(unknown_mlp)
    with pytest.raises(InvalidRequestError, match=r"finish_reason is 9"):
        convert.verdict_from_pb(verifier_pb2.Verdict.FromString(b"\x20\x09"))


@pytest.mark.parametrize("bits", range(int(ALL_SOURCES) + 1))
def test_every_set_of_sources_survives_the_wire(bits: int) -> None:
    """No source at all is how the wire says that none is named."""
    values = convert.sources_to_pb(DraftSources(bits))
    assert len(values) == bits.bit_count()
    assert convert.sources_from_pb(values) == (DraftSources(bits) or None)


def test_an_unknown_source_is_named() -> None:
    with pytest.raises(InvalidRequestError, match=r"sources is 99; allowed: .*model, retrieval, ngram, early_exit"):
        convert.sources_from_pb([99])  # type: ignore[list-item]
