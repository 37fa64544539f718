"""Imports run one way: services -> easyspec -> torch. Read from the source, nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SERVICES = ("drafter_service", "verifier_service", "gateway")
PACKAGES = (*SERVICES, "easyspec", "bench")
WIRE_NAMES = ("server.py", "clients.py")
# Which rooms of the gateway each of them may import: docs/decisions/0031-gateway-rooms.md.
_BELOW_GENERATION = {"decode_loop", "doorway", "messages", "peers", "speculation", "telemetry", "text"}
GATEWAY_ROOMS = {
    "decode_loop": set(),
    "text": set(),
    "doorway": set(),
    "messages": {"decode_loop", "text"},
    "peers": {"decode_loop", "messages"},
    "speculation": {"decode_loop"},
    "telemetry": {"messages"},
    "generation": _BELOW_GENERATION,
    "rest": {"generation", "messages", "telemetry", "text"},
    "service": {"doorway", "generation", "messages", "peers", "rest", "telemetry", "text"},
    "__main__": {"service"},
}


def modules() -> list[Path]:
    found = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return [path for path in found if path.parts[:2] != ("easyspec", "v1")]


def imports_of(tree: ast.AST, package: tuple[str, ...]) -> Iterator[str]:
    """Every module that the source imports, at any depth, as an absolute dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def is_wire(path: Path) -> bool:
    return path.name in WIRE_NAMES or path.parts[:2] == ("easyspec", "rpc")


def violations(path: Path, source: str) -> list[str]:
    """What the module at `path` imports against the rules."""
    imported = set(imports_of(ast.parse(source), path.parts[:-1]))
    own = path.parts[0]
    forbidden: list[str] = []
    if own == "easyspec":
        forbidden += SERVICES if path.parts[1] == "cli" else (*SERVICES, "bench")
    if own in SERVICES:
        forbidden += [*(service for service in SERVICES if service != own), "bench", "easyspec.cli"]
    if path.parts[:2] in (("easyspec", "model"), ("easyspec", "speculation")):
        forbidden += ["easyspec.rpc"]
    if is_wire(path):
        forbidden += ["torch"]
    else:
        forbidden += ["grpc", "grpc_health", "grpc_reflection", "grpc_status", "easyspec.v1"]
    return sorted(name for name in imported if any(is_in(name, package) for package in forbidden))


@pytest.mark.parametrize("path", modules(), ids=str)
def test_imports_run_one_way(path: Path) -> None:
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


def rooms_of_gateway(path: Path, source: str) -> set[str]:
    """The other rooms of the gateway that the module at `path` imports."""
    imported = {tuple(name.split(".")) for name in imports_of(ast.parse(source), path.parts[:-1])}
    rooms = {name[1] for name in imported if name[0] == "gateway" and len(name) > 1}
    return rooms - {Path(path.parts[1]).stem}


def modules_of_gateway() -> list[Path]:
    return [path for path in modules() if path.parts[0] == "gateway" and path.name != "__init__.py"]


@pytest.mark.parametrize("path", modules_of_gateway(), ids=str)
def test_rooms_of_the_gateway_import_what_is_below(path: Path) -> None:
    found = rooms_of_gateway(path, (ROOT / path).read_text(encoding="utf-8"))
    assert found <= GATEWAY_ROOMS[Path(path.parts[1]).stem]


def test_the_rooms_of_the_gateway_are_these() -> None:
    """None stands empty, and none imports less than it may."""
    found: dict[str, set[str]] = {}
    for path in modules_of_gateway():
        rooms = rooms_of_gateway(path, (ROOT / path).read_text(encoding="utf-8"))
        found.setdefault(Path(path.parts[1]).stem, set()).update(rooms)
    assert found == GATEWAY_ROOMS


@pytest.mark.parametrize("path", [path for path in modules() if path.parts[:2] == ("easyspec", "cli")], ids=str)
def test_the_command_imports_bench_only_when_it_runs_it(path: Path) -> None:
    source = (ROOT / path).read_text(encoding="utf-8")
    at_import = ast.Module([node for node in ast.parse(source).body if not isinstance(node, ast.FunctionDef)], [])
    assert not [name for name in imports_of(at_import, path.parts[:-1]) if is_in(name, "bench")]


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("gateway/decode_loop.py", "from drafter_service import server", "drafter_service"),
        ("gateway/decode_loop.py", "import grpc", "grpc"),
        ("gateway/decode_loop.py", "from easyspec.v1 import types_pb2", "easyspec.v1"),
        ("gateway/decode_loop.py", "from easyspec import v1", "easyspec.v1"),
        ("easyspec/model/decoder.py", "def f():\n    from easyspec.rpc import errors", "easyspec.rpc"),
        ("easyspec/model/decoder.py", "from ..rpc import errors", "easyspec.rpc"),
        ("easyspec/cli/main.py", "import gateway.service.server", "gateway.service.server"),
        ("easyspec/parallel/groups.py", "import bench", "bench"),
        ("verifier_service/server.py", "import torch.nn", "torch.nn"),
    ],
)
def test_a_violation_is_seen(path: str, source: str, expected: str) -> None:
    assert expected in violations(Path(path), source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("gateway/peers/clients.py", "import grpc\nfrom easyspec.v1 import types_pb2"),
        ("gateway/__main__.py", "from easyspec.rpc.lifecycle import run_role"),
        ("easyspec/cli/main.py", "from bench import decode"),
        ("drafter_service/engine.py", "import torch\nfrom drafter_service import drafter"),
        ("easyspec/model/decoder.py", "from . import rope"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert violations(Path(path), source) == []
