"""What one request may ask for, checked before anything expensive is done with it; the same for gRPC and REST."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from easyspec.errors import InvalidRequestError, RequestTooLargeError
from easyspec.rpc.channels import MAX_MESSAGE_BYTES
from easyspec.speculation.parameters import SamplingParameters, StopConditions


class RequestLimits(BaseModel):
    """Sizes of one request; part of the gateway's settings."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    max_request_bytes: int = Field(
        default=8 * 1024 * 1024,
        ge=1024,
        le=MAX_MESSAGE_BYTES,
        description=f"Most bytes of one request on the wire, 1024 to {MAX_MESSAGE_BYTES}. 8 MiB holds a prompt of a "
        "million tokens; more is refused while it is being read.",
    )
    max_prompt_chars: int = Field(
        default=4 * 1024 * 1024,
        ge=1,
        le=MAX_MESSAGE_BYTES,
        description=f"Most characters of a prompt, all messages of a chat together, 1 to {MAX_MESSAGE_BYTES}. "
        "4194304 is beyond any context, and what is longer would cost seconds of tokenizing only to be refused.",
    )
    max_chat_messages: int = Field(default=4096, ge=1, le=1_000_000)
    """Most messages of a chat, 1 to 1000000. 4096 is beyond any conversation; templates are interpreted and take about
    0.01 ms a message."""
    max_choices: int = Field(default=16, ge=1, le=128)
    """Most completions (n) of one request, 1 to 128. Each takes a place and KV memory of its own; 16 keeps one request
    from filling the service."""
    max_stop_strings: int = Field(default=16, ge=0, le=1024)
    """Most stop strings, 0 to 1024. Each is looked for in every round; OpenAI allows 4."""
    max_stop_string_chars: int = Field(default=1024, ge=1, le=65_536)
    """Most characters of a stop string, 1 to 65536. As much text may be held back while it may still become one."""
    max_stop_token_ids: int = Field(default=1024, ge=0, le=1_000_000)
    """Most stop token ids, 0 to 1000000. 1024 is beyond the special tokens of any vocabulary."""
    max_logit_bias: int = Field(default=1024, ge=0, le=1_000_000)
    """Most entries of logit_bias, 0 to 1000000. Each is applied at every row of every tree; OpenAI allows 300 and vLLM
    1024."""
    max_grammar_bytes: int = Field(default=64 * 1024, ge=1, le=64 * 1024)
    """Most bytes of a JSON Schema, regular expression or grammar, 1 to 65536. It is compiled before the first token,
    and its cost grows with its size."""

    def check_sampling(self, sampling: SamplingParameters) -> None:
        """Raise InvalidRequestError for a list or text that is too long; ranges are for `SamplingParameters.check`."""
        _check_count("sampling.logit_bias", len(sampling.logit_bias), self.max_logit_bias, "entries")
        grammar = sampling.grammar
        if grammar is not None:
            # Of characters first: counting bytes makes a copy.
            num_bytes = max(len(grammar.text), len(grammar.text[: self.max_grammar_bytes + 1].encode()))
            _check_count(f"sampling.grammar.{grammar.kind.value}", num_bytes, self.max_grammar_bytes, "bytes")

    def check_stops(self, stop: StopConditions, stop_strings: tuple[str, ...]) -> None:
        """Raise InvalidRequestError if there are too many, or one is empty or too long."""
        _check_count("stop.stop_token_ids", len(stop.stop_token_ids), self.max_stop_token_ids, "token ids")
        _check_count("stop_strings", len(stop_strings), self.max_stop_strings, "strings")
        for index, text in enumerate(stop_strings):
            if not 1 <= len(text) <= self.max_stop_string_chars:
                allowed = f"1 to {self.max_stop_string_chars} characters"
                raise InvalidRequestError(f"stop_strings[{index}]", text, allowed)

    def check_text(self, field: str, num_chars: int) -> None:
        """Raise InvalidRequestError if a prompt is too long to be worth tokenizing."""
        _check_count(field, num_chars, self.max_prompt_chars, "characters")

    def check_messages(self, field: str, num_messages: int) -> None:
        """Raise InvalidRequestError if a chat has too many messages."""
        _check_count(field, num_messages, self.max_chat_messages, "messages")

    def check_choices(self, field: str, num_choices: int) -> None:
        """Raise InvalidRequestError unless there is at least one completion to make, and not too many."""
        if not 1 <= num_choices <= self.max_choices:
            raise InvalidRequestError(field, num_choices, f"1 to {self.max_choices}")

    def check_message_bytes(self, num_bytes: int) -> None:
        """Raise RequestTooLargeError if a message is larger than a request may be."""
        if num_bytes > self.max_request_bytes:
            raise RequestTooLargeError("request", f"{num_bytes} bytes", f"at most {self.max_request_bytes} bytes")


def _check_count(field: str, count: int, most: int, unit: str) -> None:
    if count > most:
        raise InvalidRequestError(field, f"{count} {unit}", f"at most {most} {unit}")
