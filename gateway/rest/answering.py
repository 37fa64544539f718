"""How every route for text answers: its chunks, as a stream of events or as one reply."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Request, Response

from gateway.generation.choices import merged
from gateway.messages.chunk import Completion, GenerationChunk
from gateway.messages.progress import Progress
from gateway.rest.backend import Caller
from gateway.rest.errors import Failure, json_bytes, with_names
from gateway.rest.generation_fields import ChoicesFields, GenerationFields, Prompt
from gateway.rest.logprobs import LogprobFormat, TokenEntry
from gateway.rest.reply import EventWriter, Tally, reply_head
from gateway.rest.sse import DONE, EventStream, event, while_connected
from gateway.text.conversation import Conversation


class Answer(ABC):
    """The answer to one request: exactly one of `events` and `collected` is asked for. All prompts are sampled alike,
    `progress` has one entry for each; errors have the names that the client sent."""

    def __init__(
        self, body: GenerationFields, caller: Caller, prompts: Sequence[Prompt], max_tokens: int | None
    ) -> None:
        generator, sampling = caller.generator, body.sampling(caller.generator.sampling_defaults)
        self._model = caller.model.name
        self._tally = Tally(sampling, sampling.seed if body.seed is None else body.seed)
        self.progress = [Progress() for _ in prompts]
        sources = []
        for prompt, progress in zip(prompts, self.progress, strict=True):
            generation = body.generation(caller, prompt, sampling, max_tokens)
            sources.append(with_names(generator.generate(generation, caller.timeout_s, progress), body.param_names))
        self._chunks = merged(sources)

    @abstractmethod
    def events(self) -> AsyncGenerator[bytes, None]:
        """SSE events, those of a round in one piece."""

    @abstractmethod
    async def collected(self) -> dict[str, Any]:
        """The whole reply."""

    @abstractmethod
    def failed(self, failure: Failure) -> bytes:
        """The last events of a stream that fails."""


async def answered(body: GenerationFields, request: Request, answer: Answer) -> Response:
    """The response, in the form that the request asks for."""
    if body.stream:
        return EventStream(answer.events(), *answer.progress, last_words=answer.failed)
    reply = await while_connected(request.receive, answer.collected())
    return Response(json_bytes(reply), media_type="application/json")


class ChoicesAnswer(Answer):
    """The answer of the two APIs of choices, which are numbered through all prompts."""

    id_prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, body: ChoicesFields, caller: Caller, prompts: Sequence[Prompt], max_tokens: int | None) -> None:
        super().__init__(body, caller, prompts, max_tokens)
        tokenizer = caller.generator.tokenizer
        self._body = body
        self._head = reply_head(self.id_prefix, self.chunk_kind if body.stream else self.kind, caller.model.name)
        self._num_choices = len(prompts) * body.num_choices
        self._format = LogprobFormat(tokenizer, body.num_top_logprobs)
        self._prompt_format = LogprobFormat(tokenizer, body.num_prompt_logprobs)
        self._tracks = body.logprob_tracks(tokenizer, self._num_choices)
        self._prompt_chunks: dict[int, GenerationChunk] = {}

    @abstractmethod
    def deltas(
        self, index: int, chunk: GenerationChunk, entries: Sequence[TokenEntry]
    ) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
        """What a round adds to a choice, each part with the `trace_fields` that go with it."""

    @abstractmethod
    def choice(self, index: int, chunks: Sequence[GenerationChunk], entries: Sequence[TokenEntry]) -> dict[str, Any]:
        """A whole choice."""

    async def events(self) -> AsyncGenerator[bytes, None]:
        body, writer = self._body, EventWriter(self._head, self._body.includes_usage)
        async with aclosing(self._rounds()) as rounds:
            async for index, chunk, entries in rounds:
                usage = self._tally.usage_so_far if body.tells_usage_so_far else None
                deltas = self.deltas(index, chunk, entries)
                if events := b"".join(writer.choice(delta, trace, usage) for delta, trace in deltas):
                    yield events
        if body.includes_usage:
            yield writer.usage(self._tally.usage, self._tally.metrics)
        yield DONE

    async def collected(self) -> dict[str, Any]:
        chunks_of: list[list[GenerationChunk]] = [[] for _ in range(self._num_choices)]
        entries_of: list[list[TokenEntry]] = [[] for _ in range(self._num_choices)]
        async with aclosing(self._rounds()) as rounds:
            async for index, chunk, entries in rounds:
                chunks_of[index].append(chunk)
                entries_of[index].extend(entries)
        choices = [self.choice(index, chunks_of[index], entries_of[index]) for index in range(self._num_choices)]
        return self._head | {"choices": choices, "usage": self._tally.usage, "metrics": self._tally.metrics}

    def failed(self, failure: Failure) -> bytes:
        return event(failure.body) + DONE

    def prompt_fields(self, index: int) -> dict[str, Any]:
        """The log-probabilities of a choice's prompt, if they are wanted."""
        if self._body.num_prompt_logprobs is None:
            return {}
        return {"prompt_logprobs": self._prompt_format.prompt(self._prompt_chunks[index])}

    async def _rounds(self) -> AsyncGenerator[tuple[int, GenerationChunk, Sequence[TokenEntry]], None]:
        """The index of a choice, a chunk of it, and the log-probabilities that became final with it."""
        body = self._body
        has_prompt = body.echoes or body.num_prompt_logprobs is not None
        async with aclosing(self._chunks) as chunks:
            async for prompt_index, chunk in chunks:
                index = prompt_index * body.num_choices + chunk.choice_index
                track = self._tracks[index] if self._tracks else None
                is_prompt = has_prompt and index not in self._prompt_chunks
                num_output_tokens = 0 if is_prompt else len(chunk.token_ids)
                self._tally.round(prompt_index, self.progress[prompt_index].num_prompt_tokens, num_output_tokens)
                if chunk.completion is not None:
                    self._tally.add(prompt_index, chunk.completion)
                if is_prompt:
                    self._prompt_chunks[index] = chunk
                    if body.echoes:
                        yield index, chunk, track.push_prompt(chunk) if track is not None else ()
                else:
                    yield index, chunk, track.push(chunk) if track is not None else ()


class NamedEventsAnswer(Answer):
    """The answer of the two APIs whose events have names. At any time one block of its output is open, or none."""

    def __init__(
        self, body: GenerationFields, caller: Caller, conversation: Conversation, max_tokens: int | None
    ) -> None:
        super().__init__(body, caller, [conversation], max_tokens)
        self._output: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._has_begun = False
        self._completion: Completion | None = None

    @abstractmethod
    def push(self, chunk: GenerationChunk) -> Iterator[dict[str, Any]]:
        """The events of a round."""

    @abstractmethod
    def reply(self) -> dict[str, Any]:
        """The reply as far as it goes."""

    async def events(self) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._chunks) as chunks:
            async for _, chunk in chunks:
                if events := b"".join(event(each, each["type"]) for each in self.push(chunk)):
                    yield events

    async def collected(self) -> dict[str, Any]:
        async with aclosing(self._chunks) as chunks:
            async for _, chunk in chunks:
                for _ in self.push(chunk):
                    pass
        return self.reply()
