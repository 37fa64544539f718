"""`/v1/completions`: text to continue."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeAlias, TypeVar

from fastapi import APIRouter, Request
from pydantic import BeforeValidator, Field, Strict
from starlette.responses import Response

from easyspec.errors import InvalidRequestError
from easyspec.speculation.parameters import MAX_TOP_LOGPROBS
from gateway.generation.choices import merged
from gateway.messages.chunk import GenerationChunk
from gateway.messages.progress import Progress
from gateway.messages.request import TokenIds
from gateway.rest.answering import Generated, answered
from gateway.rest.backend import Caller, InCaller
from gateway.rest.fields import Boolean, Count, Integer, ListOf, Text, TokenId, Unsupported
from gateway.rest.generation_fields import GenerationFields, PromptLogprobsFields
from gateway.rest.json_route import JsonRoute
from gateway.rest.logprobs import LogprobFormat, TokenEntry
from gateway.rest.reply import EventWriter, ReplyHead, Tally, schema_fields, trace_fields
from gateway.rest.sse import DONE, openai_last_words

router = APIRouter(route_class=JsonRoute)

MAX_PROMPTS = 64
_PromptT = TypeVar("_PromptT")
Prompts: TypeAlias = Annotated[ListOf[_PromptT], Field(max_length=MAX_PROMPTS)]
# OpenAI's default for this endpoint, which clients of it expect.
DEFAULT_MAX_TOKENS = 16


class CompletionRequest(PromptLogprobsFields, GenerationFields):
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
    suffix: Unsupported = None

    @property
    def param_names(self) -> Mapping[str, str]:
        return {"sampling.grammar": self.grammar_field, "num_top_logprobs": "logprobs", "prompt_logprobs": "logprobs"}

    @property
    def prompts(self) -> list[str | TokenIds]:
        prompt: Any = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if prompt and isinstance(prompt[0], int):
            return [TokenIds(tuple(prompt))]
        return [one if isinstance(one, str) else TokenIds(tuple(one)) for one in prompt]

    @property
    def num_top_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        return self.prompt_logprobs

    @property
    def echoes(self) -> bool:
        return bool(self.echo)

    @property
    def most_tokens(self) -> int:
        """One token is decoded where none is wanted: none cannot be."""
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else max(1, self.max_tokens)

    def check(self) -> None:
        """Raise InvalidRequestError for what can be told without a model."""
        self.check_stream_options()
        self.check_prompt_logprobs(self.stream)
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


@dataclass(frozen=True)
class _Piece:
    """What a round adds to one choice."""

    text: str
    entries: Sequence[TokenEntry]
    finish_reason: str | None
    trace: dict[str, Any] | None = None
    schema_fields: dict[str, Any] = field(default_factory=dict)


class _Answer:
    """The answer to one request. Choices are numbered through all prompts."""

    failed = staticmethod(openai_last_words)

    def __init__(self, body: CompletionRequest, caller: Caller) -> None:
        self._body = body
        self._generated = Generated(body, caller)
        self._head = ReplyHead.new("cmpl", "text_completion", caller.model.name)
        self._format = LogprobFormat(caller.generator.tokenizer, body.num_top_logprobs)
        self._prompt_format = LogprobFormat(caller.generator.tokenizer, body.num_prompt_logprobs)
        self._num_choices = len(body.prompts) * body.num_choices
        self._tracks = (
            body.logprob_tracks(caller.generator.tokenizer, self._num_choices) if body.logprobs is not None else []
        )
        self._awaits_prompt = [body.echoes or body.num_prompt_logprobs is not None] * self._num_choices
        self._prompt_fields: list[dict[str, Any]] = [{} for _ in range(self._num_choices)]
        self._tally = Tally(body.reported(self._generated.sampling))
        self.progress = [Progress() for _ in body.prompts]

    async def events(self) -> AsyncGenerator[bytes, None]:
        """SSE events, one a round and choice."""
        writer = EventWriter(self._head, self._body.includes_usage)
        async with aclosing(self._pieces()) as pieces:
            async for index, piece in pieces:
                logprobs = self._format.completion(piece.entries) if piece.entries else None
                usage = self._tally.usage_so_far if self._body.tells_usage_so_far else None
                choice = _choice(index, piece.text, logprobs, piece.finish_reason) | piece.schema_fields
                yield writer.choice(choice, piece.trace, usage)
        if self._body.includes_usage:
            yield writer.usage(self._tally.usage, self._tally.metrics)
        yield DONE

    async def collected(self) -> dict[str, Any]:
        pieces_of: list[list[_Piece]] = [[] for _ in range(self._num_choices)]
        async with aclosing(self._pieces()) as pieces:
            async for index, piece in pieces:
                pieces_of[index].append(piece)
        choices = []
        for index, pieces_of_one in enumerate(pieces_of):
            text = "".join(piece.text for piece in pieces_of_one)
            entries = [entry for piece in pieces_of_one for entry in piece.entries]
            logprobs = self._format.completion(entries) if self._tracks else None
            last = pieces_of_one[-1]
            choice = _choice(index, text, logprobs, last.finish_reason)
            choices.append(choice | last.schema_fields | self._prompt_fields[index])
        return self._head.body(choices=choices, usage=self._tally.usage, metrics=self._tally.metrics)

    async def _pieces(self) -> AsyncGenerator[tuple[int, _Piece], None]:
        sources = [
            self._generated.chunks(prompt, self._body.most_tokens, progress)
            for prompt, progress in zip(self._body.prompts, self.progress, strict=True)
        ]
        async with aclosing(merged(sources)) as tagged:
            async for prompt_index, chunk in tagged:
                index = prompt_index * self._body.num_choices + chunk.choice_index
                num_output_tokens = 0 if self._awaits_prompt[index] else len(chunk.token_ids)
                self._tally.round(prompt_index, self.progress[prompt_index].num_prompt_tokens, num_output_tokens)
                if chunk.completion is not None:
                    self._tally.add(prompt_index, chunk.completion)
                yield index, self._piece(index, chunk)

    def _piece(self, index: int, chunk: GenerationChunk) -> _Piece:
        track = self._tracks[index] if self._tracks else None
        reason = chunk.completion.finish_reason.value if chunk.completion is not None else None
        if self._awaits_prompt[index]:
            self._awaits_prompt[index] = False
            if self._body.num_prompt_logprobs is not None:
                self._prompt_fields[index] = {"prompt_logprobs": self._prompt_format.prompt(chunk)}
            entries = track.push_prompt(chunk) if track is not None and self._body.echoes else ()
            return _Piece(chunk.text, entries, reason)
        if self._body.max_tokens == 0:  # one token was decoded because none cannot be
            self._tally.drop_output(len(chunk.token_ids))
            return _Piece("", (), "length")
        entries = track.push(chunk) if track is not None else ()
        checked = schema_fields(chunk.completion) if chunk.completion is not None else {}
        return _Piece(chunk.text, entries, reason, trace_fields(chunk), checked)


def _choice(index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
