"""Checks that several roles make on what enters a session."""

from __future__ import annotations

from collections.abc import Sequence

from easyspec.errors import InvalidRequestError, PromptTooLongError, UnknownModelError, WrongModelError
from easyspec.speculation.parameters import MAX_TOP_LOGPROBS

# Most log-probabilities of one prompt: they are held until the first verdict and travel in one message, where each
# takes about 8 bytes of the 16 MiB that a message may have.
MAX_PROMPT_LOGPROBS = 2**19


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


def check_logprobs(num_top_logprobs: int | None, *, has_prompt: bool, num_prompt_tokens: int) -> None:
    """Raise InvalidRequestError unless so many log-probabilities may be asked for; `has_prompt`: the prompt's too."""
    if num_top_logprobs is None:
        if has_prompt:
            raise InvalidRequestError("prompt_logprobs", True, "only together with num_top_logprobs")
        return
    if not 0 <= num_top_logprobs <= MAX_TOP_LOGPROBS:
        raise InvalidRequestError("num_top_logprobs", num_top_logprobs, f"0 to {MAX_TOP_LOGPROBS}, or unset")
    num_values = num_prompt_tokens * (num_top_logprobs + 1)
    if has_prompt and num_values > MAX_PROMPT_LOGPROBS:
        allowed = f"prompt tokens x (num_top_logprobs + 1) up to {MAX_PROMPT_LOGPROBS}"
        raise InvalidRequestError("prompt_logprobs", f"{num_prompt_tokens} x {num_top_logprobs + 1}", allowed)
