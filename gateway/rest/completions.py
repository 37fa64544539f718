"""`/v1/completions`: text to continue."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any, TypeAlias, TypeVar

from fastapi import APIRouter, Request, Response
from pydantic import BeforeValidator, Field, Strict

from easyspec.errors import InvalidRequestError
from easyspec.speculation.parameters import MAX_TOP_LOGPROBS, FinishReason
from gateway.messages.chunk import GenerationChunk
from gateway.messages.request import TokenIds
from gateway.rest.answering import ChoicesAnswer, answered
from gateway.rest.backend import Caller, InCaller
from gateway.rest.fields import Boolean, Count, Integer, ListOf, Text, TokenId, unsupported
from gateway.rest.generation_fields import ChoicesFields
from gateway.rest.json_route import JsonRoute
from gateway.rest.logprobs import TokenEntry
from gateway.rest.reply import end_fields, trace_fields

router = APIRouter(route_class=JsonRoute)

MAX_PROMPTS = 64
_PromptT = TypeVar("_PromptT")
Prompts: TypeAlias = Annotated[ListOf[_PromptT], Field(max_length=MAX_PROMPTS)]
# OpenAI's default for this endpoint, which clients of it expect.
DEFAULT_MAX_TOKENS = 16


class CompletionRequest(ChoicesFields):
    """Body of `/v1/completions`."""

    prompt: Text | Prompts[Text] | ListOf[TokenId] | Prompts[ListOf[TokenId]] = Field(
        description="Text, token ids, or a list of either; each prompt has its own choices."
    )
    max_tokens: Count | None = Field(None, description="Most output tokens. Unset: 16. 0 needs echo.")
    logprobs: Annotated[
        Annotated[int, Strict(), Field(ge=0, le=MAX_TOP_LOGPROBS)] | None,
        BeforeValidator(lambda value: None if value is False else value),  # as chat completions say none
    ] = Field(None, description="Log-probabilities, and this many of the likeliest, 0 to 20; false: none.")
    echo: Boolean | None = Field(None, description="Begin the text with the prompt.")
    best_of: Integer | None = Field(None, description="Only the same as n: all choices are returned.")
    suffix: Annotated[None, unsupported("the model cannot fill in the middle")] = None

    @property
    def param_names(self) -> Mapping[str, str]:
        return {**super().param_names, "num_top_logprobs": "logprobs", "prompt_logprobs": "logprobs"}

    @property
    def prompts(self) -> list[str | TokenIds]:
        prompt: Any = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            prompt = [prompt]
        return [one if isinstance(one, str) else TokenIds(tuple(one)) for one in prompt]

    @property
    def num_top_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def echoes(self) -> bool:
        return bool(self.echo)

    @property
    def most_tokens(self) -> int:
        """One token is decoded where none is wanted: none cannot be."""
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else max(1, self.max_tokens)

    def check(self) -> None:
        super().check()
        if not 1 <= len(self.prompts) <= MAX_PROMPTS:
            raise InvalidRequestError("prompt", f"{len(self.prompts)} prompts", f"1 to {MAX_PROMPTS}")
        if self.best_of not in (None, 0, self.num_choices):
            raise InvalidRequestError("best_of", self.best_of, "the same as n")
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequestError("max_tokens", 0, "at least 1, or 0 together with echo")


@router.post("/v1/completions")
async def create_completion(body: CompletionRequest, caller: InCaller, request: Request) -> Response:
    """Continue one or more prompts."""
    body.check()
    return await answered(body, request, _Answer(body, caller.for_model(body.model)))


class _Answer(ChoicesAnswer):
    id_prefix = "cmpl"
    kind = chunk_kind = "text_completion"

    def __init__(self, body: CompletionRequest, caller: Caller) -> None:
        super().__init__(body, caller, body.prompts, body.most_tokens)
        if body.max_tokens == 0:
            self._chunks = _prompts_alone(self._chunks)

    def deltas(
        self, index: int, chunk: GenerationChunk, entries: Sequence[TokenEntry]
    ) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
        yield _choice(index, [chunk], self._format.completion(entries) if entries else None), trace_fields(chunk)

    def choice(self, index: int, chunks: Sequence[GenerationChunk], entries: Sequence[TokenEntry]) -> dict[str, Any]:
        logprobs = self._format.completion(entries) if self._tracks else None
        return _choice(index, chunks, logprobs) | self.prompt_fields(index)


def _choice(index: int, chunks: Sequence[GenerationChunk], logprobs: dict[str, Any] | None) -> dict[str, Any]:
    text = "".join(chunk.text for chunk in chunks)
    return {"index": index, "text": text, "logprobs": logprobs, **end_fields(chunks[-1].completion)}


async def _prompts_alone(
    chunks: AsyncGenerator[tuple[int, GenerationChunk], None],
) -> AsyncGenerator[tuple[int, GenerationChunk], None]:
    """The same without the token that was decoded because none cannot be."""
    async with aclosing(chunks):
        async for index, chunk in chunks:
            completion = chunk.completion
            if completion is not None:
                completion = replace(
                    completion, finish_reason=FinishReason.LENGTH, num_output_tokens=0, schema_check=None
                )
                chunk = replace(chunk, text="", token_ids=(), logprobs=(), trace=None, completion=completion)
            yield index, chunk
