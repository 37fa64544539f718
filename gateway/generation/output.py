"""The output of one request: its chunks, and how it ends."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from easyspec.speculation.parameters import FinishReason
from gateway.decode_loop import DraftSession, NoDraft, Round
from gateway.generation.answer import AnswerRound, AnswerText
from gateway.messages.chunk import Completion, GenerationChunk
from gateway.messages.request import GenerationRequest
from gateway.messages.statistics import RoundTrace, StatisticsRecorder
from gateway.peers.draft_session import ResilientDraftSession
from gateway.peers.verify_session import ResilientVerifySession
from gateway.text.conversation import Conversation
from gateway.text.schema_check import SchemaCheck, UnenforcedSchema, checked
from gateway.text.tokenizer import Tokenizer


class Output:
    """The output of one request so far."""

    def __init__(
        self,
        request: GenerationRequest,
        num_prompt_tokens: int,
        tokenizer: Tokenizer,
        answer: AnswerText,
        drafter: DraftSession,
        verifier: ResilientVerifySession,
        arrival_ns: int,
    ) -> None:
        self._request = request
        self._num_prompt_tokens = num_prompt_tokens
        self._tokenizer = tokenizer
        self._drafter = drafter
        self._verifier = verifier
        self._answer = answer
        self._recorder = StatisticsRecorder(arrival_ns)
        self._num_output_tokens = 0
        self._num_reasoning_tokens = 0
        self._written: list[str] = []  # after the thinking
        self._num_cached_prompt_tokens: int | None = None  # until the first verdict tells

    def take(self, round_: Round) -> GenerationChunk:
        """The chunk for a round; its `completion` is set if the output ends here."""
        verdict = round_.answer.verdict
        answer = self._answer.push(
            verdict.token_ids,
            is_last=verdict.finish_reason is not None,
            has_stop_token=verdict.matched_stop_token_id is not None,
        )
        token_ids = verdict.token_ids[: answer.num_tokens]
        num_accepted = min(verdict.num_accepted, len(token_ids))
        self._num_output_tokens += len(token_ids)
        self._num_reasoning_tokens += answer.num_reasoning_tokens
        self._written.append(answer.written)
        if self._num_cached_prompt_tokens is None:
            self._num_cached_prompt_tokens = min(verdict.num_cached_tokens, self._num_prompt_tokens)
        timings = self._recorder.record(round_, num_accepted)
        is_traced, trace = self._request.speculation.is_traced, None
        if is_traced:
            tree = round_.draft.tree
            node_texts = tuple(map(self._tokenizer.token_text, tree.token_ids))
            trace = RoundTrace(tree, node_texts, verdict.accepted_rows[:num_accepted])
        has_token_texts = is_traced or not isinstance(self._drafter, NoDraft)
        return GenerationChunk(
            text=answer.parsed.text,
            token_ids=token_ids,
            num_accepted=num_accepted,
            token_texts=tuple(map(self._tokenizer.token_text, token_ids)) if has_token_texts else (),
            timings=timings,
            completion=self._completion(round_, answer),
            logprobs=verdict.logprobs[: len(token_ids)],
            trace=trace,
            tool_calls=answer.parsed.calls,
            reasoning=answer.parsed.reasoning,
            parts=answer.parsed.parts,
            num_chars=answer.num_chars,
        )

    async def checked(self, completion: Completion, schema: UnenforcedSchema) -> Completion:
        """The completion, which says what its output is by the schema; not of calls in place of an answer."""
        tools = self._request.prompt.tools if isinstance(self._request.prompt, Conversation) else None
        if self._answer.has_calls and tools is not None and not tools.is_forced:
            return completion
        if completion.finish_reason is FinishReason.LENGTH:
            return replace(completion, schema_check=SchemaCheck(schema.keywords, None))
        check = await asyncio.to_thread(checked, "".join(self._written), schema)
        return replace(completion, schema_check=check)

    def _completion(self, round_: Round, answer: AnswerRound) -> Completion | None:
        verdict, matched_stop = round_.answer.verdict, answer.matched_stop
        reason = FinishReason.STOP if matched_stop is not None or answer.is_over else verdict.finish_reason
        if reason is None:
            return None
        if reason is FinishReason.STOP and self._answer.has_calls:
            reason = FinishReason.TOOL_CALLS
        drafter = self._drafter
        num_failures = drafter.num_failures if isinstance(drafter, ResilientDraftSession) else 0
        return Completion(
            finish_reason=reason,
            matched_token_id=None if matched_stop is not None or answer.is_over else verdict.matched_stop_token_id,
            matched_stop_string=matched_stop,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
            statistics=self._recorder.finish(num_failures, self._verifier.num_failures),
            seed=self._request.sampling.seed,
            num_reasoning_tokens=self._num_reasoning_tokens,
            num_cached_prompt_tokens=self._num_cached_prompt_tokens or 0,
        )
