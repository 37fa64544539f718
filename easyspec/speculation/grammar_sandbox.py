"""Asks another process whether a grammar may be compiled here: the library does not survive every text."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys

import structlog

from easyspec.speculation.grammar import grammar_error
from easyspec.speculation.grammar_compilation import GrammarVocabulary
from easyspec.speculation.grammar_trial import TrialLimits, arguments, line_of
from easyspec.speculation.parameters import Grammar

# What the process itself may take to start and to read a large tokenizer on a busy machine.
_START_S = 60.0
_NUM_TRIES = 2

_log = structlog.get_logger()


class GrammarSandbox:
    """One process that tries grammars one by one, started when the first comes and replaced when it is lost.

    For one thread, which must live as long as the process is to.
    """

    def __init__(self, vocabulary: GrammarVocabulary, limits: TrialLimits) -> None:
        self._arguments = arguments(vocabulary, limits)
        self._patience_s = limits.wall_s + _START_S
        self._process: subprocess.Popen[bytes] | None = None

    def refusal(self, grammar: Grammar) -> str | None:
        """Why the grammar must not be compiled; None if it may be. Blocks within the limits, and never raises."""
        for _ in range(_NUM_TRIES):  # the process may have been killed by another hand
            answer = self._ask(line_of(grammar))
            if answer:
                said: str | None = json.loads(answer)
                return said
            self.close()
            _log.warning("grammar_sandbox_lost")
        return grammar_error(grammar, "the compiler does not survive it").allowed

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _ask(self, line: bytes) -> bytes:
        """The process's answer; empty if it is lost or late."""
        process = self._process or self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
        except OSError:
            return b""
        is_answering = select.select([process.stdout], [], [], self._patience_s)[0]
        return process.stdout.readline() if is_answering else b""

    def _started(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, *self._arguments]
        # Its standard error is not kept: the library's last words show parts of grammars.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"},
        )
        return self._process
