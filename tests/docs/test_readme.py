"""The README keeps its promises: length, targets, and the client snippets run."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from gateway.text.tokenizer import Tokenizer
from tests.fakes.scripted_gateway import serve_scripted_gateway
from tests.fakes.services import TOY_TEXT, ToyLanguage, running_pair
from tests.fakes.tiny_tokenizer import write_tokenizer
from tests.gateway.rest.conftest import serving_rest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["README.md", "ARCHITECTURE.md"])
def test_the_two_entry_documents_stay_short(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 150


def test_every_make_target_the_readme_names_exists_and_is_listed() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    listed = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", _code((ROOT / "README.md").read_text(encoding="utf-8"))))
    assert {"run", "serve", "check", "test"} <= named
    assert named <= listed


def test_ci_runs_commands_that_the_readme_names() -> None:
    commands = re.findall(r"^make [a-z-]+$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(commands) == 3
    assert all(command in readme for command in commands)


def test_paths_of_the_code_map_exist() -> None:
    code_map = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").split("## Code map")[1].split("## ")[0]
    for row in re.findall(r"^\| (`.*?) \|", code_map, re.MULTILINE):
        for path in re.findall(r"`([^`]+)`", row):
            assert (ROOT / path).exists(), path


def _python_snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


async def test_the_openai_snippet_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = [snippet for snippet in _python_snippets() if "openai" in snippet]
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path))
    language = ToyLanguage(tokenizer.encode(TOY_TEXT), vocab_size=352, fingerprint=tokenizer.fingerprint)
    async with running_pair(language) as pair, serving_rest(pair, tmp_path) as rest:
        snippet = snippet.replace("http://127.0.0.1:8000", rest.base_url).replace('model="smollm2"', 'model="toy-base"')
        await asyncio.to_thread(exec, snippet, {})
    assert len(capsys.readouterr().out) > 10


async def test_the_grpc_snippet_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = [snippet for snippet in _python_snippets() if "grpc" in snippet]
    async with serve_scripted_gateway([[1], [2, 3]]) as (gateway, address):
        await asyncio.to_thread(exec, snippet.replace("127.0.0.1:50051", address), {})
    (request,) = gateway.requests
    assert request.text == "def fibonacci(n):"
    assert (request.sampling.seed, request.stop.max_tokens) == (7, 64)
    assert "num_accepted_by_level: 2" in capsys.readouterr().out


def _code(markdown: str) -> str:
    """Fenced blocks and `inline code`, where a command is a command and not a word."""
    return "\n".join([*re.findall(r"```.*?```", markdown, re.DOTALL), *re.findall(r"`[^`\n]+`", markdown)])
