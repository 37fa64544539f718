"""`/v1/responses`: the form of an answer that OpenAI's newer clients ask for; nothing is stored."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from easyspec.speculation.parameters import FinishReason, SamplingParameters
from gateway.messages.chunk import Completion, GenerationChunk
from gateway.messages.progress import Progress
from gateway.rest.answering import Generated, NamedEventsAnswer, answered
from gateway.rest.backend import Caller, InCaller
from gateway.rest.errors import Failure
from gateway.rest.json_route import JsonRoute
from gateway.rest.logprobs import LogprobFormat
from gateway.rest.recent_items import RecentItems
from gateway.rest.reply import Tally, schema_fields
from gateway.rest.responses_request import ResponsesRequest
from gateway.rest.sse import named_event
from gateway.text.tool_parser import Thought, ToolCallDelta

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/responses")
async def create_response(body: ResponsesRequest, caller: InCaller, request: Request) -> Response:
    """Answer an input."""
    caller = caller.for_model(body.model)
    generated, progress = Generated(body, caller), Progress()
    recent: RecentItems = request.app.state.recent_items
    remember = partial(recent.remember, caller.client) if body.store is not False else None
    writer = _ResponseWriter(body, caller, generated.sampling, remember)
    conversation = body.prompt_conversation(partial(recent.find, caller.client))
    chunks = generated.chunks(conversation, body.max_output_tokens, progress)
    return await answered(body, request, NamedEventsAnswer(writer, chunks, progress))


class _ResponseWriter:
    """Turns chunks into the events of a response. At any time one item of its output is open, or none. `remember` is
    called with all items in the end."""

    def __init__(
        self,
        body: ResponsesRequest,
        caller: Caller,
        sampling: SamplingParameters,
        remember: Callable[[list[dict[str, Any]]], None] | None,
    ) -> None:
        self._body = body
        self._remember = remember
        self._model = caller.model.name
        self._id = _new_id("resp")
        self._created_s = int(time.time())
        self._tally = Tally(body.reported(sampling))
        self._format = LogprobFormat(caller.generator.tokenizer, body.num_top_logprobs)
        tokenizer = caller.generator.tokenizer
        self._track = body.logprob_tracks(tokenizer, 1)[0] if body.num_top_logprobs is not None else None
        self._logprobs: list[Any] = []  # of text that is held back
        self._output: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._num_events = 0
        self._completion: Completion | None = None

    def push(self, chunk: GenerationChunk) -> Iterator[dict[str, Any]]:
        if self._num_events == 0:
            yield self._event("response.created", response=self.reply())
            yield self._event("response.in_progress", response=self.reply())
        entries = self._track.push(chunk) if self._track is not None else ()
        self._logprobs += self._format.chat(entries)["content"] if entries else []
        for part in chunk.parts:
            if isinstance(part, Thought):
                yield from self._opened("reasoning")
                yield from self._extended("response.reasoning_text", part.text)
            elif isinstance(part, str):
                yield from self._opened("message")
                yield from self._extended("response.output_text", part, self._logprobs)
                self._logprobs = []
            else:
                yield from self._called(part)
        if chunk.parts:
            self._logprobs = []  # of what was thought or called
        if chunk.completion is not None:
            yield from self._ended(chunk.completion)

    def _called(self, call: ToolCallDelta) -> Iterator[dict[str, Any]]:
        if call.id is not None:
            yield from self._closed("completed")
            yield from self._opened("function_call", call_id=call.id, name=call.name, arguments="")
        item = self._open
        assert item is not None, "a call's first piece carries its id"
        item["arguments"] += call.arguments
        if call.arguments:
            yield self._event("response.function_call_arguments.delta", **self._place(item, None), delta=call.arguments)

    def _ended(self, completion: Completion) -> Iterator[dict[str, Any]]:
        is_cut = completion.finish_reason is FinishReason.LENGTH
        if not any(item["type"] != "reasoning" for item in self._output) and not is_cut:
            yield from self._opened("message")
        yield from self._closed("incomplete" if is_cut else "completed")
        self._tally.add(0, completion)
        self._completion = completion
        if self._remember is not None:
            self._remember(self._output)
        kind = "response.incomplete" if is_cut else "response.completed"
        yield self._event(kind, response=self.reply())

    def failed(self, failure: Failure) -> bytes:
        told = {"code": failure.code, "message": failure.message, "param": failure.param}
        error = {"code": "server_error" if failure.status >= 500 else failure.code, "message": failure.message}
        response = self.reply() | {"status": "failed", "error": error}
        events = [self._event("error", **told), self._event("response.failed", response=response)]
        return b"".join(named_event(event["type"], event) for event in events)

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
            "input_tokens_details": {"cached_tokens": self._tally.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._tally.num_reasoning_tokens},
            "total_tokens": usage["total_tokens"],
        }

    def _opened(self, kind: str, **fields: Any) -> Iterator[dict[str, Any]]:
        """An open item of that kind: the present one, or a new one."""
        if self._open is not None and self._open["type"] == kind:
            return
        yield from self._closed("completed")
        item: dict[str, Any] = {"id": _new_id(_PREFIXES[kind]), "type": kind, "status": "in_progress", **fields}
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
            yield self._event("response.content_part.added", **self._place(item), part=part)

    def _extended(self, kind: str, text: str, logprobs: list[Any] | None = None) -> Iterator[dict[str, Any]]:
        item = self._open
        assert item is not None, "opened before"
        (part,) = item["content"]
        part["text"] += text
        extra = {} if logprobs is None else {"logprobs": logprobs}
        if logprobs:
            part["logprobs"] = [*part["logprobs"], *logprobs]
        yield self._event(f"{kind}.delta", **self._place(item), delta=text, **extra)

    def _closed(self, status: str) -> Iterator[dict[str, Any]]:
        """No open item."""
        item, self._open = self._open, None
        if item is None:
            return
        item["status"] = status
        if item["type"] == "function_call":
            told = {"arguments": item["arguments"], "name": item["name"]}
            yield self._event("response.function_call_arguments.done", **self._place(item, None), **told)
        else:
            (part,) = item["content"]
            is_message = item["type"] == "message"
            extra = {"logprobs": part["logprobs"]} if is_message else {}
            kind = "response.output_text.done" if is_message else "response.reasoning_text.done"
            yield self._event(kind, **self._place(item), text=part["text"], **extra)
            yield self._event("response.content_part.done", **self._place(item), part=part)
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)

    def _place(self, item: dict[str, Any], content_index: int | None = 0) -> dict[str, Any]:
        place = {"item_id": item["id"], "output_index": len(self._output) - 1}
        return place if content_index is None else place | {"content_index": content_index}

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **fields}


_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
_NEW_PARTS: dict[str, dict[str, Any]] = {
    "message": {"type": "output_text", "text": "", "annotations": [], "logprobs": []},
    "reasoning": {"type": "reasoning_text", "text": ""},
}


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def _echoed(body: ResponsesRequest) -> dict[str, Any]:
    """What a response repeats of its request, with our defaults."""
    given = body.model_dump(by_alias=True, exclude_none=True, include=_ECHOED)
    tools = [{"strict": False, "description": None, **tool} for tool in given.pop("tools", [])]
    form = given.pop("text", {})
    return {
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
        **given,
        "tools": tools,
        "text": {"format": {"type": "text"}, **form},
    }


_ECHOED = {
    *(
        "instructions",
        "max_output_tokens",
        "metadata",
        "parallel_tool_calls",
        "reasoning",
        "service_tier",
        "temperature",
    ),
    *("tool_choice", "top_p", "top_logprobs", "truncation", "user", "tools", "text"),
}
