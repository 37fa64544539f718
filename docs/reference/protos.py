"""docs/api-grpc.md: every service, message and field of the wire contract, with the comments of the protos."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from grpc_tools import protoc

from docs.reference.markdown import code, page, table

PROTOS = Path(__file__).parents[2] / "protos"
_MESSAGES, _ENUMS, _SERVICES = 4, 5, 6  # field numbers in FileDescriptorProto, which paths of comments are made of
_INTRODUCTION = """\
Clients speak `GenerationService` to the gateway; the gateway speaks `DraftService` and `VerifyService` to the other
roles. Every server has `grpc.health.v1` and, unless `--reflection false`, reflection: `grpcurl -plaintext
127.0.0.1:50051 list`. Python stubs are in `easyspec.v1`; for other languages compile `protos/easyspec/v1/*.proto`.
Errors carry an ErrorInfo with a reason of the table in [errors.py](../easyspec/rpc/errors.py)."""

Comments = dict[tuple[int, ...], str]


def grpc_page() -> str:
    parts = [part for file in _files() for part in _file(file)]
    return page("gRPC API reference", "the protos", _INTRODUCTION, *parts)


def _files() -> list[FileDescriptorProto]:
    names = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    with tempfile.NamedTemporaryFile() as output:
        arguments = [f"-I{PROTOS}", f"--descriptor_set_out={output.name}", "--include_source_info", *names]
        if protoc.main(["protoc", *arguments]) != 0:
            raise RuntimeError("protoc could not read the protos: see its message above")
        files = FileDescriptorSet.FromString(Path(output.name).read_bytes()).file
    return [file for file in files if file.name in names]


def _file(file: FileDescriptorProto) -> Iterator[str]:
    comments: Comments = {
        tuple(place.path): " ".join(place.leading_comments.split()) for place in file.source_code_info.location
    }
    yield f"## {file.name}"
    for index, service in enumerate(file.service):
        yield f"### {service.name}"
        yield comments.get((_SERVICES, index), "")
        yield table(
            ("method", "takes", "returns", "what"),
            [
                (
                    code(method.name),
                    _streamed(method.client_streaming, method.input_type),
                    _streamed(method.server_streaming, method.output_type),
                    comments.get((_SERVICES, index, 2, number), ""),
                )
                for number, method in enumerate(service.method)
            ],
        )
    for index, message in enumerate(file.message_type):
        yield from _message(message, message.name, (_MESSAGES, index), comments)
    for index, enum in enumerate(file.enum_type):
        yield from _enum(enum, enum.name, (_ENUMS, index), comments)


def _message(message: DescriptorProto, name: str, path: tuple[int, ...], comments: Comments) -> Iterator[str]:
    if message.options.map_entry:
        return
    yield f"### {name}"
    yield comments.get(path, "")
    rows = [
        (code(field.name), _type(field, message), str(field.number), comments.get((*path, 2, index), ""))
        for index, field in enumerate(message.field)
    ]
    if rows:
        yield table(("field", "type", "number", "what"), rows)
    for index, nested in enumerate(message.nested_type):
        yield from _message(nested, f"{name}.{nested.name}", (*path, 3, index), comments)
    for index, enum in enumerate(message.enum_type):
        yield from _enum(enum, f"{name}.{enum.name}", (*path, 4, index), comments)


def _enum(enum: EnumDescriptorProto, name: str, path: tuple[int, ...], comments: Comments) -> Iterator[str]:
    yield f"### {name}"
    yield comments.get(path, "")
    yield table(
        ("value", "number", "what"),
        [
            (code(value.name), str(value.number), comments.get((*path, 2, index), ""))
            for index, value in enumerate(enum.value)
        ],
    )


def _type(field: FieldDescriptorProto, message: DescriptorProto) -> str:
    entry = next((nested for nested in message.nested_type if field.type_name.endswith(f".{nested.name}")), None)
    if entry is not None and entry.options.map_entry:
        return f"map of {_type(entry.field[0], entry)} to {_type(entry.field[1], entry)}"
    name = _link(field.type_name) if field.type_name else FieldDescriptorProto.Type.Name(field.type)[5:].lower()
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"list of {name}"
    if field.proto3_optional:
        return f"optional {name}"
    if field.HasField("oneof_index"):
        return f"{name}, one of {code(message.oneof_decl[field.oneof_index].name)}"
    return name


def _streamed(is_stream: bool, type_name: str) -> str:
    return f"stream of {_link(type_name)}" if is_stream else _link(type_name)


def _link(type_name: str) -> str:
    name = type_name.removeprefix(".easyspec.v1.")
    return f"[{name}](#{re.sub(r'[^a-z0-9_-]', '', name.lower())})"
