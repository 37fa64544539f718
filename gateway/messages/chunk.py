"""What a client is told of its request: the chunks of a choice, and its end."""

from __future__ import annotations

from dataclasses import dataclass

from easyspec.speculation.messages import TokenLogprobs
from easyspec.speculation.parameters import FinishReason
from gateway.messages.statistics import RoundTimings, RoundTrace, SpeculationStatistics
from gateway.text.schema_check import SchemaCheck
from gateway.text.tool_parser import Part, ToolCallDelta


@dataclass(frozen=True)
class Completion:
    """The end of a choice. With STOP exactly one of the `matched_` fields is set; none where a call ended it."""

    finish_reason: FinishReason
    matched_token_id: int | None
    matched_stop_string: str | None
    num_prompt_tokens: int
    num_output_tokens: int
    statistics: SpeculationStatistics
    seed: int
    num_reasoning_tokens: int = 0
    num_cached_prompt_tokens: int = 0
    schema_check: SchemaCheck | None = None


@dataclass(frozen=True)
class GenerationChunk:
    """One round of a choice; `completion` is set on its last one only, `trace` if the request wants it.

    `text` is what is said, `tool_calls` what is called, `reasoning` what was thought; `parts` are these in the order of
    the output, of which `num_chars` became final. With logprobs there is one entry per token, None for a token
    that nothing precedes. An echoed prompt is a chunk of its own, the choice's first.
    """

    text: str
    token_ids: tuple[int, ...]
    num_accepted: int
    token_texts: tuple[str, ...]
    timings: RoundTimings
    completion: Completion | None
    choice_index: int = 0
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    trace: RoundTrace | None = None
    tool_calls: tuple[ToolCallDelta, ...] = ()
    reasoning: str = ""
    parts: tuple[Part, ...] = ()
    num_chars: int = 0
