"""`/v1/messages`: Anthropic's form of a conversation and its answer."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request, Response

from easyspec.speculation.parameters import FinishReason
from gateway.messages.chunk import GenerationChunk
from gateway.rest.answering import NamedEventsAnswer, answered
from gateway.rest.backend import Caller, InCaller
from gateway.rest.errors import Failure
from gateway.rest.json_route import JsonRoute
from gateway.rest.messages_request import MessagesFields, MessagesRequest
from gateway.rest.reply import schema_fields
from gateway.rest.sse import event
from gateway.text.conversation import parsed_json
from gateway.text.tool_parser import Thought, ToolCallDelta

router = APIRouter(route_class=JsonRoute)

_STOP_REASONS = {FinishReason.STOP: "end_turn", FinishReason.LENGTH: "max_tokens", FinishReason.TOOL_CALLS: "tool_use"}


@router.post("/v1/messages")
async def create_message(body: MessagesRequest, caller: InCaller, request: Request) -> Response:
    """Answer a conversation."""
    return await answered(body, request, _Answer(body, caller.for_model(body.model)))


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: MessagesFields, caller: InCaller) -> dict[str, int]:
    """How many tokens a conversation is."""
    return {"input_tokens": len(await caller.for_model(body.model).encoded(body.conversation()))}


class _Answer(NamedEventsAnswer):
    def __init__(self, body: MessagesRequest, caller: Caller) -> None:
        super().__init__(body, caller, body.conversation(), body.max_tokens)
        self._id = f"msg_{uuid.uuid4().hex}"
        self._arguments = ""  # of the open call

    def push(self, chunk: GenerationChunk) -> Iterator[dict[str, Any]]:
        if not self._has_begun:
            self._has_begun = True
            yield {"type": "message_start", "message": self.reply()}
        for part in chunk.parts:
            if isinstance(part, ToolCallDelta):
                yield from self._called(part)
            elif isinstance(part, Thought):
                yield from self._extended("thinking", part.text)
            else:
                yield from self._extended("text", part)
        if chunk.completion is not None:
            if not self._output:
                yield from self._opened("text")
            yield from self._closed()
            self._tally.add(0, chunk.completion)
            self._completion = chunk.completion
            delta = {name: self.reply()[name] for name in ("stop_reason", "stop_sequence")}
            yield {"type": "message_delta", "delta": delta, "usage": self._usage()}
            yield {"type": "message_stop"}

    def _called(self, call: ToolCallDelta) -> Iterator[dict[str, Any]]:
        if call.id is not None:
            yield from self._closed()
            yield from self._opened("tool_use", id=call.id, name=call.name, input={})
        if call.arguments:
            self._arguments += call.arguments
            yield self._delta({"type": "input_json_delta", "partial_json": call.arguments})

    def failed(self, failure: Failure) -> bytes:
        return event(failure.anthropic_body, "error")

    def reply(self) -> dict[str, Any]:
        completion, stop_reason = self._completion, None
        if completion is not None:
            is_stopped = completion.matched_stop_string is not None and completion.finish_reason is FinishReason.STOP
            stop_reason = "stop_sequence" if is_stopped else _STOP_REASONS[completion.finish_reason]
        reply: dict[str, Any] = {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": list(self._output),
            "stop_reason": stop_reason,
            "stop_sequence": completion.matched_stop_string if completion is not None else None,
            "usage": self._usage(),
        }
        if completion is not None:
            reply |= {"metrics": self._tally.metrics, **schema_fields(completion)}
        return reply

    def _usage(self) -> dict[str, Any]:
        usage = self._tally.usage
        num_cached = usage["prompt_tokens_details"]["cached_tokens"]
        num_prompt_tokens = usage["prompt_tokens"] or self.progress[0].num_prompt_tokens
        return {
            "input_tokens": num_prompt_tokens - num_cached,  # Anthropic counts what was cached apart
            "cache_read_input_tokens": num_cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": usage["completion_tokens"],
        }

    def _opened(self, kind: str, **fields: Any) -> Iterator[dict[str, Any]]:
        """An open block of that kind: the present one, or a new one."""
        if self._open is not None and self._open["type"] == kind:
            return
        yield from self._closed()
        empty = {"text": {"text": ""}, "thinking": {"thinking": "", "signature": ""}}.get(kind, {})
        block = {"type": kind, **empty, **fields}
        self._output.append(block)
        self._open, self._arguments = block, ""
        yield {"type": "content_block_start", "index": len(self._output) - 1, "content_block": dict(block)}

    def _extended(self, kind: str, text: str) -> Iterator[dict[str, Any]]:
        yield from self._opened(kind)
        self._output[-1][kind] += text
        yield self._delta({"type": f"{kind}_delta", kind: text})

    def _closed(self) -> Iterator[dict[str, Any]]:
        """No open block."""
        block, self._open = self._open, None
        if block is None:
            return
        if block["type"] == "tool_use":
            value = parsed_json(self._arguments)
            block["input"] = value if isinstance(value, dict) else {}  # it was cut off
        yield {"type": "content_block_stop", "index": len(self._output) - 1}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self._output) - 1, "delta": delta}
