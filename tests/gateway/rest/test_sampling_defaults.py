"""What a checkpoint asks for stands in for what a request leaves unset, on both wires."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from easyspec.speculation.parameters import SamplingParameters
from tests.fakes.services import FakePair
from tests.gateway.gateway_client import gateway, request_of
from tests.gateway.rest.conftest import PROMPT, answered, serving_rest

ASKED = {"temperature": 0.5, "top_k": 20, "top_p": 0.75, "repetition_penalty": 1.25}


@pytest.fixture
def opinionated(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint with sampling parameters of its own."""
    folder = tmp_path / "opinionated"
    shutil.copytree(tokenizer_folder, folder)
    (folder / "generation_config.json").write_text(json.dumps(ASKED | {"do_sample": True}))
    return folder


@pytest.fixture
def seen(pair: FakePair, monkeypatch: pytest.MonkeyPatch) -> list[SamplingParameters]:
    """The sampling parameters that the verifier is given."""
    found: list[SamplingParameters] = []
    opened = pair.verifier._open

    def remember(opening: Any) -> int:
        found.append(opening.sampling)
        return opened(opening)

    monkeypatch.setattr(pair.verifier, "_open", remember)
    return found


def shown(sampling: SamplingParameters) -> dict[str, Any]:
    return {name: getattr(sampling, name) for name in ASKED}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ASKED),
        ({"temperature": 0}, ASKED | {"temperature": 0.0}),  # greedy stays greedy
        ({"top_k": -1, "top_p": 1}, ASKED | {"top_k": None, "top_p": 1.0}),
    ],
)
async def test_a_request_over_http(
    pair: FakePair, opinionated: Path, seen: list[SamplingParameters], given: dict[str, Any], expected: dict[str, Any]
) -> None:
    body = {"prompt": PROMPT, "max_tokens": 3, **given}
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, **given}
    async with serving_rest(pair, opinionated) as rest:
        replies = [
            answered(await rest.http.post("/v1/completions", json=body)),
            answered(await rest.http.post("/v1/chat/completions", json=chat)),
            answered(await rest.http.post("/v1/messages", json=chat)),
            answered(await rest.http.post("/v1/responses", json={"input": "hello", "max_output_tokens": 3, **given})),
        ]
        (card,) = answered(await rest.http.get("/v1/models"))["data"]
    assert [shown(sampling) for sampling in seen] == [expected] * 4
    assert [{name: reply["metrics"]["sampling"][name] for name in ASKED} for reply in replies] == [expected] * 4
    assert card["default_sampling"] == ASKED


async def test_a_request_over_grpc(pair: FakePair, opinionated: Path, seen: list[SamplingParameters]) -> None:
    async with gateway(pair, opinionated) as client:
        greedy = request_of(max_tokens=3, temperature=0.0)
        async for _ in client.stub.Generate(greedy, timeout=20):
            pass
        greedy.sampling.ClearField("temperature")
        async for _ in client.stub.Generate(greedy, timeout=20):
            pass
    assert [shown(sampling) for sampling in seen] == [ASKED | {"temperature": 0.0}, ASKED]


async def test_the_gateway_may_leave_them_unread(
    pair: FakePair, opinionated: Path, seen: list[SamplingParameters]
) -> None:
    async with serving_rest(pair, opinionated, generation_config="none") as rest:
        answered(await rest.http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 3}))
        (card,) = answered(await rest.http.get("/v1/models"))["data"]
    assert shown(seen[0]) == {"temperature": 1.0, "top_k": None, "top_p": 1.0, "repetition_penalty": 1.0}
    assert card["default_sampling"] == {}
