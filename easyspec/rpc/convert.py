"""Protobuf messages <-> the plain data of `easyspec.speculation`.

`..._from_pb` checks what the wire form alone can tell (a missing seed, tree or budget, an unknown enum value) and
raises InvalidRequestError; ranges are checked where the model is known, with the `check` methods of the plain data.
Where both sides have fields of the same names, these are passed on as they are; a name that only one side has raises.
Sampling parameters are float32 on the wire: a Python float is rounded once, by `sampling_to_pb`, and every later hop
reproduces the rounded value exactly.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from easyspec.errors import InvalidRequestError
from easyspec.speculation import messages, parameters
from easyspec.speculation.sources import ALL_SOURCES, NO_SOURCES, SINGLE_SOURCES, DraftSources
from easyspec.speculation.token_tree import TokenTree
from easyspec.v1 import drafter_pb2, types_pb2, verifier_pb2

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_PlainT = TypeVar("_PlainT", bound="DataclassInstance")
_FINISH_REASON_TO_PB: Mapping[parameters.FinishReason, types_pb2.FinishReason.ValueType] = MappingProxyType(
    {reason: types_pb2.FinishReason.Value(f"FINISH_REASON_{reason.name}") for reason in parameters.FinishReason}
)
_FINISH_REASON_FROM_PB = MappingProxyType({value: key for key, value in _FINISH_REASON_TO_PB.items()})
_MLP_TO_PB: Mapping[parameters.MlpPlacement, types_pb2.LayerPlan.MlpPlacement.ValueType] = MappingProxyType(
    {mlp: types_pb2.LayerPlan.MlpPlacement.Value(f"MLP_PLACEMENT_{mlp.name}") for mlp in parameters.MlpPlacement}
)
_MLP_FROM_PB = MappingProxyType({value: key for key, value in _MLP_TO_PB.items()})
_SOURCE_TO_PB: Mapping[DraftSources, types_pb2.DraftSource.ValueType] = MappingProxyType(
    {source: types_pb2.DraftSource.Value(f"DRAFT_SOURCE_{source.name}") for source in SINGLE_SOURCES}
)
_SOURCE_FROM_PB = MappingProxyType({value: key for key, value in _SOURCE_TO_PB.items()})


@functools.cache
def _kinds_of_fields(plain: type[DataclassInstance], message: Descriptor) -> Sequence[tuple[str, bool, bool]]:
    """Of each field of the dataclass its name, and whether the message's is repeated, and can be unset."""
    of_message = [(field.name, message.fields_by_name[field.name]) for field in dataclasses.fields(plain)]
    return [(name, field.is_repeated, field.has_presence) for name, field in of_message]


def _from_pb(plain: type[_PlainT], message: Message, **converted: Any) -> _PlainT:
    """The dataclass with the message's values of its fields, apart from the `converted` ones.

    What is repeated becomes a tuple, what can be unset and is keeps the dataclass's default.
    """
    for name, is_repeated, has_presence in _kinds_of_fields(plain, message.DESCRIPTOR):
        if name not in converted and (not has_presence or message.HasField(name)):
            value = getattr(message, name)
            converted[name] = tuple(value) if is_repeated else value
    return plain(**converted)


def sampling_from_pb(
    message: types_pb2.SamplingParameters,
    default_seed: int | None = None,
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> parameters.SamplingParameters:
    """Unset fields take `defaults`, else those documented in `types.proto`.

    `default_seed` stands in for an unset seed; without one (at the services behind the gateway) an unset seed is an
    InvalidRequestError.
    """
    seed = message.seed if message.HasField("seed") else default_seed
    if seed is None:
        raise InvalidRequestError("sampling.seed", None, f"0 to {parameters.MAX_SEED}, and it must be set")
    others = ("seed", "logit_bias", "grammar")
    present = {field.name: value for field, value in message.ListFields() if field.name not in others}
    grammar = grammar_from_pb(message.grammar) if message.HasField("grammar") else None
    return parameters.SamplingParameters(
        seed=seed, logit_bias=dict(sorted(message.logit_bias.items())), grammar=grammar, **{**defaults, **present}
    )


def sampling_to_pb(sampling: parameters.SamplingParameters) -> types_pb2.SamplingParameters:
    grammar = None if sampling.grammar is None else grammar_to_pb(sampling.grammar)
    return types_pb2.SamplingParameters(**vars(sampling) | {"grammar": grammar})


def grammar_from_pb(message: types_pb2.Grammar) -> parameters.Grammar:
    """A grammar of no kind is an InvalidRequestError."""
    kind = message.WhichOneof("kind")
    if kind is None:
        allowed = ", ".join(kind.value for kind in parameters.GrammarKind)
        raise InvalidRequestError("sampling.grammar", None, f"exactly one of {allowed}")
    thinking = _from_pb(parameters.Thinking, message.thinking) if message.HasField("thinking") else None
    return parameters.Grammar(parameters.GrammarKind(kind), getattr(message, kind), thinking)


def grammar_to_pb(grammar: parameters.Grammar) -> types_pb2.Grammar:
    thinking = types_pb2.Thinking(**vars(grammar.thinking)) if grammar.thinking is not None else None
    return types_pb2.Grammar(**{grammar.kind.value: grammar.text}, thinking=thinking)


def stop_from_pb(message: types_pb2.StopConditions) -> parameters.StopConditions:
    return _from_pb(parameters.StopConditions, message, stop_token_ids=frozenset(message.stop_token_ids))


def stop_to_pb(stop: parameters.StopConditions) -> types_pb2.StopConditions:
    return types_pb2.StopConditions(**vars(stop) | {"stop_token_ids": sorted(stop.stop_token_ids)})


def finish_reason_from_pb(value: types_pb2.FinishReason.ValueType) -> parameters.FinishReason | None:
    """None while decoding goes on."""
    if value == types_pb2.FINISH_REASON_UNSPECIFIED:
        return None
    if value not in _FINISH_REASON_FROM_PB:
        raise InvalidRequestError("finish_reason", value, "a FinishReason")
    return _FINISH_REASON_FROM_PB[value]


def finish_reason_to_pb(reason: parameters.FinishReason | None) -> types_pb2.FinishReason.ValueType:
    return types_pb2.FINISH_REASON_UNSPECIFIED if reason is None else _FINISH_REASON_TO_PB[reason]


def budget_from_pb(message: types_pb2.TreeBudget) -> parameters.TreeBudget:
    return _from_pb(parameters.TreeBudget, message)


def budget_to_pb(budget: parameters.TreeBudget) -> types_pb2.TreeBudget:
    return types_pb2.TreeBudget(**vars(budget))


def layer_plan_from_pb(message: types_pb2.LayerPlan) -> parameters.LayerPlanRequest:
    mlp: parameters.MlpPlacement | None = None
    if message.mlp != types_pb2.LayerPlan.MLP_PLACEMENT_UNSPECIFIED:
        if message.mlp not in _MLP_FROM_PB:
            raise InvalidRequestError("layer_plan.mlp", message.mlp, "an MlpPlacement: sequential, staged or unset")
        mlp = _MLP_FROM_PB[message.mlp]
    return _from_pb(parameters.LayerPlanRequest, message, mlp=mlp)


def layer_plan_to_pb(plan: parameters.LayerPlanRequest) -> types_pb2.LayerPlan:
    return types_pb2.LayerPlan(**vars(plan) | {"mlp": None if plan.mlp is None else _MLP_TO_PB[plan.mlp]})


def sources_from_pb(values: Iterable[types_pb2.DraftSource.ValueType], field: str = "sources") -> DraftSources | None:
    """The set of sources; None if none is named, which means the default."""
    sources = NO_SOURCES
    for value in values:
        if value not in _SOURCE_FROM_PB:
            raise InvalidRequestError(field, value, f"DraftSources: {', '.join(ALL_SOURCES.names)}")
        sources |= _SOURCE_FROM_PB[value]
    return sources or None


def sources_to_pb(sources: DraftSources | None) -> list[types_pb2.DraftSource.ValueType]:
    return [_SOURCE_TO_PB[source] for source in SINGLE_SOURCES if sources is not None and source in sources]


def tree_from_pb(message: types_pb2.TokenTree) -> TokenTree:
    """The tree as sent; whether it is one is for `TokenTree.check` to say."""
    return _from_pb(TokenTree, message)


def tree_to_pb(tree: TokenTree) -> types_pb2.TokenTree:
    return types_pb2.TokenTree(token_ids=tree.token_ids, parent_rows=tree.parent_rows)


def open_verification_from_pb(message: verifier_pb2.OpenVerification) -> messages.OpenVerification:
    sampling, stop = sampling_from_pb(message.sampling), stop_from_pb(message.stop)
    return _from_pb(messages.OpenVerification, message, sampling=sampling, stop=stop)


def open_verification_to_pb(request: messages.OpenVerification) -> verifier_pb2.OpenVerification:
    own = {"sampling": sampling_to_pb(request.sampling), "stop": stop_to_pb(request.stop)}
    return verifier_pb2.OpenVerification(**vars(request) | own)


def verify_tree_from_pb(message: verifier_pb2.VerifyTree) -> tuple[int, TokenTree, int]:
    """(base length, tree, plain rounds behind it); raises InvalidRequestError for an unset tree, which is not empty."""
    if not message.HasField("tree"):
        raise InvalidRequestError("tree.tree", None, "a tree, which may be empty but must be set")
    if message.num_plain_rounds > parameters.MAX_PLAIN_ROUNDS:
        allowed = f"at most {parameters.MAX_PLAIN_ROUNDS}"
        raise InvalidRequestError("tree.num_plain_rounds", message.num_plain_rounds, allowed)
    return message.base_length, tree_from_pb(message.tree), message.num_plain_rounds


def verify_tree_to_pb(base_length: int, tree: TokenTree, num_plain_rounds: int = 0) -> verifier_pb2.VerifyTree:
    return verifier_pb2.VerifyTree(base_length=base_length, tree=tree_to_pb(tree), num_plain_rounds=num_plain_rounds)


def verdict_from_pb(message: verifier_pb2.Verdict) -> messages.Verdict:
    return _from_pb(
        messages.Verdict,
        message,
        finish_reason=finish_reason_from_pb(message.finish_reason),
        logprobs=tuple(map(logprobs_from_pb, message.logprobs)),
        prompt_logprobs=tuple(map(logprobs_from_pb, message.prompt_logprobs)),
    )


def verdict_to_pb(verdict: messages.Verdict) -> verifier_pb2.Verdict:
    own = {
        "num_accepted": verdict.num_accepted,
        "finish_reason": finish_reason_to_pb(verdict.finish_reason),
        "logprobs": map(logprobs_to_pb, verdict.logprobs),
        "prompt_logprobs": map(logprobs_to_pb, verdict.prompt_logprobs),
    }
    return verifier_pb2.Verdict(**vars(verdict) | own)


def logprobs_from_pb(message: types_pb2.TokenLogprobs) -> messages.TokenLogprobs:
    return messages.TokenLogprobs(message.logprob, tuple(zip(message.top_token_ids, message.top_logprobs, strict=True)))


def logprobs_to_pb(logprobs: messages.TokenLogprobs) -> types_pb2.TokenLogprobs:
    return types_pb2.TokenLogprobs(
        logprob=logprobs.logprob,
        top_token_ids=[token_id for token_id, _ in logprobs.top],
        top_logprobs=[logprob for _, logprob in logprobs.top],
    )


def verify_timings_from_pb(message: verifier_pb2.VerifyTimings) -> messages.VerifyTimings:
    return _from_pb(messages.VerifyTimings, message)


def verify_timings_to_pb(timings: messages.VerifyTimings) -> verifier_pb2.VerifyTimings:
    return verifier_pb2.VerifyTimings(**vars(timings))


def open_speculation_from_pb(message: drafter_pb2.OpenSpeculation) -> messages.OpenSpeculation:
    return _from_pb(
        messages.OpenSpeculation,
        message,
        sampling=sampling_from_pb(message.sampling),
        layer_plan=layer_plan_from_pb(message.layer_plan),
        sources=sources_from_pb(message.sources),
    )


def open_speculation_to_pb(request: messages.OpenSpeculation) -> drafter_pb2.OpenSpeculation:
    own = {
        "sampling": sampling_to_pb(request.sampling),
        "layer_plan": layer_plan_to_pb(request.layer_plan),
        "sources": sources_to_pb(request.sources),
    }
    return drafter_pb2.OpenSpeculation(**vars(request) | own)


def calibration_from_pb(message: drafter_pb2.Calibration) -> messages.Calibration:
    """An unset budget is an InvalidRequestError."""
    if not message.HasField("budget"):
        raise InvalidRequestError("calibration.budget", None, "a tree budget, and it must be set")
    return _from_pb(messages.Calibration, message, budget=budget_from_pb(message.budget))


def calibration_to_pb(calibration: messages.Calibration) -> drafter_pb2.Calibration:
    return drafter_pb2.Calibration(**vars(calibration) | {"budget": budget_to_pb(calibration.budget)})


def draft_from_pb(message: drafter_pb2.SpeculateResponse) -> messages.Draft:
    timings = _from_pb(messages.DraftTimings, message.timings)
    node_sources = tuple(DraftSources(bits) for bits in message.node_sources)
    return messages.Draft(message.base_length, tree_from_pb(message.tree), timings, node_sources)


def draft_to_pb(draft: messages.Draft) -> drafter_pb2.SpeculateResponse:
    own = {"tree": tree_to_pb(draft.tree), "timings": drafter_pb2.DraftTimings(**vars(draft.timings))}
    return drafter_pb2.SpeculateResponse(**vars(draft) | own)


def model_info_from_pb(message: types_pb2.ModelInfo) -> messages.ModelInfo:
    return _from_pb(messages.ModelInfo, message)


def model_info_to_pb(info: messages.ModelInfo) -> types_pb2.ModelInfo:
    return types_pb2.ModelInfo(**vars(info))


def vocabulary_from_pb(message: types_pb2.Vocabulary) -> dict[int, str]:
    return dict(zip(message.token_ids, message.tokens, strict=False))


def vocabulary_to_pb(tokens_by_id: Mapping[int, str]) -> types_pb2.Vocabulary:
    token_ids = sorted(tokens_by_id)
    return types_pb2.Vocabulary(token_ids=token_ids, tokens=[tokens_by_id[token_id] for token_id in token_ids])


def kv_usage_from_pb(message: types_pb2.KvUsage) -> messages.KvUsage:
    return _from_pb(messages.KvUsage, message)


def kv_usage_to_pb(usage: messages.KvUsage) -> types_pb2.KvUsage:
    return types_pb2.KvUsage(**vars(usage))
