"""Sizes of a request: each bound at its edge, and before anything is tokenized or sent on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from pydantic import ValidationError

from easyspec.errors import InvalidRequestError
from easyspec.rpc.channels import open_channel
from easyspec.rpc.errors import error_from_rpc
from easyspec.speculation.parameters import Grammar, GrammarKind, SamplingParameters, StopConditions
from easyspec.v1 import generation_pb2, generation_pb2_grpc, types_pb2
from gateway.messages.limits import RequestLimits
from gateway.service.config import GatewaySettings
from gateway.service.server import GatewayServer
from gateway.text.tokenizer import Tokenizer
from tests.fakes.services import TOY_TEXT, ToyLanguage, running, running_pair

LIMITS = RequestLimits(
    max_request_bytes=1024,
    max_prompt_chars=10,
    max_chat_messages=3,
    max_choices=2,
    max_stop_strings=2,
    max_stop_string_chars=4,
    max_stop_token_ids=2,
    max_logit_bias=2,
    max_grammar_bytes=8,
)


def bias(num_entries: int) -> SamplingParameters:
    return SamplingParameters(0, logit_bias=dict.fromkeys(range(num_entries), 1.0))


def grammar(text: str) -> SamplingParameters:
    return SamplingParameters(0, grammar=Grammar(GrammarKind.REGEX, text))


@pytest.mark.parametrize(
    ("check", "fits", "does_not", "field"),
    [
        (LIMITS.check_sampling, (bias(2),), (bias(3),), "sampling.logit_bias"),
        (LIMITS.check_sampling, (grammar("x" * 8),), (grammar("x" * 9),), "sampling.grammar.regex"),
        (LIMITS.check_sampling, (grammar("é" * 4),), (grammar("é" * 5),), "sampling.grammar.regex"),
        (
            LIMITS.check_stops,
            (StopConditions(stop_token_ids=frozenset((1, 2))), ()),
            (StopConditions(stop_token_ids=frozenset((1, 2, 3))), ()),
            "stop.stop_token_ids",
        ),
        (LIMITS.check_stops, (StopConditions(), ("a", "b")), (StopConditions(), ("a", "b", "c")), "stop_strings"),
        (LIMITS.check_stops, (StopConditions(), ("abcd",)), (StopConditions(), ("a", "abcde")), "stop_strings[1]"),
        (LIMITS.check_stops, (StopConditions(), ("a",)), (StopConditions(), ("",)), "stop_strings[0]"),
        (LIMITS.check_text, ("prompt", 10), ("prompt", 11), "prompt"),
        (LIMITS.check_messages, ("messages", 3), ("messages", 4), "messages"),
        (LIMITS.check_choices, ("n", 2), ("n", 3), "n"),
        (LIMITS.check_choices, ("n", 1), ("n", 0), "n"),
        (LIMITS.check_message_bytes, (1024,), (1025,), "request"),
    ],
)
def test_the_last_that_fits_and_the_first_that_does_not(
    check: Callable[..., None], fits: tuple[Any, ...], does_not: tuple[Any, ...], field: str
) -> None:
    check(*fits)
    with pytest.raises(InvalidRequestError) as caught:
        check(*does_not)
    assert caught.value.field == field


def test_limits_are_settings_with_ranges_of_their_own() -> None:
    assert GatewaySettings(tokenizer=Path(), max_stop_strings=3).max_stop_strings == 3
    with pytest.raises(ValidationError):
        GatewaySettings(tokenizer=Path(), max_request_bytes=1)


# --- at the port ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (generation_pb2.GenerateRequest(text="x" * 2001), "prompt.text"),
        (generation_pb2.GenerateRequest(text="x" * 5000), "request"),
        (
            generation_pb2.GenerateRequest(
                chat=generation_pb2.ChatPrompt(
                    messages=[generation_pb2.ChatMessage(role="user", content="x" * 1001)] * 2
                )
            ),
            "prompt.chat.messages",
        ),
        (
            generation_pb2.GenerateRequest(
                chat=generation_pb2.ChatPrompt(messages=[generation_pb2.ChatMessage(role="user")] * 5)
            ),
            "prompt.chat.messages",
        ),
        (
            generation_pb2.GenerateRequest(
                text="x", sampling=types_pb2.SamplingParameters(logit_bias=dict.fromkeys(range(5), 1.0))
            ),
            "sampling.logit_bias",
        ),
    ],
)
async def test_what_is_too_much_is_refused_before_it_is_tokenized_or_sent_on(
    request_: generation_pb2.GenerateRequest,
    field: str,
    tokenizer: Tokenizer,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object) -> tuple[int, ...]:
        raise AssertionError("tokenized")

    language = ToyLanguage(tokenizer.encode(TOY_TEXT), 352, tokenizer.fingerprint)
    monkeypatch.setattr(Tokenizer, "encode", never)
    monkeypatch.setattr(Tokenizer, "prompt_of", never)
    async with running_pair(language) as pair:
        settings = GatewaySettings(
            address="127.0.0.1:0",
            tokenizer=tokenizer_folder,
            verifier_address=pair.verifier_service.address,
            max_request_bytes=4000,
            max_prompt_chars=2000,
            max_chat_messages=4,
            max_logit_bias=4,
        )
        async with running(GatewayServer(settings)) as service, open_channel(service.address) as channel:
            call = generation_pb2_grpc.GenerationServiceStub(channel).Generate(request_, timeout=10)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                _ = [chunk async for chunk in call]
        error = error_from_rpc(caught.value)
        assert isinstance(error, InvalidRequestError)
        assert error.field == field
        assert pair.verifier.num_opened == 0
