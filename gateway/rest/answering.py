"""How every route for text answers: its chunks, as a stream of events or as one reply."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import Request
from starlette.responses import Response

from easyspec.speculation.parameters import SamplingParameters
from gateway.messages.chunk import GenerationChunk
from gateway.messages.progress import Progress
from gateway.messages.request import TokenIds
from gateway.rest.backend import Caller
from gateway.rest.errors import Failure, json_bytes, with_names
from gateway.rest.generation_fields import GenerationFields
from gateway.rest.sse import EventStream, LastWords, named_event, while_connected
from gateway.text.conversation import Conversation


class Answer(Protocol):
    """The answer to one request: exactly one of `events` and `collected` is asked for.

    `progress` has one entry for each prompt, `failed` are the last events of a stream that fails.
    """

    @property
    def progress(self) -> Sequence[Progress]: ...

    @property
    def failed(self) -> LastWords: ...

    def events(self) -> AsyncGenerator[bytes, None]: ...

    async def collected(self) -> dict[str, Any]: ...


async def answered(body: GenerationFields, request: Request, answer: Answer) -> Response:
    """The response, in the form that the request asks for."""
    if body.stream:
        return EventStream(answer.events(), *answer.progress, last_words=answer.failed)
    return Response(
        json_bytes(await while_connected(request.receive, answer.collected())), media_type="application/json"
    )


class Generated:
    """The chunks of a request's prompts, all sampled alike; errors have the names that the client sent."""

    def __init__(self, body: GenerationFields, caller: Caller) -> None:
        self._body = body
        self._caller = caller
        self.sampling: SamplingParameters = body.sampling(caller.generator.sampling_defaults)

    def chunks(
        self, prompt: str | TokenIds | Conversation, max_tokens: int | None, progress: Progress
    ) -> AsyncGenerator[GenerationChunk, None]:
        caller = self._caller
        generation = self._body.generation(caller, prompt, self.sampling, max_tokens)
        return with_names(caller.generator.generate(generation, caller.timeout_s, progress), self._body.param_names)


class Writer(Protocol):
    """Turns chunks into named events, and is the whole reply when there are no more."""

    def push(self, chunk: GenerationChunk) -> Iterator[dict[str, Any]]:
        """The events of a round."""

    def reply(self) -> dict[str, Any]:
        """The reply as far as it goes."""

    def failed(self, failure: Failure) -> bytes:
        """The last events of a stream that fails."""


class NamedEventsAnswer:
    """The answer of the two APIs whose events have names."""

    def __init__(self, writer: Writer, chunks: AsyncGenerator[GenerationChunk, None], progress: Progress) -> None:
        self._writer = writer
        self._chunks = chunks
        self.progress = (progress,)
        self.failed = writer.failed

    async def events(self) -> AsyncGenerator[bytes, None]:
        """SSE events, those of a round in one piece."""
        async with aclosing(self._chunks) as chunks:
            async for chunk in chunks:
                events = [named_event(event["type"], event) for event in self._writer.push(chunk)]
                if events:
                    yield b"".join(events)

    async def collected(self) -> dict[str, Any]:
        async with aclosing(self._chunks) as chunks:
            async for chunk in chunks:
                for _ in self._writer.push(chunk):
                    pass
        return self._writer.reply()
