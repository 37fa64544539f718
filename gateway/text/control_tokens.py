"""The tokens that structure a conversation: tokens where the chat template wrote them, text in what clients say."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from gateway.text.hidden_texts import HiddenTexts


class ControlTokens:
    """The control tokens of one chat template: the special ones among `added`, the added tokens of the tokenizer, and
    those that the template writes. `backend` is the tokenizer as the library has it."""

    def __init__(self, backend: Any, added: Iterable[Any], template: str) -> None:
        self._backend = backend
        is_special = {str(token.content): token.special for token in added if token.content}
        self._special = [text for text in is_special if is_special[text]]
        marks = [text for text in is_special if not is_special[text] and not text.isspace() and text in template]
        self._texts = [*self._special, *marks]

    def hidden_texts(self) -> HiddenTexts:
        """For one rendering: hides these tokens in what clients say."""
        return HiddenTexts(_any_of(self._texts), _any_of(self._special))

    def encode(self, rendered: str, hidden: HiddenTexts) -> tuple[int, ...]:
        """Token ids of a rendered text in which `hidden` stands for clients' texts: these are read as text."""
        names, renamed_backend = self._renamed
        pattern = _any_of(self._texts)
        assert pattern is not None, "a token was hidden"
        named = pattern.sub(lambda found: names[found.group()], rendered)
        return tuple(renamed_backend.encode(hidden.with_tokens(named), add_special_tokens=False).ids)

    @cached_property
    def _renamed(self) -> tuple[Mapping[str, str], Any]:
        """New names for these tokens, and a copy of the tokenizer that knows them by these alone. So one call reads the
        whole text, with the same tokens, merges and rules for blanks as without new names. Takes a second with a large
        vocabulary; no client can know the names."""
        nonce = secrets.token_hex(8)
        names = {text: f"\uf8f2{nonce}:{index}\uf8f3" for index, text in enumerate(self._texts)}
        content = json.loads(self._backend.to_str())
        for token in content["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = content["model"]
        vocabulary = model.get("vocab")
        if isinstance(vocabulary, dict):
            model["vocab"] = {names.get(text, text): token_id for text, token_id in vocabulary.items()}
        elif isinstance(vocabulary, list):
            model["vocab"] = [[names.get(text, text), score] for text, score in vocabulary]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        content["post_processor"] = None  # names special tokens, and is for texts without a template
        return names, type(self._backend).from_str(json.dumps(content))


def _any_of(texts: Sequence[str]) -> re.Pattern[str] | None:
    ordered = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None
