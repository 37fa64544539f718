"""Other inference servers: llama.cpp's `/completion`, and `/v1/completions` as OpenAI defines it.

Prompts are sent as token ids: every server reads the same. The prompt cache is off where a request can say so.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any, Self
from urllib.parse import urlsplit

from bench.alternatives.timed_completion import Answer, DecodePhase, Maker
from bench.harness.streams import Task
from easyspec.errors import ConfigurationError, UnavailableError

_LLAMA_CPP_PATH = "/completion"
_OPENAI_PATH = "/completions"


Encoder = Callable[[str], Sequence[int]]  # a prompt's token ids


class ServerGeneration:
    """One server at `url`; a path that ends in /completion is llama.cpp's, any other an OpenAI API's base URL."""

    def __init__(self, maker: Maker, url: str, encode: Encoder, timeout_s: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigurationError(f"the address of {maker} is {url!r}; allowed: http://HOST:PORT or https://HOST")
        self.maker = maker
        self._is_llama_cpp = parts.path.endswith(_LLAMA_CPP_PATH)
        self._path = parts.path
        if not self._is_llama_cpp:
            self._path = parts.path.removesuffix(_OPENAI_PATH).rstrip("/") or "/v1"
        self._host, self._port, self._timeout_s = parts.hostname, parts.port, timeout_s
        self._connection = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._encode = encode
        self._model: str | None = None

    @classmethod
    def named(cls, argument: str, encode: Encoder, timeout_s: float) -> Self:
        """Of NAME=URL, where NAME is a program or PROGRAM/WAY; raises ConfigurationError."""
        name, separator, url = argument.partition("=")
        program, _, way = name.partition("/")
        if not separator or not program:
            raise ConfigurationError(f"--server is {argument!r}; allowed: NAME=URL or PROGRAM/WAY=URL")
        return cls(Maker(program, way) if way else Maker(program), url, encode, timeout_s)

    async def complete(self, task: Task) -> Answer:
        """Exactly `task.max_tokens` new tokens; raises UnavailableError if the server fails or makes fewer."""
        try:
            return await asyncio.to_thread(self._complete, task)
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            raise UnavailableError(f"{self.maker} did not complete a request: {error!r}") from error

    def _complete(self, task: Task) -> Answer:
        sampling = {"temperature": task.temperature, "seed": task.seed, "top_p": 1.0, "min_p": 0.0}
        request = {"prompt": list(self._encode(task.prompt)), **sampling, "ignore_eos": True, "stream": True}
        if self._is_llama_cpp:
            request |= {"n_predict": task.max_tokens, "cache_prompt": False, "return_tokens": True, "top_k": 0}
            return self._answer(task, self._stream(self._path, request), _llama_cpp_part)
        if self._model is None:
            with self._asked("GET", f"{self._path}/models") as response:
                self._model = json.loads(response.read())["data"][0]["id"]
        usage = {"stream_options": {"include_usage": True}}
        request |= {"model": self._model, "max_tokens": task.max_tokens, **usage, "top_k": -1}
        return self._answer(task, self._stream(self._path + _OPENAI_PATH, request), _openai_part)

    def _answer(self, task: Task, events: Iterator[tuple[float, Any]], part_of: Any) -> Answer:
        text, token_ids, arrivals, num_tokens = "", [], [], None
        for at_s, event in events:
            part, part_ids, total = part_of(event)
            text += part
            token_ids += part_ids
            num_tokens = total if total is not None else num_tokens
            if part or part_ids:
                arrivals.append((at_s, len(part_ids)))
        if num_tokens != task.max_tokens:
            told = "an unknown number of" if num_tokens is None else num_tokens
            raise UnavailableError(f"{self.maker} made {told} tokens, not {task.max_tokens}: does it know ignore_eos?")
        if len(token_ids) == num_tokens:
            return Answer(tuple(token_ids), num_tokens, DecodePhase.of_arrivals(arrivals))
        # Which message brought how many tokens is not known; the first brings one nearly everywhere.
        counted = [(at_s, 1 if i == 0 else 0) for i, (at_s, _) in enumerate(arrivals)]
        decode = DecodePhase.of_arrivals(counted)
        return Answer(text, num_tokens, None if decode is None else DecodePhase(num_tokens - 1, decode.elapsed_s))

    @contextmanager
    def _asked(self, *request: Any) -> Iterator[http.client.HTTPResponse]:
        with closing(self._connection(self._host, self._port, timeout=self._timeout_s)) as connection:
            connection.request(*request)
            response = connection.getresponse()
            if response.status != 200:
                raise ValueError(f"HTTP {response.status}: {response.read(500).decode(errors='replace')}")
            yield response

    def _stream(self, path: str, request: Mapping[str, Any]) -> Iterator[tuple[float, Any]]:
        """Server-sent events as they arrive, each with the time."""
        with self._asked("POST", path, json.dumps(request), {"Content-Type": "application/json"}) as response:
            for line in response:
                data = line.removeprefix(b"data:").strip()
                if line.startswith(b"data:") and data != b"[DONE]":
                    yield time.perf_counter(), json.loads(data)


def _llama_cpp_part(event: Any) -> tuple[str, list[int], int | None]:
    """Text, token ids and, at the end, how many tokens there were."""
    if event.get("stop"):
        return "", [], event["tokens_predicted"]
    return event["content"], event.get("tokens", []), None


def _openai_part(event: Any) -> tuple[str, list[int], int | None]:
    usage = event.get("usage")
    text = "".join(choice.get("text") or "" for choice in event["choices"])
    return text, [], None if usage is None else usage["completion_tokens"]
