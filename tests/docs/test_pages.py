"""Pages for users name what exists: pages, headings, commands, flags and messages."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from drafter_service.config import DrafterSettings
from easyspec import __version__
from easyspec.cli.main import app
from easyspec.rpc.errors import ERROR_TABLE
from gateway.service.config import GatewaySettings
from verifier_service.config import VerifierSettings

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "decisions").glob("*.md")]
WRITTEN = [page for page in PAGES if page.parent.name != "decisions" and page.name != "benchmarks.md"]
SETTINGS = {"gateway": GatewaySettings, "drafter_service": DrafterSettings, "verifier_service": VerifierSettings}
PACKAGES = ("easyspec", "gateway", "drafter_service", "verifier_service")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text_of(page)):
        path, _, heading = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if heading and linked.suffix == ".md":
            assert heading in anchors(linked), target


def anchors(page: Path) -> set[str]:
    """The headings of a page as they are linked to."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_index_names_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", text_of(ROOT / "docs" / "README.md")))
    assert linked == {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_flags_exist(page: Path) -> None:
    for line in shell_lines(text_of(page)):
        found = re.match(r"(?:[A-Z_]+=\S+ )*(?:easyspec|\S*python -m (\w+)|torchrun .*-m (\w+)) ", line)
        if found is None:
            continue
        words = shlex.split(line[found.end() :], comments=True)
        flags = {word.partition("=")[0] for word in words if re.match(r"--\w", word)}
        module = found.group(1) or found.group(2)
        if module is None:
            assert flags <= command_flags(words), line
        elif module in SETTINGS:
            assert flags <= {f"--{name.replace('_', '-')}" for name in SETTINGS[module].model_fields}, line


def test_paths_that_contributors_are_sent_to_exist() -> None:
    paths = re.findall(r"`([\w./-]+/[\w./-]*)`", text_of(ROOT / "CONTRIBUTING.md"))
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []


def shell_lines(text: str) -> Iterator[str]:
    """Lines of shell blocks, those that a backslash continues joined."""
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        yield from block.replace("\\\n", " ").splitlines()


def command_flags(words: list[str]) -> set[str]:
    """The flags of the command that the words begin with; any flag where a benchmark parses them itself."""
    command: Any = typer.main.get_command(app)
    for word in words:
        if word.startswith("-") or not hasattr(command, "commands"):
            break
        if word not in command.commands and command.name == "bench":  # `easyspec bench MODEL`
            word = "model"
        command = command.commands[word]
    if command.context_settings.get("ignore_unknown_options"):
        return {word.partition("=")[0] for word in words}
    return {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}


def test_every_message_of_troubleshooting_is_one_of_the_code() -> None:
    tables = text_of(ROOT / "docs" / "troubleshooting.md").split("## While it runs")[0]
    rows = re.findall(r"^\| (`[^|]+) \|", tables, re.MULTILINE)
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    assert len(messages) > 30
    missing = [message for message in messages if not all(map(is_said, message.split("...")))]
    assert missing == []


def is_said(part: str) -> bool:
    return any(part.strip("; ") in literal for literal in literals())


@cache
def literals() -> list[str]:
    """Every string of the source; for an f-string what stands between its values."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    trees = [ast.parse(text_of(path)) for path in files]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_troubleshooting_tells_every_error_of_requests() -> None:
    told = text_of(ROOT / "docs" / "troubleshooting.md").split("## Errors of requests")[1]
    assert [row.reason for row in ERROR_TABLE if row.reason not in told] == []
    for row in ERROR_TABLE:
        assert re.search(rf"^\| {row.http_status}\b.*\| {row.code.name} \|.*\b{row.reason}\b", told, re.MULTILINE), row


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_pages_call_processes_and_requests_by_their_names(page: Path) -> None:
    found = re.findall(
        r"\b(?:some|no|any|every)body\b|\bwhoever\b|\bwhom\b|\bthose that\b", text_of(page), re.IGNORECASE
    )
    assert found == []


def test_the_changelog_begins_with_the_version() -> None:
    project = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]
    (first, *_) = re.findall(r"^## \[(.+?)\]", text_of(ROOT / "CHANGELOG.md"), re.MULTILINE)
    assert first == project["version"] == __version__
