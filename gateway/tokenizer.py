"""Text <-> token ids, by the tokenizer of a checkpoint folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyspec.errors import ConfigurationError, InvalidRequestError
from easyspec.tokenizer_fingerprint import tokenizer_fingerprint

CHAT_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class ChatTurn:
    """One message of a conversation."""

    role: str
    content: str


class Tokenizer:
    """A Hugging Face tokenizer, reduced to what the gateway needs. Safe to call from several threads."""

    def __init__(self, tokenizer: Any, fingerprint: str) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._fingerprint = fingerprint
        self.special_token_ids = frozenset(
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        )

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder; ConfigurationError if there is none that fits."""
        fingerprint = tokenizer_fingerprint(folder)
        # Imported here: it takes seconds, as it brings torch along, and the port should be open meanwhile.
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # the library raises a dozen types here
            raise ConfigurationError(f"tokenizer in {folder} cannot be loaded: {error}") from error
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigurationError(f"tokenizer in {folder} is {type(tokenizer).__name__}; a fast one is needed")
        return cls(tokenizer, fingerprint)

    def fingerprint(self) -> str:
        """See `tokenizer_fingerprint`."""
        return self._fingerprint

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt, with the special tokens this tokenizer adds by default."""
        return tuple(self._tokenizer(text, truncation=False, verbose=False)["input_ids"])

    def encode_chat(self, turns: Sequence[ChatTurn]) -> tuple[int, ...]:
        """Token ids of a conversation, ready for the assistant to answer."""
        if not turns:
            raise InvalidRequestError("prompt.chat.messages", [], "at least one message")
        for index, turn in enumerate(turns):
            if turn.role not in CHAT_ROLES:
                raise InvalidRequestError(f"prompt.chat.messages[{index}].role", turn.role, ", ".join(CHAT_ROLES))
        return tuple(self._tokenizer(self._render(turns), add_special_tokens=False, verbose=False)["input_ids"])

    def _render(self, turns: Sequence[ChatTurn]) -> str:
        if not self._tokenizer.chat_template:
            raise InvalidRequestError("prompt", "a conversation", "text or token ids: the model has no chat template")
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # templates are programs and refuse in their own words
            raise InvalidRequestError("prompt.chat.messages", f"{len(turns)} messages", str(error)) from error

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids as they stand, special tokens included; broken UTF-8 becomes U+FFFD."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=False))

    def token_text(self, token_id: int) -> str:
        """Text of one token alone, for display."""
        return self.decode((token_id,))
