"""The table of errors: complete, and the way back is the way there."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import status_pb2

from easyspec import errors
from easyspec.errors import (
    CapacityError,
    ConfigurationError,
    EasyspecError,
    InvalidRequestError,
    InvalidTreeError,
    PromptTooLongError,
    StalePositionError,
    UnknownModelError,
)
from easyspec.rpc.errors import ERROR_TABLE, INTERNAL, error_from_rpc, error_to_status, has_retry_hint, mapping_of
from gateway.rest.errors import failure_of

DETAILS_KEY = "grpc-status-details-bin"


def received(error: BaseException) -> grpc.aio.AioRpcError:
    """What a client sees of `error`."""
    status = error_to_status(error, "request-1")
    return grpc.aio.AioRpcError(
        status.code, grpc.aio.Metadata(), grpc.aio.Metadata(*status.trailing_metadata), status.details
    )


def test_every_exception_has_its_row_and_every_row_its_reason() -> None:
    declared = {
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, EasyspecError)
    }
    assert {row.error for row in ERROR_TABLE} == declared - {EasyspecError, ConfigurationError}
    assert len({row.reason for row in ERROR_TABLE}) == len(ERROR_TABLE)


def test_codes_for_both_wires() -> None:
    table = {row.error.__name__: (row.code.name, row.http_status) for row in ERROR_TABLE}
    assert table == {
        "InvalidRequestError": ("INVALID_ARGUMENT", 400),
        "UnsupportedFieldError": ("INVALID_ARGUMENT", 400),
        "InvalidTreeError": ("INVALID_ARGUMENT", 400),
        "PromptTooLongError": ("OUT_OF_RANGE", 400),
        "RequestTooLargeError": ("INVALID_ARGUMENT", 413),
        "UnauthenticatedError": ("UNAUTHENTICATED", 401),
        "UnknownModelError": ("NOT_FOUND", 404),
        "StalePositionError": ("FAILED_PRECONDITION", 409),
        "CapacityError": ("RESOURCE_EXHAUSTED", 429),
        "UnavailableError": ("UNAVAILABLE", 503),
        "WrongModelError": ("UNAVAILABLE", 503),
        "EngineLostError": ("UNAVAILABLE", 503),
        "ConnectionLostError": ("UNAVAILABLE", 503),
        "DeadlineError": ("DEADLINE_EXCEEDED", 504),
        "BrokenModelError": ("DATA_LOSS", 500),
    }
    assert (INTERNAL.code.name, INTERNAL.http_status) == ("INTERNAL", 500)


@pytest.mark.parametrize(
    "error_type", [InvalidRequestError, InvalidTreeError, PromptTooLongError, errors.RequestTooLargeError]
)
def test_refused_values_come_back_whole(error_type: type[InvalidRequestError]) -> None:
    original = error_type("sampling.temperature", -1.5, "0 to 100")
    returned = error_from_rpc(received(original))
    assert type(returned) is error_type
    assert str(returned) == str(original)
    assert (returned.field, repr(returned.value), returned.allowed) == ("sampling.temperature", "-1.5", "0 to 100")
    again = error_from_rpc(received(returned))  # the gateway passes on what the verifier said
    assert str(again) == str(original)


def test_a_service_that_is_lost_says_when_to_come_again() -> None:
    for hint_s in (1.0, 2.5, None):
        error = errors.UnavailableError("loading")
        error.retry_after_s = hint_s
        returned = error_from_rpc(received(error))
        assert isinstance(returned, errors.UnavailableError)
        assert returned.retry_after_s == hint_s
        assert has_retry_hint(received(error)) is (hint_s is not None)
        headers = failure_of(error).response_to("/v1/completions").headers
        assert headers.get("retry-after-ms") == (None if hint_s is None else str(round(hint_s * 1000)))


def test_a_lost_connection_does_not_tell_where_to() -> None:
    bare = grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "connect to 10.0.0.7:50051: refused"
    )
    lost = error_from_rpc(bare)
    assert "10.0.0.7" in str(lost)  # for the log
    status = error_to_status(lost, "request-1")
    assert status.code is grpc.StatusCode.UNAVAILABLE
    assert status.details == "the connection to a service was lost"
    assert b"10.0.0.7" not in status.trailing_metadata[0][1]
    assert "10.0.0.7" not in failure_of(lost).message


def test_a_bug_tells_the_client_nothing_but_the_request_id() -> None:
    for bug in (RuntimeError("prompt was 'secret'"), ConfigurationError("/secret/path"), EasyspecError("secret")):
        assert mapping_of(bug) is INTERNAL
        status = error_to_status(bug, "request-1")
        assert status.code is grpc.StatusCode.INTERNAL
        assert status.details == "internal error; request id request-1"
        assert b"secret" not in status.trailing_metadata[0][1]
        assert type(error_from_rpc(received(bug))) is EasyspecError


def test_long_values_do_not_outgrow_the_trailers() -> None:
    status = error_to_status(UnknownModelError("é" * 100_000, "base"), "request-1")
    assert len(status.details.encode()) + len(status.trailing_metadata[0][1]) < 4096


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.ConnectionLostError),
        (grpc.StatusCode.CANCELLED, errors.ConnectionLostError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, CapacityError),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequestError),
        (grpc.StatusCode.FAILED_PRECONDITION, StalePositionError),
        (grpc.StatusCode.UNAUTHENTICATED, errors.UnauthenticatedError),
        (grpc.StatusCode.UNKNOWN, EasyspecError),
        (grpc.StatusCode.UNIMPLEMENTED, EasyspecError),
    ],
)
def test_statuses_without_our_details_are_read_by_their_code(
    code: grpc.StatusCode, expected: type[EasyspecError]
) -> None:
    bare = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "socket closed")
    returned = error_from_rpc(bare)
    assert type(returned) is expected
    assert "socket closed" in str(returned)


def test_details_that_contradict_the_status_are_ignored() -> None:
    other = status_pb2.Status(code=5, message="not found").SerializeToString()
    for details in (other, b"\xff\xff"):
        trailers = grpc.aio.Metadata((DETAILS_KEY, details))
        error = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), trailers, "gone")
        assert type(error_from_rpc(error)) is errors.ConnectionLostError
