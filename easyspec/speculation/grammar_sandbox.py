"""Asks another process whether a grammar may be compiled here: the library does not survive every text."""

from __future__ import annotations

import json

import structlog

from easyspec.errors import CapacityError
from easyspec.line_process import LineProcess
from easyspec.speculation.grammar import grammar_error
from easyspec.speculation.grammar_compilation import GrammarVocabulary
from easyspec.speculation.grammar_trial import Outcome, TrialLimits, arguments, line_of
from easyspec.speculation.parameters import Grammar

# What the process itself may take to start and to read a large tokenizer on a busy machine.
_START_S = 120.0
# What it may take to tell beside what the grammar may take.
_SLACK_S = 10.0
_NUM_TRIES = 2
_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}

_log = structlog.get_logger()


class GrammarSandbox:
    """One process that tries grammars one by one, started when the first comes and replaced when it is lost.

    For one thread, which must live as long as the process is to.
    """

    def __init__(self, vocabulary: GrammarVocabulary, limits: TrialLimits) -> None:
        self._process = LineProcess(arguments(vocabulary, limits), limits.wall_s + _SLACK_S, _START_S, _ENVIRONMENT)

    def refusal(self, grammar: Grammar) -> str | None:
        """Why the grammar must not be compiled; None if it may be. Blocks within the limits.

        Raises CapacityError if the machine had no time to find out.
        """
        for _ in range(_NUM_TRIES):  # the process may have been killed by another hand
            try:
                answer = self._process.ask(line_of(grammar))
            except TimeoutError:
                raise CapacityError("the machine is too busy to compile grammars") from None
            if answer:
                outcome = Outcome(**json.loads(answer))
                if outcome.is_late:
                    raise CapacityError("the machine is too busy to compile the grammar")
                return outcome.refusal
            _log.warning("grammar_sandbox_lost")
        return grammar_error(grammar, "the compiler does not survive it").allowed

    def close(self) -> None:
        self._process.close()
