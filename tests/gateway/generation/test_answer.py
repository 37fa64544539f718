"""An answer is the same however its tokens come in rounds, also where it ends inside one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from easyspec.speculation.parameters import Thinking
from gateway.generation.answer import AnswerForm, AnswerText
from gateway.text.conversation import ToolDefinition, ToolMode, Tools
from gateway.text.tokenizer import Tokenizer
from gateway.text.tool_parser import ParsedText, joined
from gateway.text.tools import ToolDialect

CALL = '{"name": "time", "arguments": {"a": 1}}'
THINKING = Thinking("<think>", "</think>", is_open=True)


def read(tokenizer: Tokenizer, form: AnswerForm, rounds: Iterable[tuple[list[int], bool]]) -> Any:
    """Everything that a client is told of an answer."""
    answer = AnswerText(tokenizer, form)
    taken = []
    for token_ids, is_last in rounds:
        taken.append(answer.push(token_ids, is_last))
        if taken[-1].is_over or taken[-1].matched_stop is not None:
            break
    parsed = ParsedText(tuple(part for one in taken for part in one.parsed.parts))
    calls = [(call.name, call.arguments) for call in joined(parsed.calls)]
    counts = [sum(getattr(one, name) for one in taken) for name in ("num_tokens", "num_reasoning_tokens", "num_chars")]
    return parsed.text, parsed.reasoning, calls, counts, taken[-1].matched_stop, taken[-1].is_over


@pytest.mark.parametrize(
    ("dialect", "mode", "written"),
    [
        (ToolDialect.HERMES, ToolMode.AUTO, f"ok\n<tool_call>{CALL}</tool_call> and STOP, more"),
        (ToolDialect.HERMES, ToolMode.AUTO, f"ok <tool_call>{CALL}</tool_call>STOP"),
        (ToolDialect.HERMES, ToolMode.REQUIRED, f"{CALL} STOP and more"),
        (ToolDialect.NONE, ToolMode.REQUIRED, f"[{CALL}, {CALL}]"),
        (ToolDialect.MISTRAL, ToolMode.AUTO, f"[TOOL_CALLS] [{CALL}, {CALL}] more"),
        (ToolDialect.MISTRAL_ARGS, ToolMode.AUTO, 'a[TOOL_CALLS]time[ARGS]{"a": 1}[TOOL_CALLS]time[ARGS]{"a": 1}'),
        (ToolDialect.LLAMA3_JSON, ToolMode.AUTO, f"{CALL}; {CALL} STOP"),
        (
            ToolDialect.HARMONY,
            ToolMode.AUTO,
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.time"
            '<|message|>{"a": 1}<|call|><|start|>assistant<|channel|>final<|message|>STOP',
        ),
    ],
)
@pytest.mark.parametrize("thinks", [False, True])
def test_an_answer_that_one_call_ends(
    tokenizer: Tokenizer, dialect: ToolDialect, mode: ToolMode, written: str, thinks: bool
) -> None:
    tools = Tools((ToolDefinition("time"),), mode, is_parallel=False)
    thinking = THINKING if thinks and dialect is not ToolDialect.HARMONY else None
    form = AnswerForm(("STOP",), tools=tools, dialect=dialect, thinking=thinking)
    token_ids = tokenizer.encode(f"hm</think>\n{written}" if thinking else written)

    def rounds(size: int) -> Iterable[tuple[list[int], bool]]:
        return ((token_ids[i : i + size], i + size >= len(token_ids)) for i in range(0, len(token_ids), size))

    plain = read(tokenizer, form, rounds(1))
    assert plain[2] == [("time", '{"a": 1}')]
    assert (plain[4], plain[5]) == (None, True)
    for size in (2, 3, 5, 8, 16, len(token_ids)):
        assert read(tokenizer, form, rounds(size)) == plain
