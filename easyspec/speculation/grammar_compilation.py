"""From a grammar's text to what sessions walk: bounds that need no compiler, then the library's own work."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llguidance

from easyspec.checkpoint.tokenizer_files import load_backend
from easyspec.errors import ConfigurationError
from easyspec.speculation.grammar import CompiledGrammar, GrammarState, grammar_error
from easyspec.speculation.parameters import Grammar, GrammarKind, Thinking
from easyspec.speculation.schemas import JSON_WHITE_SPACE, enforceable

# The library recurses over chains of rules: the usual 8 MiB overflow at 2 500 of them, which ends the process.
COMPILER_STACK_BYTES = 256 * 1024 * 1024
# Work that the library may do: a tenth of its own defaults, with which a regex of 15 characters takes 1.6 s and
# 320 MB for its first mask and stalls all steps afterwards. Elaborate real schemas need a few per cent of it.
_INITIAL_LEXER_FUEL = 100_000
_STEP_LEXER_FUEL = 50_000
# Compile time grows with the square of the number of terminals: 1 s at a thousand, 18 s at 4 700.
_MAX_LARK_LINES = 1000
# Between thinking and answer.
_BLANK = r"[ \n]{0,8}"
# The library makes 64-bit integers of doubles. The smallest integer has no negative: it recurses until the stack is
# full, and this is the next double. Beyond the largest one it takes that instead, without a word.
_SMALLEST_NUMBER = -(2**63 - 1024)
_LARGEST_NUMBER = 2**63 - 1
_MOST_DIGITS = 20
_LARK_JSON = "%json"
# An added token that vocabularies of bytes and of characters spell alike.
_MARK = re.compile("<[!-~]+>")
# A text, a regex, a comment, or what may be the name of a special token.
_LARK_WORD = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/(?:\\.|[^/\\\n])+/|<[^<>\s]+>')


@dataclass(frozen=True)
class GrammarVocabulary:
    """The tokens that grammars are compiled for: the tokenizer of `folder`, and vocabulary and ends of sequence as the
    model has them (the tokenizer may have fewer entries, or more)."""

    folder: Path
    vocab_size: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class GrammarTokenizer:
    """What the library knows of a tokenizer, and the ids of its special tokens by their texts."""

    library: llguidance.LLTokenizer
    special_ids: Mapping[str, int]


def load_tokenizer(vocabulary: GrammarVocabulary, grammar: Grammar) -> GrammarTokenizer:
    """What the library needs of the tokenizer, a second's work with a large one; raises InvalidRequestError."""
    try:
        backend = load_backend(vocabulary.folder)
    except ConfigurationError as error:
        raise grammar_error(grammar, f"the model has no tokenizer here ({error})") from error
    added = backend.get_added_tokens_decoder().items()
    special_ids = {token.content: token_id for token_id, token in added if token.special}
    backend.no_padding()
    backend.no_truncation()
    num_entries, vocab_size = backend.get_vocab_size(with_added_tokens=True), vocabulary.vocab_size
    eos_token_ids = [token_id for token_id in vocabulary.eos_token_ids if token_id < min(num_entries, vocab_size)]
    if not eos_token_ids:
        raise grammar_error(grammar, "the model has no end-of-sequence token")
    try:
        num_rows = max(vocab_size, num_entries)
        hidden = _as_the_library_reads_it(backend.to_str(), special_ids)
        library = llguidance.LLTokenizer(hidden, n_vocab=num_rows, eos_token=eos_token_ids)
        return GrammarTokenizer(library, special_ids)
    except ValueError as error:
        raise grammar_error(grammar, f"the model's tokenizer does not serve grammars ({error})") from error


def _as_the_library_reads_it(tokenizer_json: str, special_ids: Mapping[str, int]) -> str:
    """The tokenizer with other names for its special tokens, which no text contains, and added tokens that are text
    among the others.

    Where only one text can follow, the library has the tokenizer cut it. It would cut `<|im_end|>` in a text into the
    special token, which the library then does not take for that text. Any added token like `<think>` is special to it,
    so no text could have one: Qwen3 could not end its thinking.
    """
    names = {name: f"\ufdd0{secrets.token_hex(8)}{name}" for name in special_ids}
    content: dict[str, Any] = json.loads(tokenizer_json)
    added = content["added_tokens"]
    for token in added:
        token["content"] = names.get(token["content"], token["content"])
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(name, name): token_id for name, token_id in model["vocab"].items()}
        # With all of them there, each keeps its id.
        model["vocab"] |= {token["content"]: token["id"] for token in added}
        content["added_tokens"] = [
            token for token in added if token["special"] or not _MARK.fullmatch(token["content"])
        ]
    else:
        model["vocab"] = [[names.get(name, name), score] for name, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return json.dumps(content)


def compile_grammar(grammar: Grammar, tokenizer: GrammarTokenizer, vocab_size: int) -> CompiledGrammar:
    """The grammar, its first mask computed; wants COMPILER_STACK_BYTES of stack.

    Raises InvalidRequestError. A text that is not known to be harmless may end the process, or keep it for ever.
    """
    limits = llguidance.LLParserLimits(
        initial_lexer_fuel=_INITIAL_LEXER_FUEL, step_lexer_fuel=_STEP_LEXER_FUEL, verbose_errors=False
    )
    source = _source(grammar, tokenizer.special_ids)
    if grammar.thinking is not None:
        source = _after_thinking(source, grammar.thinking, tokenizer.special_ids)
    matcher = llguidance.LLMatcher(tokenizer.library, source, log_level=0, limits=limits)
    if matcher.is_error():
        raise grammar_error(grammar, matcher.get_error())
    compiled = CompiledGrammar(grammar, matcher, vocab_size, tuple(tokenizer.library.eos_tokens))
    # Much is computed for the first mask; also, a language without any text shows here.
    GrammarState(compiled, ignore_eos=False).allowed_bits()
    return compiled


def check_numbers(grammar: Grammar) -> None:
    """Raise InvalidRequestError if a JSON Schema, or one within Lark, has a number that the library cannot bear.

    What is not JSON is left to the library.
    """

    def check(text: str) -> float:
        value = int(text) if text.lstrip("-").isdigit() and len(text) <= _MOST_DIGITS else float(text)
        if not _SMALLEST_NUMBER <= value <= _LARGEST_NUMBER:
            shown = text if len(text) <= 40 else f"{text[:37]}..."
            raise grammar_error(grammar, f"the number {shown} is not from {_SMALLEST_NUMBER} to {_LARGEST_NUMBER}")
        return value

    if grammar.kind is GrammarKind.REGEX:
        return
    parts = grammar.text.split(_LARK_JSON)[1:] if grammar.kind is GrammarKind.LARK else [grammar.text]
    decoder = json.JSONDecoder(parse_int=check, parse_float=check)
    for part in parts:
        with contextlib.suppress(json.JSONDecodeError, RecursionError):
            decoder.raw_decode(part.lstrip())


def _source(grammar: Grammar, special_ids: Mapping[str, int]) -> str:
    """The grammar as the library wants it."""
    check_numbers(grammar)
    if grammar.kind is GrammarKind.LARK:
        num_lines = grammar.text.count("\n") + 1
        if num_lines > _MAX_LARK_LINES:
            raise grammar_error(grammar, f"it has {num_lines} lines, more than {_MAX_LARK_LINES}")
        return llguidance.LLMatcher.grammar_from_lark(_with_ids(grammar.text, special_ids))
    if grammar.kind is GrammarKind.REGEX:
        return llguidance.LLMatcher.grammar_from_regex(grammar.text)
    # The schema that accepts everything may be written as `true`, which takes no options.
    text = "{}" if grammar.text.strip() == "true" else grammar.text
    try:
        schema = enforceable(text, keeps_one_of=True)
        text = text if schema.unenforced else schema.text  # the library has its own words for what it does not know
        return llguidance.LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": JSON_WHITE_SPACE})
    except ValueError as error:
        raise grammar_error(grammar, str(error)) from error


def _with_ids(lark: str, special_ids: Mapping[str, int]) -> str:
    """The same with special tokens by number in place of their names, which the library does not know."""

    def by_number(found: re.Match[str]) -> str:
        token_id = special_ids.get(found.group())
        return found.group() if token_id is None else f"<[{token_id}]>"

    return _LARK_WORD.sub(by_number, lark)


def _after_thinking(source: str, thinking: Thinking, special_ids: Mapping[str, int]) -> str:
    """A grammar in the library's form for an output that may begin with thinking.

    Its text is free, special tokens apart; the closing mark ends it wherever it falls, also within a token. Special
    tokens in marks are these tokens alone.
    """
    opening, closing, beginning = (
        _in_lark(mark, special_ids) for mark in (thinking.opening, thinking.closing, thinking.answer)
    )
    if closing[0].startswith("<"):
        thoughts = "thoughts: /(.|\\n)*/"
    else:
        thoughts = f"thoughts[suffix={closing.pop(0)}]: /(.|\\n)*/"
    between = beginning or ["blank"]
    thought = ["thoughts", *closing]
    if thinking.is_open:
        start = [*thought, *between]
    else:
        before = [*opening, *thought] if beginning else [*opening, *thought, *between]
        start = ["(", *before, ")?", *beginning]
    lark = f"start: {' '.join(start)} @answer\nblank: /{_BLANK}/\n{thoughts}"
    try:
        answer = json.loads(source)["grammars"][0]
    except ValueError:
        answer = {"lark_grammar": source}
    answer["name"] = "answer"
    return json.dumps({"grammars": [{"name": "thinking", "lark_grammar": lark}, answer]})


def _in_lark(mark: str, special_ids: Mapping[str, int]) -> list[str]:
    """A mark as terms of Lark, one after the other: its special tokens, and the texts between them."""
    names = [name for name in special_ids if name and name in mark]
    pieces = (
        re.split("(" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + ")", mark) if names else [mark]
    )
    return [f"<[{special_ids[piece]}]>" if piece in special_ids else json.dumps(piece) for piece in pieces if piece]
