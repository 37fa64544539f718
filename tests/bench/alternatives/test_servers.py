"""Other servers, played by one that streams what it is told to: requests, answers and the decode phase."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from bench.alternatives.servers import ServerGeneration
from bench.alternatives.timed_completion import Answer, Maker
from bench.harness.streams import Speculation, Task
from easyspec.errors import ConfigurationError, UnavailableError

TASK = Task("abc", 3, 0.8, 5, Speculation.OFF)
PAUSE_S = 0.05


class FakeServer:
    """Streams `events`, pausing before each but the first, and keeps what it was asked."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.requests: list[tuple[str, dict[str, Any]]] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(json.dumps({"data": [{"id": "large"}]}).encode() if self.path == "/v1/models" else None)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                fake.requests.append((self.path, json.loads(body)))
                self.answer(b"" if fake.events else None)
                for number, event in enumerate(fake.events):
                    time.sleep(PAUSE_S if number else 0.0)
                    self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                    self.wfile.flush()
                self.wfile.write(b"data: [DONE]\n\n")

            def answer(self, body: bytes | None) -> None:
                self.send_response(200 if body is not None else 503)
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    thread = threading.Thread(target=server.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.server.shutdown()
    server.server.server_close()
    thread.join()


async def complete(argument: str) -> Answer:
    return await ServerGeneration.named(argument, lambda prompt: [ord(each) for each in prompt], 10.0).complete(TASK)


def assert_decode_phase(answer: Answer, num_tokens: int, num_pauses: int) -> None:
    assert answer.decode is not None
    assert answer.decode.num_tokens == num_tokens
    # A busy machine reads the first piece late: the phase is then shorter.
    assert 0.3 * num_pauses * PAUSE_S <= answer.decode.elapsed_s < num_pauses * PAUSE_S + 1.0


async def test_llama_cpp_is_asked_for_exactly_so_many_tokens_without_its_cache(fake: FakeServer) -> None:
    fake.events = [
        {"content": "x", "tokens": [7], "stop": False},
        {"content": "yz", "tokens": [8, 9], "stop": False},
        {"content": "", "tokens": [], "stop": True, "tokens_predicted": 3},
    ]
    answer = await complete(f"llama.cpp/draft={fake.address}/completion")
    assert (answer.content, answer.num_tokens) == ((7, 8, 9), 3)
    assert_decode_phase(answer, num_tokens=2, num_pauses=1)
    ((path, request),) = fake.requests
    assert path == "/completion"
    assert request["prompt"] == [97, 98, 99]
    assert (request["n_predict"], request["ignore_eos"], request["cache_prompt"]) == (3, True, False)
    assert (request["temperature"], request["seed"], request["top_k"], request["min_p"]) == (0.8, 5, 0, 0.0)


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/completions"])
async def test_an_openai_server_is_asked_for_its_first_model_and_told_apart_by_its_usage(
    fake: FakeServer, path: str
) -> None:
    fake.events = [
        {"choices": [{"text": "x"}]},
        {"choices": [{"text": "y"}]},
        {"choices": [{"text": "z"}], "usage": None},
        {"choices": [], "usage": {"completion_tokens": 3}},
    ]
    answer = await complete(f"vLLM={fake.address}{path}")
    assert (answer.content, answer.num_tokens) == ("xyz", 3)
    assert_decode_phase(answer, num_tokens=2, num_pauses=2)
    ((path, request),) = fake.requests
    assert path == "/v1/completions"
    assert (request["model"], request["max_tokens"], request["ignore_eos"]) == ("large", 3, True)


async def test_too_few_tokens_are_no_completion(fake: FakeServer) -> None:
    fake.events = [{"content": "x", "tokens": [7], "stop": False}, {"stop": True, "tokens_predicted": 1}]
    with pytest.raises(UnavailableError, match=r"llama.cpp, plain made 1 tokens, not 3.*ignore_eos"):
        await complete(f"llama.cpp={fake.address}/completion")


async def test_a_server_that_refuses_or_is_not_there_is_named(fake: FakeServer) -> None:
    with pytest.raises(UnavailableError, match=r"llama.cpp, plain did not complete.*503"):
        await complete(f"llama.cpp={fake.address}/completion")
    with pytest.raises(UnavailableError, match=r"vLLM, plain did not complete"):
        await complete("vLLM=http://127.0.0.1:1")


@pytest.mark.parametrize(
    "argument", ["http://127.0.0.1:1", "=http://127.0.0.1:1", "x=127.0.0.1:1", "x=ftp://127.0.0.1"]
)
def test_an_argument_that_names_no_server_is_a_mistake_of_the_caller(argument: str) -> None:
    with pytest.raises(ConfigurationError, match="allowed: "):
        ServerGeneration.named(argument, lambda prompt: [], 1.0)


def test_a_name_says_program_and_way() -> None:
    server = ServerGeneration.named("llama.cpp/ngram=http://127.0.0.1:1/completion", lambda prompt: [], 1.0)
    assert server.maker == Maker("llama.cpp", "ngram")
