"""Compiles grammars for a checkpoint's tokenizer: off the device thread, bounded in time and size, each text once.

A grammar is compiled twice: in a process of its own, which it may end or fill, and then, if that went well, here.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias

import structlog

from easyspec.errors import CapacityError, InvalidRequestError
from easyspec.free_memory import return_free_memory
from easyspec.speculation.grammar import CompiledGrammar
from easyspec.speculation.grammar_compilation import (
    COMPILER_STACK_BYTES,
    GrammarTokenizer,
    GrammarVocabulary,
    compile_grammar,
    load_tokenizer,
)
from easyspec.speculation.grammar_sandbox import GrammarSandbox
from easyspec.speculation.grammar_trial import TrialLimits
from easyspec.speculation.parameters import Grammar, GrammarKind

# An idle core reads 50 000 tokens in 2 s.
_PREPARING_S = 5.0

_log = structlog.get_logger()


@dataclass(frozen=True)
class CompilerLimits:
    """Grammars kept (least recently used go first), threads that compile, grammars that may wait for one, seconds that
    a session's opening waits for its grammar, and what compiling one may take."""

    num_kept: int = 32
    num_workers: int = 2
    max_waiting: int = 32
    timeout_s: float = 10.0
    trial: TrialLimits = field(default_factory=TrialLimits)


@dataclass(frozen=True)
class _Refusal:
    """What became of a grammar that cannot be compiled."""

    reason: str


@dataclass(frozen=True)
class _Delay:
    """The machine had no time for a grammar; the next request has it tried anew."""

    reason: str


_Outcome: TypeAlias = CompiledGrammar | _Refusal | _Delay


@dataclass(eq=False)
class _Job:
    """A grammar at work or done; the future yields and never raises."""

    grammar: Grammar
    future: Future[_Outcome]
    is_started: bool = False


class GrammarCompiler:
    """Compiles for the tokenizer of `folder`, which is read when the first grammar comes.

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
        self._vocabulary = GrammarVocabulary(folder, vocab_size, eos_token_ids)
        self._limits = limits
        self._jobs: OrderedDict[Grammar, _Job] = OrderedDict()
        self._inbox: queue.SimpleQueue[Callable[[GrammarSandbox], None] | None] = queue.SimpleQueue()
        self._num_workers = 0
        self._lock = threading.Lock()
        self._tokenizer: GrammarTokenizer | None = None
        self._tokenizer_lock = threading.Lock()

    async def compile(self, grammar: Grammar) -> CompiledGrammar:
        """The grammar, ready to be walked.

        Raises InvalidRequestError naming the grammar if it is wrong, matches nothing or takes too much processor time,
        CapacityError if it had to wait too long for others or for the machine.
        """
        job = self.submit(grammar)
        try:
            outcome = await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(job)), self._limits.timeout_s)
        except TimeoutError:
            waiting = self._jobs.get(grammar)
            if waiting is not None and not waiting.is_started:
                raise CapacityError("other grammars are being compiled") from None
            # One that takes too much processor time itself is refused by its trial: waiting took the rest.
            late = f"the grammar was not compiled within {self._limits.timeout_s:g} s; compiling it goes on"
            raise CapacityError(late) from None
        return _unwrapped(grammar, outcome)

    def prepare(self) -> None:
        """Start the process that tries grammars and let it read the tokenizer, before the first requests want the
        cores; what takes longer than a few seconds goes on behind them.

        Here it is read with the first grammar: 0.7 s then, and 37 MiB for 49 000 tokens.
        """
        is_ready = threading.Event()

        def start(sandbox: GrammarSandbox) -> None:
            with contextlib.suppress(CapacityError, OSError):  # a grammar that comes will say so
                sandbox.refusal(Grammar(GrammarKind.REGEX, "a"))
            is_ready.set()

        with self._lock:
            self._start_worker()
        self._inbox.put(start)
        is_ready.wait(_PREPARING_S)

    def submit(self, grammar: Grammar) -> Future[_Outcome]:
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

    def close(self) -> None:
        """End threads and processes after the grammars at work; what waits is never compiled."""
        with self._lock:
            for _ in range(self._num_workers):
                self._inbox.put(None)
            self._num_workers = 0

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
        self._inbox.put(partial(self._finish, job))
        return job

    def _start_worker(self) -> None:
        """A thread that lives as long as the process, and waits most of its life."""
        self._num_workers += 1
        previous = threading.stack_size(COMPILER_STACK_BYTES)
        try:
            threading.Thread(target=self._work, name="grammar-compiler", daemon=True).start()
        finally:
            threading.stack_size(previous)

    def _work(self) -> None:
        sandbox = GrammarSandbox(self._vocabulary, self._limits.trial)
        while (task := self._inbox.get()) is not None:
            task(sandbox)
        sandbox.close()

    def _finish(self, job: _Job, sandbox: GrammarSandbox) -> None:
        job.is_started = True
        outcome: _Outcome
        try:
            outcome = self._compiled(job.grammar, sandbox)
        except InvalidRequestError as error:
            outcome = _Refusal(error.allowed)
        except CapacityError as error:
            outcome = _Delay(str(error))
        except BaseException as error:  # the library panics with exceptions of its own, which are no Exception
            _log.exception("grammar_compilation_failed")
            outcome = _Refusal(f"what can be compiled, but the compiler failed ({type(error).__name__})")
        job.future.set_result(outcome)

    def _compiled(self, grammar: Grammar, sandbox: GrammarSandbox) -> CompiledGrammar | _Refusal:
        reason = sandbox.refusal(grammar)
        if reason is not None:
            return _Refusal(reason)
        with self._tokenizer_lock:
            if self._tokenizer is None:
                self._tokenizer = load_tokenizer(self._vocabulary, grammar)
                return_free_memory()
        return compile_grammar(grammar, self._tokenizer, self._vocabulary.vocab_size)


def _is_spent(job: _Job) -> bool:
    if not job.future.done():
        return False
    outcome = job.future.result()
    return isinstance(outcome, _Delay) or (isinstance(outcome, CompiledGrammar) and outcome.is_spent)


def _unwrapped(grammar: Grammar, outcome: _Outcome) -> CompiledGrammar:
    if isinstance(outcome, _Refusal):
        raise InvalidRequestError(f"sampling.grammar.{grammar.kind.value}", grammar.text, outcome.reason)
    if isinstance(outcome, _Delay):
        raise CapacityError(outcome.reason)
    return outcome
