"""`/v1/completions`: text to continue."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from easyspec.errors import InvalidRequestError
from gateway.choices import merged
from gateway.generation import GenerationChunk, GenerationRequest, TokenIds
from gateway.rest.backend import Caller, InCaller
from gateway.rest.errors import json_bytes
from gateway.rest.fields import Boolean, GenerationFields, Integer, Text, TokenId, Unsupported
from gateway.rest.json_route import JsonRoute
from gateway.rest.reply import EventWriter, ReplyHead, Tally
from gateway.rest.sse import DONE, EventStream, while_connected

router = APIRouter(route_class=JsonRoute)

MAX_PROMPTS = 64
# OpenAI's default for this endpoint, which clients of it expect.
DEFAULT_MAX_TOKENS = 16


class CompletionRequest(GenerationFields):
    """Body of `/v1/completions`."""

    prompt: Text | list[Text] | list[TokenId] | list[list[TokenId]] = Field(
        description="Text, token ids, or a list of either; each prompt has its own choices."
    )
    max_tokens: Integer | None = Field(None, description="Most output tokens. Unset: 16. 0 needs echo.")
    logprobs: Integer | None = Field(None, description="Log-probabilities, and this many of the likeliest, 0 to 20.")
    echo: Boolean | None = Field(None, description="Begin the text with the prompt.")
    best_of: Integer | None = Field(None, description="Only the same as n: all choices are returned.")
    suffix: Unsupported = None

    @property
    def prompts(self) -> list[str | TokenIds]:
        prompt: Any = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if prompt and isinstance(prompt[0], int):
            return [TokenIds(tuple(prompt))]
        return [one if isinstance(one, str) else TokenIds(tuple(one)) for one in prompt]

    def check(self) -> None:
        """Raise InvalidRequestError for what can be told without a model."""
        if not 1 <= len(self.prompts) <= MAX_PROMPTS:
            raise InvalidRequestError("prompt", f"{len(self.prompts)} prompts", f"1 to {MAX_PROMPTS}")
        if self.best_of not in (None, self.num_choices):
            raise InvalidRequestError("best_of", self.best_of, "the same as n")
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequestError("max_tokens", 0, "at least 1, or 0 together with echo")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options", "set", "only together with stream")


@dataclass(frozen=True)
class _Indexed:
    """A chunk, the prompt it belongs to, and the index of its choice among all."""

    prompt_index: int
    choice_index: int
    chunk: GenerationChunk


@router.post("/v1/completions")
async def create_completion(body: CompletionRequest, caller: InCaller, request: Request) -> Response:
    """Continue one or more prompts."""
    body.check()
    head = ReplyHead.new("cmpl", "text_completion", caller.model.name)
    chunks = _chunks(body, caller)
    if body.stream:
        return EventStream(_events(body, head, chunks))
    return Response(
        json_bytes(await while_connected(request.receive, _collected(body, head, chunks))),
        media_type="application/json",
    )


async def _chunks(body: CompletionRequest, caller: Caller) -> AsyncGenerator[_Indexed, None]:
    sources = [caller.generator.generate(_request(body, prompt, caller), caller.timeout_s) for prompt in body.prompts]
    async with aclosing(merged(sources)) as tagged:
        async for prompt_index, chunk in tagged:
            yield _Indexed(prompt_index, prompt_index * body.num_choices + chunk.choice_index, chunk)


def _request(body: CompletionRequest, prompt: str | TokenIds, caller: Caller) -> GenerationRequest:
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    return GenerationRequest(
        prompt=prompt,
        sampling=body.sampling(),
        # Nothing at all cannot be decoded: one token is, and not shown.
        stop=body.stop_conditions(max(max_tokens, 1) if body.max_tokens == 0 else max_tokens),
        stop_strings=body.stop_strings,
        speculation=body.speculation_wish(caller.generator.default_budget),
        model=body.model or "",
        request_id=caller.request_id,
        client=caller.client,
        num_choices=body.num_choices,
        num_top_logprobs=body.logprobs,
        echo=bool(body.echo),
    )


async def _events(
    body: CompletionRequest, head: ReplyHead, chunks: AsyncGenerator[_Indexed, None]
) -> AsyncGenerator[bytes, None]:
    writer = EventWriter(head, body.includes_usage)
    tally = Tally()
    async with aclosing(chunks):
        async for indexed in chunks:
            completion = indexed.chunk.completion
            text = indexed.chunk.text
            if completion is not None:
                tally.add(indexed.prompt_index, completion)
            reason = completion.finish_reason.value if completion is not None else None
            yield writer.choice(
                {"index": indexed.choice_index, "text": text, "logprobs": None, "finish_reason": reason}
            )
    if body.includes_usage:
        yield writer.usage(tally.usage, tally.metrics)
    yield DONE


async def _collected(
    body: CompletionRequest, head: ReplyHead, chunks: AsyncGenerator[_Indexed, None]
) -> dict[str, Any]:
    tally = Tally()
    texts = [""] * (len(body.prompts) * body.num_choices)
    reasons: list[str | None] = [None] * len(texts)
    async with aclosing(chunks):
        async for indexed in chunks:
            texts[indexed.choice_index] += indexed.chunk.text
            completion = indexed.chunk.completion
            if completion is not None:
                tally.add(indexed.prompt_index, completion)
                reasons[indexed.choice_index] = completion.finish_reason.value
    choices = [
        {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
        for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
    ]
    return head.body(choices=choices, usage=tally.usage, metrics=tally.metrics)
