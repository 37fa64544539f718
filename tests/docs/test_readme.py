"""The documents keep their promises: length, commands, links, and the client snippet runs."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from tests.fakes.scripted_gateway import serve_scripted_gateway

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs" / "decisions").glob("*.md"))]


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


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target


def test_paths_of_the_code_map_exist() -> None:
    code_map = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").split("## Code map")[1].split("## ")[0]
    for row in re.findall(r"^\| (`.*?) \|", code_map, re.MULTILINE):
        for path in re.findall(r"`([^`]+)`", row):
            assert (ROOT / path).exists(), path


async def test_the_python_snippet_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    async with serve_scripted_gateway([[1], [2, 3]]) as (gateway, address):
        await asyncio.to_thread(exec, snippet.replace("127.0.0.1:50051", address), {})
    (request,) = gateway.requests
    assert request.text == "def fibonacci(n):"
    assert (request.sampling.seed, request.stop.max_tokens) == (7, 64)
    assert "num_accepted_by_level: 2" in capsys.readouterr().out


def _code(markdown: str) -> str:
    """Fenced blocks and `inline code`, where a command is a command and not a word."""
    return "\n".join([*re.findall(r"```.*?```", markdown, re.DOTALL), *re.findall(r"`[^`\n]+`", markdown)])
