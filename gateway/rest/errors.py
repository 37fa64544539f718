"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog
from fastapi.responses import Response

from easyspec.errors import InvalidRequestError
from easyspec.rpc.errors import INTERNAL, mapping_of, public_message, retry_hint_s

# The client has gone; for logs and metrics: nginx's status.
CLIENT_CLOSED_REQUEST = 499
_MAX_MESSAGE_CHARS = 600
_ItemT = TypeVar("_ItemT")
_ANTHROPIC_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
# Of the reasons that are called otherwise here.
_CODES: Mapping[str, str] = {
    "INVALID_REQUEST": "invalid_value",
    "UNSUPPORTED_FIELD": "unsupported_parameter",
    "PROMPT_TOO_LONG": "context_length_exceeded",
    "UNAUTHENTICATED": "invalid_api_key",
    "UNKNOWN_MODEL": "model_not_found",
    "CAPACITY": "rate_limit_exceeded",
    "UNAVAILABLE": "service_unavailable",
    "DEADLINE": "timeout",
}
# What a pydantic error type means to a client; everything else is a value that is not allowed.
_VALIDATION_CODES: Mapping[str, str] = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "unsupported_parameter": "unsupported_parameter",
    "json_invalid": "invalid_json",
}
# Problems within an object of the right kind, where a union could also have been something else.
_INSIDE = frozenset({"extra_forbidden", "missing", "literal_error"})
# What pydantic puts into the path of a problem to tell the types of a union apart.
_UNION_MEMBERS = frozenset({"str", "int", "float", "bool", "none", "constrained-str", "constrained-int"})
# How the gateway's own names of fields read on this wire, by prefix; the first that fits counts.
_PARAMS = (
    ("sampling.logit_bias token id", "logit_bias"),
    ("sampling.", ""),
    ("stop.", ""),
    ("stop_strings", "stop"),
    ("prompt.chat.", ""),
    ("prompt.text", "prompt"),
    ("prompt.token_ids", "prompt"),
    ("prompt_token_ids", "prompt"),
    ("speculation.layer_plan.", "speculation."),
    ("budget.num_levels", "speculation.max_levels"),
    ("budget.num_nodes", "speculation.max_nodes"),
    ("budget.", "speculation."),
    ("num_choices", "n"),
    ("num_top_logprobs", "top_logprobs"),
)


class ClientGoneError(Exception):
    """The client closed the connection."""


@dataclass(frozen=True)
class Failure:
    """An error as the client sees it; `param` is the field's name on this wire."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None

    @property
    def body(self) -> dict[str, Any]:
        return {"error": self._error({429: "rate_limit_error"}, "server_error")}

    @property
    def anthropic_body(self) -> dict[str, Any]:
        """The same as clients of `/v1/messages` expect it."""
        return {"type": "error", "error": self._error(_ANTHROPIC_TYPES, "api_error")}

    def _error(self, types: Mapping[int, str], ours: str) -> dict[str, Any]:
        kind = types.get(self.status, ours if self.status >= 500 else "invalid_request_error")
        return {"message": self.message[:_MAX_MESSAGE_CHARS], "type": kind, "param": self.param, "code": self.code}

    def response_to(self, path: str) -> Response:
        """The error as clients of that path expect it."""
        headers: dict[str, str] = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
            headers["retry-after-ms"] = str(max(1, round(self.retry_after_s * 1000)))  # OpenAI's clients read it first
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        body = self.anthropic_body if path.startswith("/v1/messages") else self.body
        return Response(json_bytes(body), self.status, headers, media_type="application/json")


class RefusalError(Exception):
    """A request that gets `failure` for an answer; `is_closing` if the connection cannot be used any further."""

    def __init__(self, failure: Failure, is_closing: bool = False) -> None:
        super().__init__(failure.message)
        self.failure = failure
        self.is_closing = is_closing


def json_bytes(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", errors="replace")


def request_id() -> str:
    """The id of the request that is being answered."""
    return str(structlog.contextvars.get_contextvars().get("request_id", ""))


def failure_of(error: BaseException) -> Failure:
    """What a client learns of `error`; of a bug of ours nothing but the request id."""
    row = mapping_of(error)
    if row is INTERNAL:
        return Failure(500, f"internal error; request id {request_id()}", code="internal_error")
    code = _CODES.get(row.reason, row.reason.lower())
    if isinstance(error, InvalidRequestError):
        param = param_of(error.field)
        return Failure(row.http_status, f"{param}{str(error).removeprefix(error.field)}", param, code)
    message, named = public_message(error), "model" if code == "model_not_found" else None
    return Failure(row.http_status, message, named, code, retry_hint_s(error))


def param_of(field: str) -> str:
    """The gateway's name of a field as it is called on this wire."""
    for prefix, replacement in _PARAMS:
        if field.startswith(prefix):
            return replacement + field.removeprefix(prefix)
    return field


async def with_names(chunks: AsyncGenerator[_ItemT, None], names: Mapping[str, str]) -> AsyncGenerator[_ItemT, None]:
    """The same chunks; an InvalidRequestError about a field of `names` bears the name there, which the client sent.
    All kinds of grammars go by one name."""
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk
    except InvalidRequestError as error:
        whole, bracket, index = error.field.partition("[")
        name = names.get("sampling.grammar" if whole.startswith("sampling.grammar.") else whole)
        if name is None:
            raise
        raise type(error)(name + bracket + index, error.value, error.allowed) from error


def failure_of_validation(problems: Sequence[Any]) -> Failure:
    """The first thing that is wrong with a request body, as pydantic reports it. Where a value may be of several types
    there is a problem for each of them: all are told, but a field that is known and not supported is told alone, and of
    an object or a list that is no text, what is wrong inside it."""
    problem, place = problems[0], f"{_path(problems[0]['loc'])}["
    if str(problem["type"]).endswith("_type"):
        inside = (one for one in problems if one["type"] in _INSIDE and _path(one["loc"]).startswith(place))
        problem = next(inside, problem)
    problem = next((one for one in problems if one["type"] == "unsupported_parameter"), problem)
    kind = str(problem["type"])
    if kind == "json_invalid":
        return Failure(400, f"the body is not JSON: {problem['ctx']['error']}", None, "invalid_json")
    param = _path(problem["loc"])
    code = _VALIDATION_CODES.get(kind, "invalid_type" if kind.endswith("_type") else "invalid_value")
    if code == "unknown_parameter":
        message = f"{param} is not a known field"
    elif code == "missing_required_parameter":
        message = f"{param or 'the JSON body'} is required"
    else:
        same = [one for one in problems if _path(one["loc"]) == param and one["type"] not in _VALIDATION_CODES]
        reasons = dict.fromkeys(one["msg"] for one in same or [problem])
        message = f"{param or 'the body'}: {', or: '.join(reasons)}"
    return Failure(400, message, param or None, code)


def _path(location: Sequence[object]) -> str:
    """`messages[0].content` for the place of a problem, whose first part is where the request is read from."""
    path = ""
    for part in location[1:]:
        if part in _UNION_MEMBERS:
            continue
        if isinstance(part, int):
            path += f"[{part}]"
        elif str(part).isidentifier():
            path += f".{part}" if path else str(part)
    return path[:200]
