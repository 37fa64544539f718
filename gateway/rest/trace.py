"""A round's trace as JSON: the `easyspec` field of a streamed chunk, for requests with `speculation.trace`."""

from __future__ import annotations

from typing import Any

from gateway.text.output import GenerationChunk

_NS_PER_MS = 1e6


def trace_fields(chunk: GenerationChunk) -> dict[str, Any] | None:
    """What was guessed in the chunk's round, what was right, and what it cost; None if the request did not ask.

    The token texts are those of `generation.proto`: of each token alone, so that joined they may differ from the text.
    """
    trace = chunk.trace
    if trace is None:
        return None
    return {
        "token_texts": chunk.token_texts,
        "accepted_rows": trace.accepted_rows,
        "tree": {"token_texts": trace.draft_token_texts, "parent_rows": trace.draft_tree.parent_rows},
        "timings_ms": {
            "draft": chunk.timings.draft_ns / _NS_PER_MS,
            "calibrate": chunk.timings.calibrate_ns / _NS_PER_MS,
            "fuzzy": chunk.timings.fuzzy_ns / _NS_PER_MS,
            "verify": chunk.timings.verify_ns / _NS_PER_MS,
            "compute": chunk.timings.compute_ns / _NS_PER_MS,
            "round": chunk.timings.round_ns / _NS_PER_MS,
        },
        "num_fuzzy_steps": chunk.timings.num_fuzzy_steps,
        "ahead_ms": None if (ahead_ns := chunk.timings.ahead_ns) is None else ahead_ns / _NS_PER_MS,
    }
