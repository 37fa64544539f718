"""What replies have in common: their head, usage, and what speculation did for them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from easyspec import __version__
from easyspec.speculation.parameters import SamplingParameters
from gateway.messages.chunk import Completion, GenerationChunk
from gateway.rest.errors import json_bytes

_SHOWN_PARAMETERS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def reply_head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """The fields that every chunk of a reply repeats."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": f"easyspec-{__version__}",
    }


class EventWriter:
    """Builds the SSE events of one reply. Only the choice differs between chunks: the rest is encoded once."""

    def __init__(self, head: dict[str, Any], includes_usage: bool) -> None:
        self._before = b"data: " + json_bytes(head)[:-1] + b',"choices":['
        self._after = (b'],"usage":null}' if includes_usage else b"]}") + b"\n\n"

    def choice(
        self, choice: dict[str, Any], trace: dict[str, Any] | None = None, usage: dict[str, Any] | None = None
    ) -> bytes:
        """A chunk with one choice, with `trace_fields` and the usage so far if there are any."""
        extension = b"]" if trace is None else b'],"easyspec":' + json_bytes(trace)
        after = self._after if usage is None else b'],"usage":' + json_bytes(usage) + b"}\n\n"
        return self._before + json_bytes(choice) + extension + after[1:]

    def usage(self, usage: dict[str, Any], metrics: dict[str, Any]) -> bytes:
        """The last chunk: no choices."""
        tail = b',"metrics":' + json_bytes(metrics) + b"}\n\n"
        return self._before + b'],"usage":' + json_bytes(usage) + tail


def schema_fields(completion: Completion) -> dict[str, Any]:
    """An extension of a choice under a schema that could not be enforced whole: what was checked at its end."""
    check = completion.schema_check
    if check is None:
        return {}
    told = {"unenforced": check.keywords, "valid": check.is_valid, "reason": check.reason or None}
    return {"schema_check": told}


def end_fields(completion: Completion | None) -> dict[str, Any]:
    """Why a choice ended, if it has."""
    if completion is None:
        return {"finish_reason": None}
    return {"finish_reason": completion.finish_reason.value, **schema_fields(completion)}


def trace_fields(chunk: GenerationChunk) -> dict[str, Any] | None:
    """`easyspec` of a streamed chunk: what was guessed in its round, what was right, and what it cost; None if the
    request did not ask. The token texts are those of `generation.proto`: of each token alone, so that joined they may
    differ from the text."""
    trace = chunk.trace
    if trace is None:
        return None
    return {
        "token_texts": chunk.token_texts,
        "accepted_rows": trace.accepted_rows,
        "tree": {"token_texts": trace.draft_token_texts, "parent_rows": trace.draft_tree.parent_rows},
        "timings_ms": chunk.timings.milliseconds,
        "num_fuzzy_steps": chunk.timings.num_fuzzy_steps,
        "ahead_ms": None if (ahead_ns := chunk.timings.ahead_ns) is None else ahead_ns / 1e6,
    }


class Tally:
    """Counts the choices of a request as they end: a prompt once, whatever the number of its choices. `seed` is the
    first choice's, as the client gave it."""

    def __init__(self, sampling: SamplingParameters, seed: int) -> None:
        self._sampling = sampling
        self._seed = seed
        self._completions: list[Completion] = []
        self._num_prompt_tokens: dict[int, int] = {}
        self._num_cached_tokens: dict[int, int] = {}
        self._num_tokens_so_far = 0

    def add(self, prompt_index: int, completion: Completion) -> None:
        self._completions.append(completion)
        self._num_prompt_tokens[prompt_index] = completion.num_prompt_tokens
        # A prompt's later choices find what its first one has computed.
        num_cached = self._num_cached_tokens.get(prompt_index, completion.num_cached_prompt_tokens)
        self._num_cached_tokens[prompt_index] = min(num_cached, completion.num_cached_prompt_tokens)

    def round(self, prompt_index: int, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """Some choice of a prompt has so many tokens more."""
        self._num_prompt_tokens[prompt_index] = num_prompt_tokens
        self._num_tokens_so_far += num_output_tokens

    @property
    def usage_so_far(self) -> dict[str, Any]:
        """The usage of a stream that goes on."""
        return _usage(sum(self._num_prompt_tokens.values()), self._num_tokens_so_far)

    @property
    def usage(self) -> dict[str, Any]:
        num_prompt_tokens = sum(self._num_prompt_tokens.values())
        num_output_tokens = sum(completion.num_output_tokens for completion in self._completions)
        num_reasoning_tokens = sum(completion.num_reasoning_tokens for completion in self._completions)
        return {
            **_usage(num_prompt_tokens, num_output_tokens),
            "prompt_tokens_details": {"cached_tokens": sum(self._num_cached_tokens.values())},
            "completion_tokens_details": {"reasoning_tokens": num_reasoning_tokens},
        }

    @property
    def metrics(self) -> dict[str, Any]:
        """An extension: how tokens were chosen, and vLLM's shape of what speculation did for all choices."""
        return {
            "seed": self._seed,
            "sampling": {name: getattr(self._sampling, name) for name in _SHOWN_PARAMETERS},
            "speculative_decoding": _speculative_decoding(self._completions),
        }


def _usage(num_prompt_tokens: int, num_output_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
    }


def _speculative_decoding(completions: Sequence[Completion]) -> dict[str, Any]:
    statistics = [completion.statistics for completion in completions]
    num_steps = sum(s.num_draft_rounds for s in statistics)
    num_accepted = sum(s.num_accepted_tokens for s in statistics)
    num_drafted = sum(s.num_draft_tokens for s in statistics)
    num_levels = max((len(s.num_accepted_by_level) for s in statistics), default=0)
    # Steps that accepted at least so many tokens; the histogram counts those with exactly so many.
    at_least = [num_steps] + [
        sum(s.num_accepted_by_level[level] for s in statistics if level < len(s.num_accepted_by_level))
        for level in range(num_levels)
    ]
    return {
        "mean_acceptance_length": 1 + num_accepted / num_steps if num_steps else 0.0,
        "draft_acceptance_rate": num_accepted / num_drafted if num_drafted else 0.0,
        "acceptance_histogram": [more - fewer for more, fewer in zip(at_least, [*at_least[1:], 0], strict=True)],
        "num_spec_steps": num_steps,
        "num_accepted_draft_tokens": num_accepted,
        "num_draft_tokens": num_drafted,
    }
