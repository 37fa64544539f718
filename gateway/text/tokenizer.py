"""Text <-> token ids, by the tokenizer of a checkpoint folder or a GGUF file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from easyspec.checkpoint.tokenizer_files import load_tokenizer
from easyspec.errors import InvalidRequestError, PromptTooLongError
from easyspec.speculation.parameters import Thinking
from easyspec.tokenizer_fingerprint import tokenizer_fingerprint
from gateway.text.chat_template import ChatTemplates
from gateway.text.control_tokens import ControlTokens
from gateway.text.conversation import ChatTurn, Conversation
from gateway.text.hidden_texts import HiddenTexts
from gateway.text.reasoning import marks_in, thinking_after
from gateway.text.tool_prompt import with_described_tools

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
# Text that has more characters for each token that fits is counted before it is tokenized as a whole.
_LIKELY_CHARS_PER_TOKEN = 8
_COUNTED_CHARS = 65_536
_MOST_CUT_TOKENS = 64
_MARK = "(answer)"
_METASPACE = "\u2581"


@dataclass(frozen=True)
class ChatOptions:
    """How conversations become prompts. `template` stands in for the checkpoint's own, None keeps that.
    `special_tokens_are_text` in what clients say; `describes_tools` to models whose template knows none;
    `knows_reasoning` looks for marks of thinking in the template."""

    template: str | None = None
    special_tokens_are_text: bool = True
    describes_tools: bool = True
    knows_reasoning: bool = True


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation as the model gets it: its tokens, their text, and the thinking that may come before the answer."""

    token_ids: tuple[int, ...]
    text: str
    thinking: Thinking | None = None


class Tokenizer:
    """A Hugging Face tokenizer, reduced to what the gateway needs. Safe to call from several threads."""

    def __init__(self, tokenizer: Any, fingerprint: str, path: Path, chat: ChatOptions = ChatOptions()) -> None:
        self.path = path
        self._tokenizer = tokenizer
        self._chat = chat
        self.templates = ChatTemplates(tokenizer, chat.template)
        self._backend = backend = tokenizer.backend_tokenizer
        added = tokenizer.added_tokens_decoder
        self._control_of = cache(lambda template: ControlTokens(backend, added.values(), template))
        self.fingerprint = fingerprint
        self.special_token_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._added_texts: Mapping[int, str] = {token_id: token.content for token_id, token in added.items()}
        decoder = json.loads(self._backend.to_str())["decoder"] or {}
        self._byte_of_char = _byte_of_char() if "ByteLevel" in json.dumps(decoder) else None
        self.end_of_turn_ids = self._end_of_turn_ids()

    @classmethod
    def load(cls, path: Path, chat: ChatOptions = ChatOptions()) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder or a GGUF file; ConfigurationError if there is none that fits."""
        fingerprint = tokenizer_fingerprint(path)
        return cls(load_tokenizer(path), fingerprint, path, chat)

    def encode(self, text: str, max_tokens: int | None = None) -> tuple[int, ...]:
        """Token ids of a prompt, with the special tokens this tokenizer adds by default. With `max_tokens` a text that
        has many more raises PromptTooLongError before all of it is tokenized."""
        self._check_length(text, max_tokens)
        return tuple(self._tokenizer(text, truncation=False, verbose=False)["input_ids"])

    def prompt_of(self, conversation: Conversation, max_tokens: int | None = None) -> ChatPrompt:
        """A conversation as the model gets it; raises InvalidRequestError. `max_tokens` is as in `encode`."""
        conversation.check()
        tools = conversation.tools if conversation.shown_tools else None
        template = self.templates.select(tools is not None)
        if not template.knows_tools:
            if tools is not None and not (self._chat.describes_tools or tools.is_forced):
                allowed = "none: the model's chat template knows none, and they are not described otherwise here"
                raise InvalidRequestError("tools", "set", allowed)
            conversation = with_described_tools(conversation, template, self._chat.describes_tools)
        control = self._control_of(template.source)
        hidden = control.hidden_texts() if self._chat.special_tokens_are_text else HiddenTexts(None, None)
        rendered = hidden.with_raws(template.render(conversation, hidden))
        text = hidden.with_tokens(rendered)
        self._check_length(text, max_tokens)
        marks = marks_in(template.source)
        if marks is not None and not (self._chat.knows_reasoning or marks.answer):
            marks = None
        begun_answer = conversation.turns[-1].content if conversation.continues_last_turn else ""
        thinking = thinking_after(rendered, begun_answer, marks)
        if hidden.tokens:
            return ChatPrompt(control.encode(rendered, hidden), text, thinking)
        token_ids = self._tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
        return ChatPrompt(tuple(token_ids), rendered, thinking)

    def _check_length(self, text: str, max_tokens: int | None) -> None:
        """Count the tokens of a text that is likely too long, part by part, until it is sure to be."""
        if max_tokens is None or len(text) <= _LIKELY_CHARS_PER_TOKEN * max_tokens:
            return
        num_tokens = 0
        for start in range(0, len(text), _COUNTED_CHARS):
            part = self._backend.encode(text[start : start + _COUNTED_CHARS], add_special_tokens=False)
            # Cut elsewhere the same text may have fewer tokens, but not many.
            num_tokens += max(0, len(part) - _MOST_CUT_TOKENS)
            if num_tokens > max_tokens:
                raise PromptTooLongError("prompt", f"more than {num_tokens} tokens", f"at most {max_tokens} tokens")

    def _end_of_turn_ids(self) -> frozenset[int]:
        """The special token that the chat template puts behind what an assistant has said; empty if it puts none, or
        one that ends thinking as well."""
        conversation = Conversation((ChatTurn("user", "?"), ChatTurn("assistant", _MARK)), opens_answer=False)
        try:
            template = self.templates.select(has_tools=False)
            said = template.render(conversation, HiddenTexts(None, None))
        except InvalidRequestError:  # no template, or one that wants more
            return frozenset()
        token_ids = self._tokenizer(said.rpartition(_MARK)[2].lstrip(), add_special_tokens=False)["input_ids"]
        marks = marks_in(template.source)
        return frozenset(
            token_id
            for token_id in self.special_token_ids.intersection(token_ids[:1])
            if marks is None or self._added_texts[token_id] not in marks.closing
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids as they stand, special tokens included; broken UTF-8 becomes U+FFFD."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=False))

    def token_text(self, token_id: int) -> str:
        return self.decode((token_id,))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token alone, which may be part of a character; of a special token, its name."""
        added = self._added_texts.get(token_id)
        if added is not None:
            return added.encode()
        token = str(self._backend.id_to_token(token_id) or "")
        if self._byte_of_char is not None:
            return bytes(self._byte_of_char.get(char, ord("?")) for char in token)
        fallback = _BYTE_FALLBACK.fullmatch(token)
        return bytes.fromhex(fallback.group(1)) if fallback else token.replace(_METASPACE, " ").encode()

    def in_lark(self, text: str) -> str:
        """What a grammar in Lark calls a text, or, if there is one, the special token of that name."""
        names = [f"<[{token_id}]>" for token_id in self.special_ids_of((text,))]
        return f"({' | '.join([*names, json.dumps(text)])})"

    def special_ids_of(self, texts: Sequence[str]) -> frozenset[int]:
        return frozenset(token_id for token_id in self.special_token_ids if self._added_texts[token_id] in texts)


def _byte_of_char() -> Mapping[str, int]:
    """The character of each byte in byte-level vocabularies, turned round: visible Latin-1 stands for itself, the
    other bytes, in order, for the characters from 256 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
