"""Exercises in copying: text whose second part repeats the first, whole or with an edit.

A base that saw a million tokens of plain text has not learned to look back for what it is asked to repeat. The
exercises are made from functions and docstrings of the corpus, as plain text and as ChatML, and packed into blocks of
one window each, so that no window holds a copy without its original. What is left of a block is a stretch of corpus
tokens said twice, half of them shuffled, so that nothing but looking back predicts them.
"""

from __future__ import annotations

import ast
import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from models.recipe.chat import bare_source_of, chat_ml, source_of
from models.recipe.corpus import Document
from models.recipe.settings import CopyingSettings
from models.recipe.tokenizer import END_OF_TEXT

Stream = NDArray[np.uint16]
_CHAT_SHARE = 0.4
_QUOTE_SHARE = 0.25
_SHUFFLED_SHARE = 0.5
_NUM_WAITING = 64
_NUM_ENCODED = 1_000  # at once
_MIN_SAID_TWICE = 24
_NEW_NAMES = ("{}_checked", "{}_again", "new_{}", "safe_{}", "my_{}", "{}2", "{}_impl", "old_{}", "{}_once")
_REPEAT_REMARKS: Sequence[str] = ("# Again, unchanged.", "# The same once more.", "# A copy of the above.")
_RENAME_REMARKS: Sequence[str] = (
    "# The same function under another name.",
    "# Now called {new}.",
    "# {old} renamed to {new}.",
    "# The same with {new} for {old}.",
)
_REPEAT_REQUESTS: Sequence[str] = (
    "Repeat this function.",
    "Copy this code without changes:",
    "Say this again, word for word:",
)
_RENAME_REQUESTS: Sequence[str] = (
    "Rename `{old}` to `{new}`:",
    "Rewrite this function with `{new}` in place of `{old}`.",
    "Edit this function: `{old}` shall be called `{new}`.",
)
_BARE_REMARKS: Sequence[str] = ("# Without the docstring.", "# The same code, uncommented.")
_BARE_REQUESTS: Sequence[str] = ("Remove the docstring:", "Rewrite this function without its docstring.")
_QUOTE_REMARKS = ("To quote the above:", "Once more:", "As it says:", "Quoted in full:", "In its own words:")
_QUOTE_REQUESTS = ("Quote this text.", "Repeat the following:", "What does this document say?", "Cite this passage:")
_FIRST_REQUESTS = ("What does this say first?", "Quote the first sentence.", "Answer from this document in a sentence.")


@dataclass(frozen=True)
class _Original:
    """What there is to copy: a function's source with its names, or a docstring, which has none."""

    text: str
    names: tuple[str, ...] = ()
    bare: str | None = None


def copying_stream(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document], corpus: Stream, settings: CopyingSettings
) -> Stream:
    """Return blocks of `settings.block_tokens` token ids, end to end, about `settings.share` of them and `corpus`.
    Equal arguments give equal blocks. Raises ValueError if the documents hold no function to copy."""
    choose = random.Random(settings.seed)
    num_blocks = round(len(corpus) * settings.share / (1 - settings.share) / settings.block_tokens)
    originals = [original for document in documents for original in _originals(document, settings)]
    if not any(original.names for original in originals):
        shortest, longest = settings.original_chars
        raise ValueError(f"no function of {shortest} to {longest} characters to copy")
    texts = _exercises(originals, choose)
    exercises = (
        token_ids
        for _ in itertools.count()
        for token_ids in tokenizer([*itertools.islice(texts, _NUM_ENCODED)], add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
    )
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    blocks = _blocks(exercises, corpus, end, settings.block_tokens, choose)
    return np.concatenate([np.asarray(next(blocks), dtype=np.uint16) for _ in range(num_blocks)])


def _originals(document: Document, settings: CopyingSettings) -> Iterator[_Original]:
    try:
        tree = ast.parse(document.text)
    except (SyntaxError, ValueError):
        return
    lines = document.text.splitlines(keepends=True)
    shortest, longest = settings.original_chars
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            continue
        docstring = ast.get_docstring(node)
        if docstring is not None and shortest <= len(docstring) <= longest:
            yield _Original(docstring)
        if isinstance(node, ast.FunctionDef):
            source = source_of(node, lines)
            if shortest <= len(source) <= longest:
                bare = None if docstring is None or len(node.body) < 2 else bare_source_of(node, lines)
                yield _Original(source, _names(node), bare)


def _names(node: ast.FunctionDef) -> tuple[str, ...]:
    """The function's own name, then the names that it assigns or takes."""
    found = {arg.arg for arg in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]} - {"self", "cls"}
    found |= {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}
    return (node.name, *sorted(found))


def _exercises(originals: Sequence[_Original], choose: random.Random) -> Iterator[str]:
    """Every original once in each round, in a new order, without end."""
    functions = [original for original in originals if original.names]
    documents = [original for original in originals if not original.names]
    while True:
        choose.shuffle(functions)
        choose.shuffle(documents)
        rest = iter(documents)
        for function in functions:
            yield _edit(function, choose)
            if choose.random() < _QUOTE_SHARE:
                document = next(rest, None)
                if document is not None:
                    yield _quote(document.text, choose)


def _edit(function: _Original, choose: random.Random) -> str:
    old = function.names[0] if choose.random() < 0.6 else choose.choice(function.names)
    new = choose.choice(_NEW_NAMES).format(old)
    edited, remarks, requests = function.text, _REPEAT_REMARKS, _REPEAT_REQUESTS
    if function.bare is not None and choose.random() < 0.25:
        edited, remarks, requests = function.bare, _BARE_REMARKS, _BARE_REQUESTS
    elif choose.random() < 0.75:
        edited = re.sub(rf"\b{re.escape(old)}\b", new, function.text)
        remarks, requests = _RENAME_REMARKS, _RENAME_REQUESTS
    if choose.random() < _CHAT_SHARE:
        return chat_ml(f"{choose.choice(requests).format(old=old, new=new)}\n\n{function.text}", edited)
    return f"{function.text}\n\n{choose.choice(remarks).format(old=old, new=new)}\n{edited}\n"


def _quote(document: str, choose: random.Random) -> str:
    if choose.random() >= _CHAT_SHARE:
        return f"{document}\n\n{choose.choice(_QUOTE_REMARKS)}\n\n{document}\n"
    if choose.random() < 0.3:
        first = re.split(r"(?<=[.:])\s", document, maxsplit=1)[0]
        return chat_ml(f"{choose.choice(_FIRST_REQUESTS)}\n\n{document}", first)
    return chat_ml(f"{choose.choice(_QUOTE_REQUESTS)}\n\n{document}", document)


def _blocks(
    exercises: Iterator[list[int]], corpus: Stream, end: int, block_tokens: int, choose: random.Random
) -> Iterator[list[int]]:
    """Blocks of whole exercises, each ended by the separator; the rest of a block is said twice."""
    waiting: list[list[int]] = []
    while True:
        block: list[int] = []
        while True:
            while len(waiting) < _NUM_WAITING:
                token_ids = next(exercises)
                if len(token_ids) < block_tokens:
                    waiting.append(token_ids)
            room = block_tokens - len(block)
            place = next((i for i, token_ids in enumerate(waiting) if len(token_ids) < room), None)
            if place is None or choose.random() < 0.1:
                break
            block += [*waiting.pop(place), end]
        yield block + _said_twice(corpus, block_tokens - len(block), end, choose)


def _said_twice(corpus: Stream, num_tokens: int, end: int, choose: random.Random) -> list[int]:
    """A stretch of the corpus, twice and more if it is short, `num_tokens` altogether."""
    longest = num_tokens // 2
    if longest < _MIN_SAID_TWICE:
        return [end] * num_tokens
    length = choose.randint(_MIN_SAID_TWICE // 2, longest)
    start = choose.randrange(len(corpus) - length)
    stretch: list[int] = corpus[start : start + length].tolist()
    if choose.random() < _SHUFFLED_SHARE:
        choose.shuffle(stretch)
    return (stretch * (num_tokens // length + 1))[:num_tokens]
