"""`python -m bench grammar`: what structured output costs the verifier.

Microseconds per row of what it does under a grammar, on the bundled vocabulary and on a made-up one of 128 000 tokens.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from bench.harness.benchmark import Benchmark, Findings, as_plain
from bench.harness.flags import flag
from bench.harness.tables import Column, ResultTable
from easyspec.cli.processes import DEFAULT_BASE
from easyspec.speculation.grammar import GrammarState
from easyspec.speculation.grammar_compiler import GrammarCompiler
from easyspec.speculation.parameters import (
    Grammar,
    GrammarKind,
    LayerPlanRequest,
    MlpPlacement,
)
from easyspec.speculation.token_mask import mask_forbidden_
from easyspec.tokenizer_fingerprint import TOKENIZER_FILE

_PERSON = """{"type": "object", "properties": {
  "name": {"type": "string", "maxLength": 24}, "age": {"type": "integer", "minimum": 0, "maximum": 120},
  "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 3},
  "state": {"enum": ["active", "suspended", "closed"]}},
  "required": ["name", "age", "tags", "state"], "additionalProperties": false}"""
GRAMMARS = {
    "json schema": Grammar(GrammarKind.JSON_SCHEMA, _PERSON),
    "any json": Grammar(GrammarKind.JSON_SCHEMA, "{}"),
    "regex": Grammar(GrammarKind.REGEX, "(GET|POST|DELETE) /[a-z/]{1,40} HTTP/1[.][01]"),
}
_TEXTS = {
    "json schema": '{"name": "Ada Lovelace", "age": 36, "tags": ["math", "poetry"], "state": "active"}',
    "any json": '{"a": [1, 2.5, {"b": "hello world"}, null], "c": true, "key": "a longer string, with punctuation."}',
    "regex": "POST /users/ada/notes HTTP/1.1",
}
_WIDE_VOCAB_SIZE = 128_000
_PLAN = LayerPlanRequest(6, MlpPlacement.STAGED)


_COLUMNS = (
    Column("V", "vocab_size"),
    Column("grammar", "grammar"),
    Column("compile ms", "compile_ms", ".1f"),
    Column("mask us", "mask_us", ".1f"),
    Column("p99", "mask_p99_us", ".1f"),
    Column("advance", "advance_us", ".1f"),
    Column("apply", "apply_us", ".1f"),
)


@dataclass(frozen=True)
class GrammarSettings:
    """One run."""

    repetitions: Annotated[int, flag("Texts that masks are measured on.", minimum=1)] = 50


@dataclass(frozen=True)
class MaskCost:
    """Microseconds for a row: the mask itself (median, 99th percentile), a step of the state, the masking of logits."""

    compile_ms: float
    mask_us: float
    mask_p99_us: float
    advance_us: float
    apply_us: float


def write_wide_tokenizer(folder: Path, vocab_size: int) -> Path:
    """The bundled vocabulary and pairs of its entries, as many as are wanted: tokens of a real one's lengths."""
    base = Backend.from_file(str(DEFAULT_BASE / TOKENIZER_FILE))
    entries = sorted(base.get_vocab(with_added_tokens=False), key=lambda token: base.token_to_id(token) or 0)
    vocabulary = {token: index for index, token in enumerate(["<|endoftext|>", *entries])}
    for first in entries[256:]:
        for second in entries[256::7]:
            if len(vocabulary) == vocab_size:
                break
            vocabulary.setdefault(first + second, len(vocabulary))
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(folder / TOKENIZER_FILE))
    return folder


async def mask_cost(folder: Path, vocab_size: int, name: str, num_repetitions: int) -> MaskCost:
    """Follow a text under the grammar `name`, cold lexer and warm alike."""
    with closing(GrammarCompiler(folder, vocab_size, (0,))) as compiler:
        await compiler.compile(Grammar(GrammarKind.REGEX, "a"))  # reads the tokenizer
        begin = time.perf_counter()
        compiled = await compiler.compile(GRAMMARS[name])
        compile_ms = (time.perf_counter() - begin) * 1e3
    token_ids = Backend.from_file(str(folder / TOKENIZER_FILE)).encode(_TEXTS[name]).ids
    logits = torch.zeros(1, vocab_size)
    masks: list[float] = []
    advances: list[float] = []
    applications: list[float] = []
    for _ in range(num_repetitions):
        state = GrammarState(compiled, ignore_eos=False)
        for token_id in token_ids:
            begins_ns = time.perf_counter_ns()
            bits = state.allowed_bits()
            masked_ns = time.perf_counter_ns()
            mask_forbidden_(logits, [0], [bits])
            applied_ns = time.perf_counter_ns()
            is_allowed = state.advance(token_id)
            advanced_ns = time.perf_counter_ns()
            masks.append((masked_ns - begins_ns) / 1e3)
            applications.append((applied_ns - masked_ns) / 1e3)
            advances.append((advanced_ns - applied_ns) / 1e3)
            assert is_allowed, "the text matches the grammar"
    return MaskCost(
        compile_ms,
        statistics.median(masks),
        sorted(masks)[int(0.99 * (len(masks) - 1))],
        statistics.median(advances),
        statistics.median(applications),
    )


async def mask_costs(num_repetitions: int) -> list[dict[str, Any]]:
    """One row a vocabulary and grammar."""
    rows = []
    with tempfile.TemporaryDirectory() as wide:
        folders = {4096: DEFAULT_BASE, _WIDE_VOCAB_SIZE: write_wide_tokenizer(Path(wide), _WIDE_VOCAB_SIZE)}
        for vocab_size, folder in folders.items():
            for name in GRAMMARS:
                cost = await mask_cost(folder, vocab_size, name, num_repetitions)
                rows.append({"vocab_size": vocab_size, "grammar": name, **as_plain(cost)})
    return rows


async def measure(settings: GrammarSettings, console: Console) -> Findings:
    """One row a vocabulary and grammar, on one thread."""
    torch.set_num_threads(1)
    rows = await mask_costs(settings.repetitions)
    return Findings({"results": rows}, [ResultTable("microseconds a row", _COLUMNS, rows)])


BENCHMARK = Benchmark("python -m bench grammar", __doc__, GrammarSettings, measure)
