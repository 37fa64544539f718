"""Checks that both device roles make on what enters a session."""

from __future__ import annotations

from collections.abc import Sequence

from easyspec.errors import InvalidRequestError, PromptTooLongError, UnknownModelError, WrongModelError


def check_model(requested: str, served: str) -> None:
    """Raise UnknownModelError unless the request names the served model or none."""
    if requested not in ("", served):
        raise UnknownModelError(requested, served)


def check_fingerprint(requested: str, served: str) -> None:
    """Raise WrongModelError unless the session is for the served model or for any."""
    if requested not in ("", served):
        raise WrongModelError(requested, served)


def check_prompt(prompt_token_ids: Sequence[int], vocab_size: int, max_model_len: int) -> None:
    """Raise InvalidRequestError or PromptTooLongError unless there is a prompt that leaves room for one more token."""
    if not prompt_token_ids:
        raise InvalidRequestError("prompt_token_ids", [], "at least one token")
    check_token_ids("prompt_token_ids", prompt_token_ids, vocab_size)
    if len(prompt_token_ids) >= max_model_len:
        raise PromptTooLongError("prompt_token_ids", f"{len(prompt_token_ids)} tokens", f"below {max_model_len}")


def check_token_ids(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raise InvalidRequestError naming `field` and the first id that is not in the vocabulary."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(field, token_id, f"0 to {vocab_size - 1}")
