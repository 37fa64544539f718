"""`python -m bench grammar`: what structured output costs, and what it does to acceptance.

`masks`: microseconds per row of what the verifier does under a grammar, on the bundled vocabulary and on a made-up one
of 128 000 tokens. `acceptance`: tokens per round under JSON schemas on the bundled pair, the engines in this process,
with a drafter that knows the grammar and with one that does not; what counts is which tokens are accepted.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from bench.harness.benchmark import Benchmark, Findings, as_plain
from bench.harness.flags import flag, one_of
from bench.harness.tables import Column, ResultTable
from drafter_service.config import DrafterSettings
from drafter_service.engine import DrafterEngine
from easyspec.cli.processes import DEFAULT_BASE, DEFAULT_DRAFT
from easyspec.speculation.grammar import GrammarState
from easyspec.speculation.grammar_compiler import GrammarCompiler
from easyspec.speculation.messages import Calibration, OpenSpeculation, OpenVerification
from easyspec.speculation.parameters import (
    Grammar,
    GrammarKind,
    LayerPlanRequest,
    MlpPlacement,
    SamplingParameters,
    StopConditions,
    TreeBudget,
)
from easyspec.speculation.sources import DraftSources
from easyspec.speculation.token_mask import mask_forbidden_
from easyspec.speculation.token_tree import TokenTree
from easyspec.tokenizer_fingerprint import TOKENIZER_FILE
from gateway.decode_loop import TimedDraft, TimedVerdict, decode
from gateway.speculation_policy import FixedPolicy
from gateway.tokenizer import Tokenizer
from models.heldout import held_out_prompts
from verifier_service.config import VerifierSettings
from verifier_service.engine import VerifierEngine

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


_MASK_COLUMNS = (
    Column("V", "vocab_size"),
    Column("grammar", "grammar"),
    Column("compile ms", "compile_ms", ".1f"),
    Column("mask us", "mask_us", ".1f"),
    Column("p99", "mask_p99_us", ".1f"),
    Column("advance", "advance_us", ".1f"),
    Column("apply", "apply_us", ".1f"),
)
_ACCEPTANCE_COLUMNS = (
    Column("T", "temperature", "g"),
    Column("grammar", "grammar"),
    Column("preferring", "preferring", ".2f"),
    Column("ignorant", "ignorant", ".2f"),
)


@dataclass(frozen=True)
class GrammarSettings:
    """One run."""

    table: Annotated[str, typer.Argument(metavar="masks|acceptance", parser=one_of(("masks", "acceptance")))]
    repetitions: Annotated[int, flag("Texts that masks are measured on.", minimum=1)] = 50
    budget: Annotated[tuple[int, int, int], flag("Tree.", metavar="LEVELS WIDTH NODES")] = (5, 4, 15)
    num_prompts: Annotated[int, flag("Held-out prompts.", minimum=1)] = 16
    max_tokens: Annotated[int, flag("Tokens per completion.", minimum=1)] = 96


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


@dataclass(frozen=True)
class _Session:
    """Both sides of one request, as the decode loop wants them."""

    verifier: VerifierEngine
    drafter: DrafterEngine
    verifier_id: int
    drafter_id: int

    async def verify(self, base_length: int, tree: TokenTree, num_plain_rounds: int = 0) -> TimedVerdict:
        verdict, timings = await self.verifier.verify(self.verifier_id, base_length, tree)
        return TimedVerdict(verdict, timings, elapsed_ns=0)

    async def draft(self, calibration: Calibration) -> TimedDraft:
        draft = await self.drafter.draft(self.drafter_id, calibration)
        return TimedDraft(draft.tree, draft.timings)

    def skip(self, token_ids: Sequence[int]) -> None:
        """A fixed budget skips nothing."""


async def _count_tokens(
    verifier: VerifierEngine,
    drafter: DrafterEngine,
    opening: OpenVerification,
    budget: TreeBudget,
    draft_sampling: SamplingParameters | None = None,
) -> tuple[int, int]:
    """Output tokens and rounds of one completion, the first round (the empty tree) left out.

    The drafter is told `draft_sampling`, by default the verifier's.
    """
    prompt, sampling = opening.prompt_token_ids, draft_sampling or opening.sampling
    length = len(prompt) + (opening.stop.max_tokens or 0)
    session = _Session(
        verifier,
        drafter,
        await verifier.open(opening),
        await drafter.open(
            OpenSpeculation(prompt, sampling, _PLAN, max_total_length=length, sources=DraftSources.MODEL)
        ),
    )
    async with aclosing(decode(len(prompt), FixedPolicy(None, budget), session, session)) as rounds:
        counts = [len(round_.answer.verdict.token_ids) async for round_ in rounds]
    verifier.close(session.verifier_id)
    drafter.close(session.drafter_id)
    return sum(counts[1:]), len(counts) - 1


async def acceptance(settings: GrammarSettings) -> list[dict[str, Any]]:
    """One row a temperature and grammar: tokens per round of a drafter that knows it, and of one that does not."""
    verifier = VerifierEngine(VerifierSettings(model=str(DEFAULT_BASE)))
    drafter = DrafterEngine(DrafterSettings(model=str(DEFAULT_DRAFT)))
    tokenizer = Tokenizer.load(DEFAULT_BASE)
    texts = held_out_prompts(settings.num_prompts, seed=7, max_chars=600)
    prompts = [tuple(tokenizer.encode(text)) for text in texts]
    budget, stop = TreeBudget(*settings.budget), StopConditions(settings.max_tokens)
    rows = []
    await asyncio.gather(verifier.start(), drafter.start())
    try:
        for temperature in (0.0, 0.8):
            for name, grammar in GRAMMARS.items():
                sampling = SamplingParameters(seed=0, temperature=temperature, grammar=grammar)
                openings = [
                    OpenVerification(prompt, replace(sampling, seed=100 + index), stop)
                    for index, prompt in enumerate(prompts)
                ]
                preferring, ignorant = [
                    await _tokens_per_round(verifier, drafter, openings, budget, knows=knows) for knows in (True, False)
                ]
                row = {"temperature": temperature, "grammar": name, "preferring": preferring, "ignorant": ignorant}
                rows.append(row)
    finally:
        await asyncio.gather(verifier.stop(), drafter.stop())
    return rows


async def _tokens_per_round(
    verifier: VerifierEngine,
    drafter: DrafterEngine,
    openings: Sequence[OpenVerification],
    budget: TreeBudget,
    *,
    knows: bool,
) -> float:
    counts = await asyncio.gather(
        *(
            _count_tokens(
                verifier,
                drafter,
                opening,
                budget,
                opening.sampling if knows else replace(opening.sampling, grammar=None),
            )
            for opening in openings
        )
    )
    return sum(tokens for tokens, _ in counts) / max(1, sum(rounds for _, rounds in counts))


async def measure(settings: GrammarSettings, console: Console) -> Findings:
    """One of the tables."""
    if settings.table == "masks":
        torch.set_num_threads(1)
        rows = await mask_costs(settings.repetitions)
        return Findings({"results": rows}, [ResultTable("microseconds a row", _MASK_COLUMNS, rows)])
    rows = await acceptance(settings)
    table = ResultTable("tokens per round, by what the drafter knows", _ACCEPTANCE_COLUMNS, rows)
    return Findings({"results": rows}, [table], checkpoints=[DEFAULT_BASE, DEFAULT_DRAFT])


BENCHMARK = Benchmark("python -m bench grammar", __doc__, GrammarSettings, measure)
