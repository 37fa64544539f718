"""Exceptions <-> gRPC statuses <-> HTTP statuses: one table, used by every service in both directions.

    EasyspecError            INTERNAL             500   only as what it was at a peer: a bug of ours
    ├── InvalidRequestError  INVALID_ARGUMENT     400   BadRequest: one field violation
    │   ├── InvalidTreeError INVALID_ARGUMENT     400
    │   ├── PromptTooLong... OUT_OF_RANGE         400
    │   └── RequestTooLar... INVALID_ARGUMENT     413
    ├── UnauthenticatedError UNAUTHENTICATED      401
    ├── UnknownModelError    NOT_FOUND            404
    ├── StalePositionError   FAILED_PRECONDITION  409
    ├── CapacityError        RESOURCE_EXHAUSTED   429   RetryInfo
    ├── UnavailableError     UNAVAILABLE          503   RetryInfo, as have those below
    │   ├── WrongModelError  UNAVAILABLE          503
    │   ├── EngineLostError  UNAVAILABLE          503
    │   └── ConnectionLos... UNAVAILABLE          503
    ├── DeadlineError        DEADLINE_EXCEEDED    504
    └── BrokenModelError     DATA_LOSS            500

Every status carries an ErrorInfo with the reason below. Anything else, ConfigurationError included, is a bug of
ours: INTERNAL, logged with its traceback here, and the client learns nothing but the request id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from easyspec import errors

ERROR_DOMAIN = "easyspec"
# The message travels three times in the trailers (status, details, violation), which gRPC caps at 8 KiB.
_MAX_MESSAGE_CHARS = 300
_FULL_FOR_S = 1.0


@dataclass(frozen=True)
class ErrorMapping:
    """How one exception appears on both wires; `reason` is stable, for programs."""

    error: type[errors.EasyspecError]
    code: grpc.StatusCode
    http_status: int
    reason: str


ERROR_TABLE = (
    ErrorMapping(errors.InvalidRequestError, grpc.StatusCode.INVALID_ARGUMENT, 400, "INVALID_REQUEST"),
    ErrorMapping(errors.UnsupportedFieldError, grpc.StatusCode.INVALID_ARGUMENT, 400, "UNSUPPORTED_FIELD"),
    ErrorMapping(errors.InvalidTreeError, grpc.StatusCode.INVALID_ARGUMENT, 400, "INVALID_TREE"),
    ErrorMapping(errors.PromptTooLongError, grpc.StatusCode.OUT_OF_RANGE, 400, "PROMPT_TOO_LONG"),
    ErrorMapping(errors.RequestTooLargeError, grpc.StatusCode.INVALID_ARGUMENT, 413, "REQUEST_TOO_LARGE"),
    ErrorMapping(errors.UnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED, 401, "UNAUTHENTICATED"),
    ErrorMapping(errors.UnknownModelError, grpc.StatusCode.NOT_FOUND, 404, "UNKNOWN_MODEL"),
    ErrorMapping(errors.StalePositionError, grpc.StatusCode.FAILED_PRECONDITION, 409, "STALE_POSITION"),
    ErrorMapping(errors.CapacityError, grpc.StatusCode.RESOURCE_EXHAUSTED, 429, "CAPACITY"),
    ErrorMapping(errors.UnavailableError, grpc.StatusCode.UNAVAILABLE, 503, "UNAVAILABLE"),
    ErrorMapping(errors.WrongModelError, grpc.StatusCode.UNAVAILABLE, 503, "WRONG_MODEL"),
    ErrorMapping(errors.EngineLostError, grpc.StatusCode.UNAVAILABLE, 503, "ENGINE_LOST"),
    ErrorMapping(errors.ConnectionLostError, grpc.StatusCode.UNAVAILABLE, 503, "CONNECTION_LOST"),
    ErrorMapping(errors.DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED, 504, "DEADLINE"),
    ErrorMapping(errors.BrokenModelError, grpc.StatusCode.DATA_LOSS, 500, "BROKEN_MODEL"),
)
INTERNAL = ErrorMapping(errors.EasyspecError, grpc.StatusCode.INTERNAL, 500, "INTERNAL")


def mapping_of(error: BaseException) -> ErrorMapping:
    """The row of the table for `error`; INTERNAL for what is not in it. Full memory is not a bug, and passes."""
    kind = errors.CapacityError if isinstance(error, MemoryError) else type(error)
    return next((row for row in ERROR_TABLE if row.error is kind), INTERNAL)


def public_message(error: BaseException) -> str:
    """What a client is told; how a service or a rank inside was lost names addresses, which are not for clients."""
    if isinstance(error, MemoryError):
        return "memory is full"
    if isinstance(error, errors.ConnectionLostError):
        return "the connection to a service was lost"
    return "the device of a service was lost" if isinstance(error, errors.EngineLostError) else str(error)


def retry_hint_s(error: BaseException) -> float | None:
    """After how many seconds a client should come again; None where that is in vain."""
    if isinstance(error, MemoryError):
        return _FULL_FOR_S
    return error.retry_after_s if isinstance(error, errors.CapacityError | errors.UnavailableError) else None


def error_to_status(error: BaseException, request_id: str) -> grpc.Status:
    """The status to end an RPC with, details included. Says nothing about an INTERNAL error but `request_id`."""
    row = mapping_of(error)
    message = public_message(error)[:_MAX_MESSAGE_CHARS]
    if row is INTERNAL:
        message = f"internal error; request id {request_id}"
    info = error_details_pb2.ErrorInfo(reason=row.reason, domain=ERROR_DOMAIN, metadata={"request_id": request_id})
    details: list[Message] = [info]
    if isinstance(error, errors.InvalidRequestError):
        shown = str(error).removeprefix(f"{error.field} is ").removesuffix(f"; allowed: {error.allowed}")
        info.metadata.update({"field": error.field, "value": shown, "allowed": error.allowed})
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    retry_after_s = retry_hint_s(error)
    if retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = [any_pb2.Any() for _ in details]
    for holder, detail in zip(packed, details, strict=True):
        holder.Pack(detail)
    code = code_pb2.Code.Value(row.code.name)
    status: grpc.Status = rpc_status.to_status(status_pb2.Status(code=code, message=message, details=packed))
    return status


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: BaseException, request_id: str) -> NoReturn:
    """End the RPC of `context` with the status of `error`. Always raises, as `context.abort` does."""
    status = error_to_status(error, request_id)
    await context.abort(status.code, status.details, status.trailing_metadata)


def error_from_rpc(error: grpc.aio.AioRpcError) -> errors.EasyspecError:
    """The exception that the peer raised, as far as its status tells; ConnectionLostError if it is not the peer's.

    A peer's INTERNAL (and any status outside the table) becomes a plain EasyspecError, which maps to INTERNAL again.
    """
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in _details(error):
        detail.Unpack(info)  # each takes what is of its own type, and nothing else
        detail.Unpack(retry)
    row = _row_of(error, info)
    message = error.details() or row.reason
    if issubclass(row.error, errors.InvalidRequestError):
        metadata = info.metadata
        if "field" not in metadata:
            # Not refused by our own code (say, by gRPC): all that is known is the message.
            return row.error("request", _RemoteValue("refused"), message)
        return row.error(metadata["field"], _RemoteValue(metadata["value"]), metadata["allowed"])
    delay_s = retry.retry_delay.ToNanoseconds() / 1e9
    if row.error is errors.CapacityError:
        return errors.CapacityError(message, delay_s) if delay_s > 0 else errors.CapacityError(message)
    # The other classes compose their message from parts we do not have: take it as the peer composed it.
    rebuilt = row.error.__new__(row.error, message)
    assert isinstance(rebuilt, errors.EasyspecError)
    is_ours = info.domain == ERROR_DOMAIN
    if is_ours and isinstance(rebuilt, errors.UnavailableError) and rebuilt.retry_after_s != delay_s:
        rebuilt.retry_after_s = delay_s or None
    return rebuilt


def has_retry_hint(error: grpc.aio.AioRpcError) -> bool:
    """Whether a peer's status tells after which time to come again."""
    return any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in _details(error))


class _RemoteValue:
    """A value that a peer refused, known only by how the peer showed it."""

    def __init__(self, shown: str) -> None:
        self._shown = shown

    def __repr__(self) -> str:
        return self._shown


def _details(error: grpc.aio.AioRpcError) -> tuple[any_pb2.Any, ...]:
    try:
        status = rpc_status.from_call(error)
    except (ValueError, DecodeError):  # a proxy rewrote the status, or these are not ours
        return ()
    return () if status is None else tuple(status.details)


def _row_of(error: grpc.aio.AioRpcError, info: error_details_pb2.ErrorInfo) -> ErrorMapping:
    if info.domain == ERROR_DOMAIN:
        return next((row for row in ERROR_TABLE if row.reason == info.reason), INTERNAL)
    code = error.code()
    if code is grpc.StatusCode.CANCELLED:  # by the peer or by a broken connection: our own cancellation never gets here
        code = grpc.StatusCode.UNAVAILABLE
    if code is grpc.StatusCode.UNAVAILABLE:
        return mapping_of(errors.ConnectionLostError())
    return next((row for row in ERROR_TABLE if row.code is code), INTERNAL)
