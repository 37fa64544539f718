"""`/v1/chat/completions`: a conversation to answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from gateway.messages.chunk import GenerationChunk
from gateway.rest.answering import ChoicesAnswer, answered
from gateway.rest.backend import Caller, InCaller
from gateway.rest.chat_request import ChatRequest
from gateway.rest.json_route import JsonRoute
from gateway.rest.logprobs import TokenEntry
from gateway.rest.reply import end_fields, trace_fields
from gateway.text.tool_parser import ToolCallDelta, joined

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatRequest, caller: InCaller, request: Request) -> Response:
    """Answer a conversation."""
    body.check()
    return await answered(body, request, _Answer(body, caller.for_model(body.model)))


class _Answer(ChoicesAnswer):
    id_prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, body: ChatRequest, caller: Caller) -> None:
        super().__init__(body, caller, [body.conversation()], body.most_tokens)
        self._begun: set[int] = set()

    def deltas(
        self, index: int, chunk: GenerationChunk, entries: Sequence[TokenEntry]
    ) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
        def delta(logprobs: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
            return {"index": index, "delta": fields, "logprobs": logprobs, "finish_reason": None}

        if index not in self._begun:
            self._begun.add(index)
            yield delta(role="assistant", content=""), None
        if chunk.reasoning:
            yield delta(reasoning_content=chunk.reasoning), None
        if chunk.text or entries or chunk.trace:
            yield delta(self._format.chat(entries) if entries else None, content=chunk.text), trace_fields(chunk)
        # Some clients read no more than the first call of a delta.
        for call in joined(chunk.tool_calls):
            yield delta(tool_calls=[{"index": call.index, **_told(call)}]), None
        if chunk.completion is not None:
            yield delta() | end_fields(chunk.completion), None

    def choice(self, index: int, chunks: Sequence[GenerationChunk], entries: Sequence[TokenEntry]) -> dict[str, Any]:
        text = "".join(chunk.text for chunk in chunks)
        calls = [_told(call) for call in joined(call for chunk in chunks for call in chunk.tool_calls)]
        message: dict[str, Any] = {"role": "assistant", "content": None if calls and not text else text}
        message["refusal"] = None
        if thoughts := "".join(chunk.reasoning for chunk in chunks):
            message["reasoning_content"] = thoughts
        if calls:
            message["tool_calls"] = calls
        logprobs = self._format.chat(entries) if self._tracks else None
        return {"index": index, "message": message, "logprobs": logprobs, **end_fields(chunks[-1].completion)}

    async def collected(self) -> dict[str, Any]:
        return await super().collected() | self.prompt_fields(0)


def _told(call: ToolCallDelta) -> dict[str, Any]:
    if call.id is None:  # goes on
        return {"function": {"arguments": call.arguments}}
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
