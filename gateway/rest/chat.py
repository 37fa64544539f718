"""`/v1/chat/completions`: a conversation to answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from gateway.messages.chunk import GenerationChunk
from gateway.messages.progress import Progress
from gateway.rest.answering import Generated, answered
from gateway.rest.backend import Caller, InCaller
from gateway.rest.chat_request import ChatRequest
from gateway.rest.json_route import JsonRoute
from gateway.rest.logprobs import LogprobFormat, TokenEntry
from gateway.rest.reply import EventWriter, ReplyHead, Tally, schema_fields, trace_fields
from gateway.rest.sse import DONE, openai_last_words
from gateway.text.tool_parser import joined

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatRequest, caller: InCaller, request: Request) -> Response:
    """Answer a conversation."""
    body.check_stream_options()
    body.check_prompt_logprobs(body.stream)
    return await answered(body, request, _Answer(body, caller.for_model(body.model)))


class _Answer:
    """The answer to one request, as a stream or as a whole."""

    failed = staticmethod(openai_last_words)

    def __init__(self, body: ChatRequest, caller: Caller) -> None:
        generated, progress = Generated(body, caller), Progress()
        self._body = body
        self._chunks = generated.chunks(body.prompt(), body.most_tokens, progress)
        self.progress = (progress,)
        self._model = caller.model.name
        self._format = LogprobFormat(caller.generator.tokenizer, body.num_top_logprobs)
        self._prompt_format = LogprobFormat(caller.generator.tokenizer, body.num_prompt_logprobs)
        self._tracks = body.logprob_tracks(caller.generator.tokenizer, body.num_choices) if body.logprobs else []
        self._tally = Tally(body.reported(generated.sampling))

    async def events(self) -> AsyncGenerator[bytes, None]:
        body = self._body
        writer = EventWriter(ReplyHead.new("chatcmpl", "chat.completion.chunk", self._model), body.includes_usage)
        begun: set[int] = set()
        async with aclosing(self._chunks) as chunks:
            async for chunk in chunks:
                index = chunk.choice_index
                self._tally.round(0, self.progress[0].num_prompt_tokens, len(chunk.token_ids))
                usage = self._tally.usage_so_far if body.tells_usage_so_far else None
                deltas: list[bytes] = []
                if index not in begun:
                    begun.add(index)
                    deltas.append(writer.choice(_delta(index, {"role": "assistant", "content": ""}), usage=usage))
                entries = self._entries(chunk)
                trace = trace_fields(chunk)
                if chunk.reasoning:
                    deltas.append(writer.choice(_delta(index, {"reasoning_content": chunk.reasoning}), usage=usage))
                if chunk.text or entries or trace:
                    logprobs = self._format.chat(entries) if entries else None
                    deltas.append(writer.choice(_delta(index, {"content": chunk.text}, logprobs), trace, usage))
                # Some clients read no more than the first call of a delta.
                for call in joined(chunk.tool_calls):
                    told: dict[str, Any] = {"index": call.index, "function": {"arguments": call.arguments}}
                    if call.id is not None:
                        told |= {"id": call.id, "type": "function"}
                        told["function"] = {"name": call.name, "arguments": call.arguments}
                    deltas.append(writer.choice(_delta(index, {"tool_calls": [told]}), usage=usage))
                if chunk.completion is not None:
                    self._tally.add(0, chunk.completion)
                    reason = chunk.completion.finish_reason.value
                    last = _delta(index, {}, finish_reason=reason) | schema_fields(chunk.completion)
                    deltas.append(writer.choice(last, usage=usage))
                if deltas:
                    yield b"".join(deltas)
        if body.includes_usage:
            yield writer.usage(self._tally.usage, self._tally.metrics)
        yield DONE

    async def collected(self) -> dict[str, Any]:
        choices = [_Choice(index) for index in range(self._body.num_choices)]
        awaits_prompt = [self._body.num_prompt_logprobs is not None] * len(choices)
        prompt_fields: dict[str, Any] = {}
        async with aclosing(self._chunks) as chunks:
            async for chunk in chunks:
                if awaits_prompt[chunk.choice_index]:
                    awaits_prompt[chunk.choice_index] = False
                    prompt_fields = prompt_fields or {"prompt_logprobs": self._prompt_format.prompt(chunk)}
                    continue
                choices[chunk.choice_index].add(chunk, self._entries(chunk))
                if chunk.completion is not None:
                    self._tally.add(0, chunk.completion)
        head = ReplyHead.new("chatcmpl", "chat.completion", self._model)
        rendered = [choice.body(self._format if self._body.logprobs else None) for choice in choices]
        return head.body(choices=rendered, usage=self._tally.usage, metrics=self._tally.metrics, **prompt_fields)

    def _entries(self, chunk: GenerationChunk) -> Sequence[TokenEntry]:
        return self._tracks[chunk.choice_index].push(chunk) if self._tracks else ()


class _Choice:
    """One choice of a reply that is sent as a whole."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._entries: list[TokenEntry] = []
        self._finish_reason: str | None = None
        self._schema_fields: dict[str, Any] = {}

    def add(self, chunk: GenerationChunk, entries: Sequence[TokenEntry]) -> None:
        self._texts.append(chunk.text)
        self._thoughts.append(chunk.reasoning)
        self._entries.extend(entries)
        for call in chunk.tool_calls:
            if call.index == len(self._calls):
                function = {"name": call.name, "arguments": ""}
                self._calls.append({"id": call.id, "type": "function", "function": function})
            self._calls[call.index]["function"]["arguments"] += call.arguments
        if chunk.completion is not None:
            self._finish_reason = chunk.completion.finish_reason.value
            self._schema_fields = schema_fields(chunk.completion)

    def body(self, form: LogprobFormat | None) -> dict[str, Any]:
        text = "".join(self._texts)
        content = None if self._calls and not text else text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if thoughts := "".join(self._thoughts):
            message["reasoning_content"] = thoughts
        if self._calls:
            message["tool_calls"] = self._calls
        logprobs = form.chat(self._entries) if form is not None else None
        return {
            "index": self._index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": self._finish_reason,
            **self._schema_fields,
        }


def _delta(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
