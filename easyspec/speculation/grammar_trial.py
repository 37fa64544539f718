"""A process that tries grammars: each is compiled in a fork of its own, within limits, and thrown away.

`python -m easyspec.speculation.grammar_trial ARGUMENTS` reads grammars from its standard input and answers on its
standard output, a line of JSON each: an `Outcome`.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyspec.errors import InvalidRequestError
from easyspec.parallel.launch import die_with_parent
from easyspec.speculation.grammar import grammar_error
from easyspec.speculation.grammar_compilation import (
    COMPILER_STACK_BYTES,
    GrammarTokenizer,
    GrammarVocabulary,
    compile_grammar,
    load_tokenizer,
)
from easyspec.speculation.parameters import Grammar, GrammarKind, Thinking


@dataclass(frozen=True)
class TrialLimits:
    """What one grammar may take: seconds of CPU time, seconds by the clock, bytes beyond the tokenizer and the stack.

    The largest grammars that are compiled at all take 1 s and 90 MB on an idle machine.
    """

    cpu_s: int = 4
    wall_s: float = 30.0
    memory_bytes: int = 512 * 1024 * 1024


@dataclass(frozen=True)
class Outcome:
    """Why a grammar must not be compiled elsewhere (None: it may be), unless the machine left no time to find out."""

    refusal: str | None
    is_late: bool = False


def arguments(vocabulary: GrammarVocabulary, limits: TrialLimits) -> tuple[str, ...]:
    """The command line after the interpreter."""
    tokens = (str(vocabulary.folder), vocabulary.vocab_size, vocabulary.eos_token_ids)
    return ("-m", __name__, json.dumps([tokens, [limits.cpu_s, limits.wall_s, limits.memory_bytes]]))


def line_of(grammar: Grammar) -> bytes:
    """A grammar as the process reads it."""
    thinking = None if grammar.thinking is None else vars(grammar.thinking)
    return json.dumps([grammar.kind.value, grammar.text, thinking]).encode() + b"\n"


def main() -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    (folder, vocab_size, eos_token_ids), limits = json.loads(sys.argv[1])
    trial = _Trial(GrammarVocabulary(Path(folder), vocab_size, tuple(eos_token_ids)), TrialLimits(*limits))
    for line in sys.stdin.buffer:
        kind, text, thinking = json.loads(line)
        grammar = Grammar(GrammarKind(kind), text, None if thinking is None else Thinking(**thinking))
        outcome = trial.outcome(grammar)
        sys.stdout.buffer.write(json.dumps(vars(outcome)).encode() + b"\n")
        sys.stdout.buffer.flush()


class _Trial:
    def __init__(self, vocabulary: GrammarVocabulary, limits: TrialLimits) -> None:
        self._vocabulary = vocabulary
        self._limits = limits
        self._tokenizer: GrammarTokenizer | None = None

    def outcome(self, grammar: Grammar) -> Outcome:
        """What became of compiling the grammar in a fork."""
        try:
            if self._tokenizer is None:
                self._tokenizer = load_tokenizer(self._vocabulary, grammar)
        except InvalidRequestError as error:
            return Outcome(error.allowed)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            self._compile_and_exit(grammar, writer)
        os.close(writer)
        try:
            is_late = not select.select([reader], [], [], self._limits.wall_s)[0]
            if is_late:
                os.kill(child, signal.SIGKILL)
            answer = os.read(reader, 65536)  # less than a pipe holds; empty if it died
        finally:
            os.close(reader)
            _, status, used = os.wait4(child, 0)
        if answer:
            return Outcome(json.loads(answer))
        took_its_time = used.ru_utime + used.ru_stime >= self._limits.cpu_s
        if is_late and not took_its_time:
            return Outcome(None, is_late=True)
        ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        why = "the compiler does not survive it"
        if ended_by == signal.SIGXCPU or took_its_time:
            why = f"it takes longer than {self._limits.cpu_s} s to compile"
        elif ended_by == signal.SIGABRT:
            why = f"it takes more than {self._limits.memory_bytes >> 20} MiB to compile"
        return Outcome(grammar_error(grammar, why).allowed)

    def _compile_and_exit(self, grammar: Grammar, writer: int) -> None:
        """In the fork: never returns."""
        die_with_parent()
        limits = self._limits
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_s, limits.cpu_s + 1))
        statm = Path("/proc/self/statm")
        if statm.exists():  # elsewhere than on Linux memory is bounded by the time that it takes to fill
            held = int(statm.read_text().split()[0]) * resource.getpagesize()
            most = held + COMPILER_STACK_BYTES + limits.memory_bytes
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        answer: list[Any] = []

        def work() -> None:
            assert self._tokenizer is not None, "loaded before the fork"
            try:
                compile_grammar(grammar, self._tokenizer, self._vocabulary.vocab_size)
                answer.append(None)
            except InvalidRequestError as error:
                answer.append(error.allowed)
            except BaseException as error:  # the library panics with exceptions of its own, which are no Exception
                answer.append(grammar_error(grammar, f"the compiler failed ({type(error).__name__})").allowed)

        threading.stack_size(COMPILER_STACK_BYTES)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        os.write(writer, json.dumps(answer[0]).encode())
        os._exit(0)


if __name__ == "__main__":
    main()
