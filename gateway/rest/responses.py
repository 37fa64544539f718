"""`/v1/responses`: the form of an answer that OpenAI's newer clients ask for; nothing is stored."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from easyspec.speculation.parameters import FinishReason
from gateway.messages.chunk import Completion, GenerationChunk
from gateway.rest.answering import NamedEventsAnswer, answered
from gateway.rest.backend import Caller, InCaller
from gateway.rest.errors import Failure
from gateway.rest.json_route import JsonRoute
from gateway.rest.logprobs import LogprobFormat
from gateway.rest.recent_items import RecentItems
from gateway.rest.reply import schema_fields
from gateway.rest.responses_request import ResponsesRequest
from gateway.rest.sse import event
from gateway.text.tool_parser import Thought, ToolCallDelta

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/responses")
async def create_response(body: ResponsesRequest, caller: InCaller, request: Request) -> Response:
    """Answer an input."""
    recent: RecentItems = request.app.state.recent_items
    return await answered(body, request, _Answer(body, caller.for_model(body.model), recent))


class _Answer(NamedEventsAnswer):
    """Its items are kept in `recent` in the end."""

    def __init__(self, body: ResponsesRequest, caller: Caller, recent: RecentItems) -> None:
        conversation = body.prompt_conversation(partial(recent.find, caller.client))
        super().__init__(body, caller, conversation, body.max_output_tokens)
        self._body = body
        self._remember = partial(recent.remember, caller.client)
        self._id = f"resp_{uuid.uuid4().hex}"
        self._created_s = int(time.time())
        self._format = LogprobFormat(caller.generator.tokenizer, body.num_top_logprobs)
        self._tracks = body.logprob_tracks(caller.generator.tokenizer, 1)
        self._logprobs: list[Any] = []  # of text that is held back
        self._num_events = 0

    def push(self, chunk: GenerationChunk) -> Iterator[dict[str, Any]]:
        if self._num_events == 0:
            yield self._event("response.created", response=self.reply())
            yield self._event("response.in_progress", response=self.reply())
        for track in self._tracks:
            self._logprobs += self._format.chat(track.push(chunk))["content"]
        for part in chunk.parts:
            if isinstance(part, ToolCallDelta):
                yield from self._called(part)
            elif isinstance(part, Thought):
                yield from self._extended("reasoning", part.text)
            else:
                yield from self._extended("message", part, logprobs=self._logprobs)
                self._logprobs = []
        if chunk.parts:
            self._logprobs = []  # of what was thought or called
        if chunk.completion is not None:
            yield from self._ended(chunk.completion)

    def _called(self, call: ToolCallDelta) -> Iterator[dict[str, Any]]:
        if call.id is not None:
            yield from self._closed("completed")
            yield from self._opened("function_call", call_id=call.id, name=call.name, arguments="")
        if call.arguments:
            self._output[-1]["arguments"] += call.arguments
            yield self._event("response.function_call_arguments.delta", **self._place(), delta=call.arguments)

    def _ended(self, completion: Completion) -> Iterator[dict[str, Any]]:
        is_cut = completion.finish_reason is FinishReason.LENGTH
        if not any(item["type"] != "reasoning" for item in self._output) and not is_cut:
            yield from self._opened("message")
        yield from self._closed("incomplete" if is_cut else "completed")
        self._tally.add(0, completion)
        self._completion = completion
        if self._body.store is not False:
            self._remember(self._output)
        kind = "response.incomplete" if is_cut else "response.completed"
        yield self._event(kind, response=self.reply())

    def failed(self, failure: Failure) -> bytes:
        told = {"code": failure.code, "message": failure.message, "param": failure.param}
        error = {"code": "server_error" if failure.status >= 500 else failure.code, "message": failure.message}
        response = self.reply() | {"status": "failed", "error": error}
        events = [self._event("error", **told), self._event("response.failed", response=response)]
        return b"".join(event(each, each["type"]) for each in events)

    def reply(self) -> dict[str, Any]:
        body, completion = self._body, self._completion
        is_cut = completion is not None and completion.finish_reason is FinishReason.LENGTH
        reply: dict[str, Any] = {
            "id": self._id,
            "object": "response",
            "created_at": self._created_s,
            "status": "in_progress" if completion is None else "incomplete" if is_cut else "completed",
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": list(self._output),
            "usage": self._usage() if completion is not None else None,
            "store": False,
            "background": False,
            "previous_response_id": None,
            "model": self._model,
            **_echoed(body),
        }
        if completion is not None:
            reply |= {"completed_at": int(time.time()), "metrics": self._tally.metrics, **schema_fields(completion)}
        return reply

    def _usage(self) -> dict[str, Any]:
        usage = self._tally.usage
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": usage["completion_tokens_details"],
            "total_tokens": usage["total_tokens"],
        }

    def _opened(self, kind: str, **fields: Any) -> Iterator[dict[str, Any]]:
        """An open item of that kind: the present one, or a new one."""
        if self._open is not None and self._open["type"] == kind:
            return
        yield from self._closed("completed")
        item_id = f"{_PREFIXES[kind]}_{uuid.uuid4().hex}"
        item: dict[str, Any] = {"id": item_id, "type": kind, "status": "in_progress", **fields}
        if kind == "message":
            item |= {"role": "assistant", "content": []}
        elif kind == "reasoning":
            item |= {"summary": [], "content": []}
        self._output.append(item)
        self._open = item
        # What is said of an item now must not change with it later.
        yield self._event("response.output_item.added", output_index=len(self._output) - 1, item=dict(item))
        if kind in _NEW_PARTS:
            item["content"] = [dict(_NEW_PARTS[kind])]
            part = dict(_NEW_PARTS[kind])
            yield self._event("response.content_part.added", **self._place(content_index=0), part=part)

    def _extended(self, kind: str, text: str, **logprobs: list[Any]) -> Iterator[dict[str, Any]]:
        yield from self._opened(kind)
        (part,) = self._output[-1]["content"]
        part["text"] += text
        for name, added in logprobs.items():
            part[name] = [*part[name], *added]
        name = f"response.{part['type']}.delta"
        yield self._event(name, **self._place(content_index=0), delta=text, **logprobs)

    def _closed(self, status: str) -> Iterator[dict[str, Any]]:
        """No open item."""
        item, self._open = self._open, None
        if item is None:
            return
        item["status"] = status
        if item["type"] == "function_call":
            told = {"arguments": item["arguments"], "name": item["name"]}
            yield self._event("response.function_call_arguments.done", **self._place(), **told)
        else:
            (part,) = item["content"]
            told = {name: part[name] for name in ("text", "logprobs") if name in part}
            yield self._event(f"response.{part['type']}.done", **self._place(content_index=0), **told)
            yield self._event("response.content_part.done", **self._place(content_index=0), part=part)
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)

    def _place(self, **within: int) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1, **within}

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **fields}


_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
_NEW_PARTS: dict[str, dict[str, Any]] = {
    "message": {"type": "output_text", "text": "", "annotations": [], "logprobs": []},
    "reasoning": {"type": "reasoning_text", "text": ""},
}


def _echoed(body: ResponsesRequest) -> dict[str, Any]:
    """What a response repeats of its request, with our defaults."""
    defaults: dict[str, Any] = {
        "instructions": None,
        "max_output_tokens": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "temperature": 1.0,
        "tool_choice": "auto",
        "top_p": 1.0,
        "top_logprobs": 0,
        "truncation": "disabled",
        "user": None,
        "tools": [],
        "text": {},
    }
    told = defaults | body.model_dump(by_alias=True, exclude_none=True, include=set(defaults))
    told["tools"] = [{"strict": False, "description": None, **tool} for tool in told["tools"]]
    told["text"] = {"format": {"type": "text"}, **told["text"]}
    return told
