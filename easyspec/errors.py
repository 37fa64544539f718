"""Every error a caller can cause or meet; `easyspec/rpc/errors.py` draws their tree, and maps them to status codes."""

from __future__ import annotations


class EasyspecError(Exception):
    """Base of everything that is not a bug."""


class InvalidRequestError(EasyspecError):
    """A field of a request has a value that is not allowed.

    `field` is the path a client would recognise (`sampling.temperature`), `value` what it sent and
    `allowed` what it may send.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        shown = repr(value) if not isinstance(value, int) or abs(value) < 2**256 else "a number of many digits"
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        super().__init__(f"{field} is {shown}; allowed: {allowed}")
        self.field = field
        self.value = value
        self.allowed = allowed


class InvalidTreeError(InvalidRequestError):
    """Draft tokens that do not form a tree."""


class UnsupportedFieldError(InvalidRequestError):
    """A field of the protocol that has no meaning here, or not for this model."""


class PromptTooLongError(InvalidRequestError):
    """The tokens do not fit the model's context."""


class RequestTooLargeError(InvalidRequestError):
    """A request has more bytes than are read."""


class UnauthenticatedError(EasyspecError):
    """No API key, or one that is not known here; the message never repeats what was presented."""


class UnknownModelError(EasyspecError):
    """No model of that name is served."""

    def __init__(self, model: str, served: str) -> None:
        super().__init__(f"model {model!r} is not served here; served: {served}")


class StalePositionError(EasyspecError):
    """A message is based on another committed length than the session's; nothing was changed."""

    def __init__(self, base_length: int, committed_length: int) -> None:
        super().__init__(f"base_length is {base_length}; the session stands at {committed_length}")


class CapacityError(EasyspecError):
    """No room at present; `retry_after_s` is a hint in seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnavailableError(EasyspecError):
    """The service is loading, draining or lost; `retry_after_s` is a hint in seconds, None: coming again is in vain."""

    retry_after_s: float | None = 1.0


class WrongModelError(UnavailableError):
    """This replica serves another model than the session must have; another one may serve it."""

    def __init__(self, fingerprint: str, served: str) -> None:
        super().__init__(f"this replica serves the model {served[:12]}, the session is for {fingerprint[:12]}")


class EngineLostError(UnavailableError):
    """The device or another rank is gone for good: the process must end, so that it can be started again."""


class ConnectionLostError(UnavailableError):
    """The service did not say why: its process has ended, or the network to it is gone."""


class DeadlineError(EasyspecError):
    """The caller's time ran out."""


class BrokenModelError(EasyspecError):
    """The base model computes NaN or infinity: its weights are damaged, or overflow in the type it is computed in."""


class ConfigurationError(EasyspecError):
    """Settings, checkpoint or tokenizer do not fit; raised at start-up only."""
