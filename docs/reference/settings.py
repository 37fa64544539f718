"""docs/configuration.md: every setting of the three roles, from the settings classes."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from docs.reference.markdown import code, page, table
from drafter_service.config import DrafterSettings
from easyspec.settings import EngineSettings, ServerSettings
from gateway.peers.model_routes import FurtherModel
from gateway.service.config import GatewaySettings
from verifier_service.config import VerifierSettings

_HEADER = ("flag and variable", "type", "default", "what")
_INTRODUCTION = """\
Every setting is a flag of its role (`--num-threads 4`) and an environment variable (`EASYSPEC_VERIFIER_NUM_THREADS=4`);
a flag wins over the variable, and the variable over the default. A setting that is wrong ends the start with exit code
2 and a line that names the setting, its value and what is allowed. `python -m gateway --help`, `python -m
drafter_service --help` and `python -m verifier_service --help` print the same.

`easyspec up` starts all three roles. It hands on the flags that `easyspec up --help` lists, and every role reads its
own variables, so that each setting below can be used with it: `EASYSPEC_GATEWAY_MAX_CHOICES=4 easyspec up MODEL`.
Ports and models that `up` chooses itself are flags, and win."""
_COMMAND_VARIABLES = (
    ("EASYSPEC_MODELS", "folder of checkpoints that `easyspec models` lists and MODEL may name"),
    ("EASYSPEC_CACHE", "folder that `easyspec fetch` writes to; unset: inside the Python environment"),
    ("EASYSPEC_API_KEY", "API key that `generate --gateway`, `chat --gateway` and `doctor --gateway` present"),
    ("EASYSPEC_TLS_CA", "PEM file with the authorities that a gateway is known by; turns TLS on in these commands"),
    ("EASYSPEC_TLS_CERTIFICATE", "PEM file with the certificate that they present"),
    ("EASYSPEC_TLS_KEY", "PEM file with its private key"),
    ("EASYSPEC_TLS_SERVER_NAME", "name in the gateway's certificate, if it is not the host it is reached by"),
    (
        "EASYSPEC_CODE_PATH",
        "kernels of the native executor: portable, avx2, avx512 or avx512_bf16. Unset: the fastest for the processor",
    ),
    ("EASYSPEC_CXXFLAGS", "further compiler flags, when the native library is built"),
)


def settings_page() -> str:
    engine = _rows(EngineSettings, "ROLE", ServerSettings)
    return page(
        "Configuration reference",
        "the settings classes",
        _INTRODUCTION,
        "## All three roles",
        "ROLE in a variable is GATEWAY, DRAFTER or VERIFIER.",
        table(_HEADER, [row for row in _rows(ServerSettings, "ROLE") if "--address" not in row[0]]),
        "## Drafter and verifier",
        "ROLE in a variable is DRAFTER or VERIFIER.",
        table(_HEADER, engine),
        *_section("Gateway", "python -m gateway", GatewaySettings, "GATEWAY", ServerSettings),
        "Keys of an entry of `--further-models`:",
        table(("key", *_HEADER[1:]), _rows(FurtherModel, "")),
        *_section("Drafter", "python -m drafter_service", DrafterSettings, "DRAFTER", EngineSettings),
        *_section("Verifier", "python -m verifier_service", VerifierSettings, "VERIFIER", EngineSettings),
        "## The `easyspec` command",
        table(("variable", "what"), [(code(name), what) for name, what in _COMMAND_VARIABLES]),
    )


def _section(
    title: str, command: str, settings: type[BaseModel], role: str, shared: type[BaseModel]
) -> tuple[str, str, str]:
    return (f"## {title}", f"`{command}`, beside the settings above.", table(_HEADER, _rows(settings, role, shared)))


def _rows(
    settings: type[BaseModel], role: str, shared: type[BaseModel] | None = None
) -> list[tuple[str, str, str, str]]:
    """A row for each field that `shared` does not have in the same form; `role` "" is for fields without a flag."""
    known: Mapping[str, FieldInfo] = shared.model_fields if shared is not None else {}
    return [
        (_names(name, role), _type(info), _default(info), " ".join((info.description or "").split()))
        for name, info in settings.model_fields.items()
        if name not in known or known[name].description != info.description
    ]


def _names(name: str, role: str) -> str:
    if not role:
        return code(name)
    return f"{code('--' + name.replace('_', '-'))} {code(f'EASYSPEC_{role}_{name.upper()}')}"


def _type(info: FieldInfo) -> str:
    return " or ".join(dict.fromkeys(_type_names(info.annotation)))


def _type_names(annotation: Any) -> Iterator[str]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _type_names(arguments[0])
    elif origin is Literal:
        yield from (code(str(value)) for value in arguments)
    elif origin in (Union, types.UnionType):
        for argument in arguments:
            yield from _type_names(argument)
    elif annotation is not types.NoneType:
        names = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path", SecretStr: "text"}
        yield "JSON" if origin is dict else names[annotation]


def _default(info: FieldInfo) -> str:
    if info.default_factory is not None:
        return "see what" if info.default_factory is not dict else "none"
    if info.default is PydanticUndefined:
        return "**required**"
    if info.default is None or info.default == "":
        return "unset"
    return code(str(info.default).lower() if isinstance(info.default, bool) else str(info.default))
