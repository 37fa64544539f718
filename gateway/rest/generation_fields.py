"""What requests for text have in common."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, Strict

from easyspec.checkpoint.generation import SamplingDefaults
from easyspec.errors import InvalidRequestError
from easyspec.speculation.parameters import MAX_SEED, MAX_TOP_LOGPROBS, SamplingParameters, StopConditions
from gateway.messages.request import GenerationRequest, SpeculationWish, TokenIds
from gateway.rest.backend import Caller
from gateway.rest.fields import (
    Boolean,
    Count,
    ListOf,
    Number,
    RestModel,
    SmallDict,
    SpeculationFields,
    Text,
    TokenId,
    unsupported,
)
from gateway.rest.logprobs import LogprobTrack
from gateway.rest.structured import StructuredFields
from gateway.text.conversation import Conversation
from gateway.text.tokenizer import Tokenizer

Prompt: TypeAlias = str | TokenIds | Conversation
# JavaScript clients hold integers up to here exactly, and are told the seed.
_SEED_BITS = 53


class StreamOptions(RestModel):
    """What a stream carries beside the text."""

    include_usage: Boolean | None = Field(None, description="A last chunk with the usage, and no choices.")
    continuous_usage_stats: Boolean | None = Field(None, description="The usage so far in every chunk.")
    include_obfuscation: Literal[False] | None = Field(None, description="Only false: chunks are not padded.")


class GenerationFields(StructuredFields):
    """What all requests for text have in common."""

    model: Text | None = Field(None, description="Name of the model; unset: the first one served.")
    stream: Boolean | None = Field(None, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = None
    n: Annotated[int, Strict(), Field(ge=1, le=128)] | None = Field(
        None, description="Choices to make of each prompt, 1 to 16 unless the gateway is set otherwise."
    )
    stop: Text | ListOf[Text] | None = Field(None, description="At most 16 texts that end the output.")
    seed: Annotated[int, Strict(), Field(ge=-(2**63), le=MAX_SEED)] | None = Field(
        None, description="Same seed, same text. Unset: drawn, and reported in `metrics`."
    )
    temperature: Number | None = Field(
        None, description="0 is greedy; up to 100. Unset: the model's own (see `/v1/models`), else 1."
    )
    top_p: Number | None = Field(
        None, description="Keep this much probability, above 0 up to 1. Unset: the model's own, else 1."
    )
    top_k: Annotated[int, Strict(), Field(ge=-1, lt=2**31)] | None = Field(
        None, description="Keep the k likeliest tokens; 0 and -1 keep all. Unset: the model's own, else all."
    )
    min_p: Number | None = Field(
        None, description="Drop tokens below this share of the likeliest, 0 to 1. Unset: the model's own, else 0."
    )
    presence_penalty: Number | None = Field(None, description="-2 to 2. Unset: 0.")
    frequency_penalty: Number | None = Field(None, description="-2 to 2. Unset: 0.")
    repetition_penalty: Number | None = Field(None, description="Above 0, up to 100. Unset: the model's own, else 1.")
    logit_bias: SmallDict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Number] | None = Field(
        None, max_length=1024, description="Added to logits, by token id, -100 to 100 each."
    )
    stop_token_ids: ListOf[TokenId] | None = Field(
        None, max_length=1024, description="Further tokens that end the text."
    )
    min_tokens: Count | None = Field(None, description="The text does not end before it has so many tokens.")
    ignore_eos: Boolean | None = Field(None, description="Go on after the model's own end tokens.")
    include_stop_str_in_output: Boolean | None = Field(
        None, description="The stop string, or the text of the stop token, is part of the output."
    )
    speculation: SpeculationFields | None = None
    user: Text | None = Field(None, description="Accepted; has no effect.")
    metadata: dict[str, Any] | None = Field(None, max_length=64, description="Accepted; has no effect.")
    store: Boolean | None = Field(None, description="Accepted: nothing is stored.")
    service_tier: Literal["auto", "default", "standard_only", "flex", "priority", "scale"] | None = Field(
        None, description="There is one tier."
    )
    prompt_cache_key: Text | None = Field(None, description="Accepted; has no effect.")
    prompt_cache_retention: Text | None = Field(None, description="Accepted; has no effect.")
    safety_identifier: Text | None = Field(None, description="Accepted; has no effect.")
    skip_special_tokens: Literal[True] | None = Field(None, description="Only true: special tokens are not text.")
    allowed_token_ids: Annotated[None, unsupported("use logit_bias or a grammar")] = None
    bad_words: Annotated[None, unsupported("use logit_bias")] = None
    length_penalty: Annotated[None, unsupported("there is no beam search")] = None
    truncate_prompt_tokens: Annotated[None, unsupported("a prompt that is too long is refused, never cut")] = None
    use_beam_search: Annotated[None, unsupported("there is no beam search")] = None

    @property
    def param_names(self) -> Mapping[str, str]:
        """What the gateway's own fields are called in this request."""
        return {"sampling.grammar": self.given_grammar()[0] or "tools"}

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def num_top_logprobs(self) -> int | None:
        """This many of the likeliest at each output token; None: no log-probabilities."""
        return None

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same at each token of the prompt."""
        return None

    @property
    def echoes(self) -> bool:
        """Whether the output begins with the prompt."""
        return False

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def tells_usage_so_far(self) -> bool:
        return self.includes_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """An empty text asks for nothing."""
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or ()
        return tuple(text for text in texts if text)

    def logprob_tracks(self, tokenizer: Tokenizer, num_choices: int) -> list[LogprobTrack]:
        """One for each choice; none without log-probabilities."""
        if self.num_top_logprobs is None:
            return []
        has_stops, includes_stop = bool(self.stop_strings), bool(self.include_stop_str_in_output)
        return [LogprobTrack(tokenizer, has_stops, includes_stop) for _ in range(num_choices)]

    def generation(
        self, caller: Caller, prompt: Prompt, sampling: SamplingParameters, max_tokens: int | None
    ) -> GenerationRequest:
        """The request as the gateway has it, for one prompt."""
        budget = caller.generator.default_budget
        wish = self.speculation.wish(budget) if self.speculation is not None else SpeculationWish()
        return GenerationRequest(
            prompt=prompt,
            sampling=sampling,
            stop=StopConditions(
                max_tokens, frozenset(self.stop_token_ids or ()), bool(self.ignore_eos), self.min_tokens or 0
            ),
            stop_strings=self.stop_strings,
            speculation=wish,
            model=self.model or "",
            request_id=caller.request_id,
            client=caller.client,
            num_choices=self.num_choices,
            num_top_logprobs=self.num_top_logprobs,
            num_prompt_logprobs=self.num_prompt_logprobs,
            echo=self.echoes,
            includes_stop=bool(self.include_stop_str_in_output),
            is_strict=self.is_strict,
        )

    def sampling(self, defaults: SamplingDefaults) -> SamplingParameters:
        """Unset fields take the model's defaults, else ours; ranges are checked where the model is known."""
        names = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.top_k is not None:
            given["top_k"] = self.top_k if self.top_k > 0 else None
        seed = secrets.randbits(_SEED_BITS) if self.seed is None else self.seed
        return SamplingParameters(
            seed=seed & MAX_SEED if seed < 0 else seed,  # negative ones count from the other end
            grammar=self.given_grammar()[1],
            logit_bias={int(token_id): bias for token_id, bias in sorted((self.logit_bias or {}).items())},
            **(defaults.given | given),
        )


class ChoicesFields(GenerationFields):
    """What requests have in common whose answers are choices."""

    prompt_logprobs: Annotated[int, Strict(), Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = Field(
        None,
        description="Log-probabilities of the prompt's tokens, and this many of the likeliest, 0 to 20; no streams.",
    )

    @property
    def num_prompt_logprobs(self) -> int | None:
        return self.prompt_logprobs

    def check(self) -> None:
        """Raise InvalidRequestError for what can be told without a model."""
        options = self.stream_options
        if options is not None and (options.include_usage or options.continuous_usage_stats) and not self.stream:
            raise InvalidRequestError("stream_options", "set", "only together with stream")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequestError("prompt_logprobs", self.prompt_logprobs, "unset in a stream")
