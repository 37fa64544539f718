"""Texts of clients that a chat template or its tokenizer must not read: other names stand for them."""

from __future__ import annotations

import re
import secrets
from typing import Any

# Private-use characters: no tokenizer, template or language means anything by them.
_BEGIN, _END = "\uf8f0", "\uf8f1"


class HiddenTexts:
    """The hidden texts of one rendering. `control` finds the special tokens and the marks that the template writes,
    `special` the special tokens alone, with None for neither: what an assistant said may have marks of its own. Names
    are drawn anew each time, so that no client can know them."""

    def __init__(self, control: re.Pattern[str] | None, special: re.Pattern[str] | None) -> None:
        self._control = control
        self._special = special
        self._nonce = secrets.token_hex(4)
        self.tokens: list[str] = []
        self._raws: list[str] = []

    def hide(self, text: str, of_assistant: bool = False) -> str:
        """The text, with names for what would be read as special tokens."""
        pattern = self._special if of_assistant else self._control

        def named(found: re.Match[str]) -> str:
            self.tokens.append(found.group())
            return f"{_BEGIN}{self._nonce}token{len(self.tokens) - 1}{_END}"

        return text if pattern is None else pattern.sub(named, text)

    def hide_in(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, list):
            return [self.hide_in(part) for part in value]
        if isinstance(value, dict):
            return {self.hide(name): self.hide_in(part) for name, part in value.items()}
        return value

    def raw(self, text: str) -> str:
        """A name for a text that is to stand as it is, even where a template would put it in quotes."""
        self._raws.append(self.hide(text))
        return f"{_BEGIN}{self._nonce}raw{len(self._raws) - 1}{_END}"

    def with_raws(self, rendered: str) -> str:
        """The rendered text with the texts of `raw`."""
        for index, text in enumerate(self._raws):
            name = f"{_BEGIN}{self._nonce}raw{index}{_END}"
            rendered = rendered.replace(f'"{name}"', text).replace(name, text)
        return rendered

    def with_tokens(self, rendered: str) -> str:
        """The rendered text with the texts of special tokens that were hidden."""
        name = re.compile(f"{_BEGIN}{self._nonce}token([0-9]+){_END}")
        return name.sub(lambda found: self.tokens[int(found.group(1))], rendered)
