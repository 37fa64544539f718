"""Compiles grammars for a checkpoint's tokenizer: off the device thread, bounded in time and size, each text once."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import llguidance
import structlog

from easyspec.errors import CapacityError, EasyspecError, InvalidRequestError
from easyspec.speculation.grammar import CompiledGrammar, GrammarState, grammar_error
from easyspec.speculation.parameters import Grammar, GrammarKind
from easyspec.tokenizer_fingerprint import TOKENIZER_FILE

_log = structlog.get_logger()

# Work that the library may do: a tenth of its own defaults, with which a regex of 15 characters takes 1.6 s and
# 320 MB for its first mask and stalls everybody's steps afterwards. Elaborate real schemas need a few per cent of it.
_INITIAL_LEXER_FUEL = 100_000
_STEP_LEXER_FUEL = 50_000
# Compile time grows with the square of the number of terminals: 1 s at a thousand, 18 s at 4 700.
_MAX_LARK_LINES = 1000
# The library recurses over chains of rules: the usual 8 MiB overflow at 2 500 of them, which ends the process.
_WORKER_STACK_BYTES = 256 * 1024 * 1024
# The library lets any amount of white space stand between JSON tokens, of which some models never find an end.
_JSON_WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,64}"


@dataclass(frozen=True)
class CompilerLimits:
    """Grammars kept (least recently used go first), threads that compile, grammars that may wait for one, and
    seconds that a session's opening waits for its grammar."""

    num_kept: int = 32
    num_workers: int = 2
    max_waiting: int = 32
    timeout_s: float = 10.0


@dataclass(frozen=True)
class _Refusal:
    """What became of a grammar that cannot be compiled."""

    reason: str


@dataclass(eq=False)
class _Job:
    """A grammar at work or done; the future yields and never raises."""

    grammar: Grammar
    future: Future[CompiledGrammar | _Refusal]
    is_started: bool = False


class GrammarCompiler:
    """Compiles for the tokenizer of `folder`, which is read by `prepare` or when the first grammar comes.

    `vocab_size` is the model's (its tokenizer may have fewer entries, or more), `eos_token_ids` are the ends of
    sequence as the model has them.
    """

    def __init__(
        self,
        folder: Path,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        limits: CompilerLimits = CompilerLimits(),
    ) -> None:
        self._folder = folder
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._limits = limits
        self._jobs: OrderedDict[Grammar, _Job] = OrderedDict()
        self._inbox: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._num_workers = 0
        self._lock = threading.Lock()
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._tokenizer_lock = threading.Lock()

    async def compile(self, grammar: Grammar) -> CompiledGrammar:
        """The grammar, ready to be walked.

        Raises InvalidRequestError naming the grammar if it is wrong, matches nothing or takes too long, CapacityError
        if too many others are being compiled.
        """
        job = self.submit(grammar)
        try:
            outcome = await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(job)), self._limits.timeout_s)
        except TimeoutError:
            raise self._late(grammar) from None
        return _unwrapped(grammar, outcome)

    def prepare(self) -> None:
        """Begin to read the tokenizer, which takes a second with a large vocabulary; returns at once."""
        self.submit(Grammar(GrammarKind.REGEX, "a"))

    def submit(self, grammar: Grammar) -> Future[CompiledGrammar | _Refusal]:
        """Have it compiled if it is not yet; raises CapacityError. For `poll`."""
        with self._lock:
            job = self._jobs.get(grammar)
            if job is None or _is_spent(job):
                job = self._enqueued(grammar)
            self._jobs.move_to_end(grammar)
            return job.future

    def poll(self, grammar: Grammar) -> CompiledGrammar | None:
        """The grammar if it is compiled, without waiting; raises InvalidRequestError if it cannot be, CapacityError."""
        future = self.submit(grammar)
        return _unwrapped(grammar, future.result()) if future.done() else None

    def _enqueued(self, grammar: Grammar) -> _Job:
        unfinished = [job for job in self._jobs.values() if not job.future.done()]
        if len(unfinished) >= self._limits.num_workers + self._limits.max_waiting:
            raise CapacityError(f"{len(unfinished)} grammars are being compiled")
        job = self._jobs[grammar] = _Job(grammar, Future())
        for other in [*self._jobs]:
            if len(self._jobs) <= self._limits.num_kept:
                break
            if self._jobs[other].future.done():
                del self._jobs[other]
        if self._num_workers < min(self._limits.num_workers, len(unfinished) + 1):
            self._start_worker()
        self._inbox.put(job)
        return job

    def _start_worker(self) -> None:
        """A thread that lives as long as the process, and waits most of its life."""
        self._num_workers += 1
        previous = threading.stack_size(_WORKER_STACK_BYTES)
        try:
            threading.Thread(target=self._work, name="grammar-compiler", daemon=True).start()
        finally:
            threading.stack_size(previous)

    def _work(self) -> None:
        while True:
            job = self._inbox.get()
            job.is_started = True
            try:
                outcome: CompiledGrammar | _Refusal = self._compiled(job.grammar)
            except InvalidRequestError as error:
                outcome = _Refusal(error.allowed)
            except BaseException as error:  # the library panics with exceptions of its own, which are no Exception
                _log.exception("grammar_compilation_failed")
                outcome = _Refusal(f"what can be compiled, but the compiler failed ({type(error).__name__})")
            job.future.set_result(outcome)

    def _late(self, grammar: Grammar) -> EasyspecError:
        job = self._jobs.get(grammar)
        if job is not None and not job.is_started:
            return CapacityError("other grammars are being compiled")
        return grammar_error(grammar, f"it takes longer than {self._limits.timeout_s:g} s to compile")

    def _compiled(self, grammar: Grammar) -> CompiledGrammar:
        tokenizer = self._loaded_tokenizer(grammar)
        limits = llguidance.LLParserLimits(
            initial_lexer_fuel=_INITIAL_LEXER_FUEL, step_lexer_fuel=_STEP_LEXER_FUEL, verbose_errors=False
        )
        matcher = llguidance.LLMatcher(tokenizer, _source(grammar), log_level=0, limits=limits)
        if matcher.is_error():
            raise grammar_error(grammar, matcher.get_error())
        compiled = CompiledGrammar(grammar, matcher, self._vocab_size, tuple(tokenizer.eos_tokens))
        # Much is computed for the first mask; also, a language without any text shows here.
        GrammarState(compiled, ignore_eos=False).allowed_bits()
        return compiled

    def _loaded_tokenizer(self, grammar: Grammar) -> llguidance.LLTokenizer:
        with self._tokenizer_lock:
            if self._tokenizer is None:
                self._tokenizer = self._load_tokenizer(grammar)
            return self._tokenizer

    def _load_tokenizer(self, grammar: Grammar) -> llguidance.LLTokenizer:
        # Imported here: most processes never see a grammar.
        from tokenizers import Tokenizer

        try:
            backend = Tokenizer.from_file(str(self._folder / TOKENIZER_FILE))
        except Exception as error:  # the library raises plain Exceptions
            raise grammar_error(grammar, f"the model has no tokenizer here ({error})") from error
        backend.no_padding()
        backend.no_truncation()
        num_entries = backend.get_vocab_size(with_added_tokens=True)
        eos_token_ids = [token_id for token_id in self._eos_token_ids if token_id < min(num_entries, self._vocab_size)]
        if not eos_token_ids:
            raise grammar_error(grammar, "the model has no end-of-sequence token")
        try:
            return llguidance.LLTokenizer(
                backend.to_str(), n_vocab=max(self._vocab_size, num_entries), eos_token=eos_token_ids
            )
        except ValueError as error:
            raise grammar_error(grammar, f"the model's tokenizer does not serve grammars ({error})") from error


def _is_spent(job: _Job) -> bool:
    if not job.future.done():
        return False
    outcome = job.future.result()
    return isinstance(outcome, CompiledGrammar) and outcome.is_spent


def _unwrapped(grammar: Grammar, outcome: CompiledGrammar | _Refusal) -> CompiledGrammar:
    if isinstance(outcome, _Refusal):
        raise InvalidRequestError(f"sampling.grammar.{grammar.kind.value}", grammar.text, outcome.reason)
    return outcome


def _source(grammar: Grammar) -> str:
    """The grammar as the library wants it."""
    if grammar.kind is GrammarKind.LARK:
        num_lines = grammar.text.count("\n") + 1
        if num_lines > _MAX_LARK_LINES:
            raise grammar_error(grammar, f"it has {num_lines} lines, more than {_MAX_LARK_LINES}")
        return llguidance.LLMatcher.grammar_from_lark(grammar.text)
    if grammar.kind is GrammarKind.REGEX:
        return llguidance.LLMatcher.grammar_from_regex(grammar.text)
    # The schema that accepts everything may be written as `true`, which takes no options.
    text = "{}" if grammar.text.strip() == "true" else grammar.text
    try:
        return llguidance.LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": _JSON_WHITE_SPACE})
    except ValueError as error:
        raise grammar_error(grammar, str(error)) from error
