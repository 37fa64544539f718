"""Fields that requests share. Types are strict: a number in quotes is no number. Null means unset throughout."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AllowInfNan, BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationInfo
from pydantic_core import PydanticCustomError

from easyspec.speculation.parameters import (
    LayerPlanRequest,
    MlpPlacement,
    SamplingParameters,
    StopConditions,
    TreeBudget,
)
from gateway.generation import SpeculationMode, SpeculationWish

Boolean: TypeAlias = Annotated[bool, Strict()]
Integer: TypeAlias = Annotated[int, Strict()]
Number: TypeAlias = Annotated[float, Strict(), AllowInfNan(False)]
Text: TypeAlias = Annotated[str, Strict()]
Count: TypeAlias = Annotated[int, Strict(), Field(ge=1, lt=2**31)]
TokenId: TypeAlias = Annotated[int, Strict(), Field(ge=0, lt=2**31)]

# JavaScript clients hold integers up to here exactly, and are told the seed.
_SEED_BITS = 53

UNSUPPORTED: Mapping[str, str] = MappingProxyType(
    {
        "audio": "this is a text model",
        "bad_words": "use logit_bias",
        "allowed_token_ids": "use logit_bias or a grammar",
        "function_call": "use tool_choice",
        "functions": "use tools",
        "include_stop_str_in_output": "a stop string is never part of the output",
        "length_penalty": "there is no beam search",
        "min_tokens": "use logit_bias against the end token",
        "moderation": "there is no moderation here",
        "prediction": "the drafter predicts; no hint is needed",
        "prompt_logprobs": "use echo with logprobs on /v1/completions",
        "reasoning_effort": "use chat_template_kwargs, if the model's chat template has such a switch",
        "suffix": "the model cannot fill in the middle",
        "truncate_prompt_tokens": "a prompt that is too long is refused, never cut",
        "use_beam_search": "there is no beam search",
        "verbosity": "the model has no such switch",
        "web_search_options": "there is no web search",
    }
)


def _refuse(value: object, info: ValidationInfo) -> None:
    if value is not None:
        why = UNSUPPORTED[info.field_name or ""]
        raise PydanticCustomError("unsupported_parameter", "this field is not supported: {why}", {"why": why})


Unsupported: TypeAlias = Annotated[None, BeforeValidator(_refuse)]


class RestModel(BaseModel):
    """A JSON object in a request; fields it does not know are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class SpeculationFields(RestModel):
    """How to speculate; changes the speed, never the text. What is unset takes the gateway's default."""

    mode: Literal["auto", "on", "off"] | None = Field(None, description="auto lets the gateway decide.")
    max_levels: Integer | None = Field(None, description="Levels of a draft tree.")
    width: Integer | None = Field(None, description="Nodes expanded per level.")
    max_nodes: Integer | None = Field(None, description="Nodes of a draft tree, root excluded.")
    layer_parallel_size: Annotated[int, Strict(), Field(lt=2**31)] | None = Field(
        None, description="Layers whose attention the drafter runs at the same time."
    )
    mlp: Literal["sequential", "staged"] | None = Field(None, description="Where the MLPs of a layer group run.")
    calibration: Boolean | None = Field(None, description="False keeps fuzzy KV entries, for measurement.")

    def wish(self, default_budget: TreeBudget) -> SpeculationWish:
        has_budget = (self.max_levels, self.width, self.max_nodes) != (None, None, None)
        budget = TreeBudget(
            _given(self.max_levels, default_budget.num_levels),
            _given(self.width, default_budget.width),
            _given(self.max_nodes, default_budget.num_nodes),
        )
        return SpeculationWish(
            mode=SpeculationMode(self.mode or "auto"),
            budget=budget if has_budget else None,
            layer_plan=LayerPlanRequest(
                self.layer_parallel_size,
                MlpPlacement(self.mlp) if self.mlp else None,
                self.calibration is not False,
            ),
        )


class StreamOptions(RestModel):
    """What a stream carries beside the text."""

    include_usage: Boolean | None = Field(None, description="A last chunk with the usage, and no choices.")
    include_obfuscation: Literal[False] | None = Field(None, description="Only false: chunks are not padded.")


class GenerationFields(RestModel):
    """What `/v1/chat/completions` and `/v1/completions` have in common."""

    model: Text | None = Field(None, description="Name of the model; unset: the one served.")
    stream: Boolean | None = Field(None, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = None
    n: Integer | None = Field(None, description="Choices to make of each prompt, 1 to 16.")
    stop: Text | list[Text] | None = Field(None, description="At most 16 texts that end the output.")
    seed: Integer | None = Field(None, description="Same seed, same text. Unset: drawn, and reported in `metrics`.")
    temperature: Number | None = Field(None, description="0 is greedy; up to 100. Unset: 1.")
    top_p: Number | None = Field(None, description="Keep this much probability, above 0 up to 1. Unset: 1.")
    top_k: Annotated[int, Strict(), Field(ge=-1, lt=2**31)] | None = Field(
        None, description="Keep the k likeliest tokens; 0, -1 and unset keep all."
    )
    min_p: Number | None = Field(None, description="Drop tokens below this share of the likeliest, 0 to 1. Unset: 0.")
    presence_penalty: Number | None = Field(None, description="-2 to 2. Unset: 0.")
    frequency_penalty: Number | None = Field(None, description="-2 to 2. Unset: 0.")
    repetition_penalty: Number | None = Field(None, description="Above 0, up to 100. Unset: 1.")
    logit_bias: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Number] | None = Field(
        None, max_length=1024, description="Added to logits, by token id, -100 to 100 each."
    )
    stop_token_ids: list[TokenId] | None = Field(None, max_length=1024, description="Further tokens that end the text.")
    ignore_eos: Boolean | None = Field(None, description="Go on after the model's own end tokens.")
    speculation: SpeculationFields | None = None
    user: Text | None = Field(None, description="Accepted; has no effect.")
    metadata: dict[str, Any] | None = Field(None, max_length=64, description="Accepted; has no effect.")
    skip_special_tokens: Literal[True] | None = Field(None, description="Only true: special tokens are not text.")
    allowed_token_ids: Unsupported = None
    bad_words: Unsupported = None
    include_stop_str_in_output: Unsupported = None
    length_penalty: Unsupported = None
    min_tokens: Unsupported = None
    prompt_logprobs: Unsupported = None
    truncate_prompt_tokens: Unsupported = None
    use_beam_search: Unsupported = None

    @property
    def num_choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def stop_conditions(self, max_tokens: int | None) -> StopConditions:
        return StopConditions(max_tokens, frozenset(self.stop_token_ids or ()), bool(self.ignore_eos))

    def sampling(self) -> SamplingParameters:
        """Unset fields take our defaults; ranges are checked where the model is known."""
        names = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return SamplingParameters(
            seed=secrets.randbits(_SEED_BITS) if self.seed is None else self.seed,
            top_k=self.top_k if self.top_k is not None and self.top_k > 0 else None,
            logit_bias={int(token_id): bias for token_id, bias in sorted((self.logit_bias or {}).items())},
            **given,
        )

    def speculation_wish(self, default_budget: TreeBudget) -> SpeculationWish:
        return self.speculation.wish(default_budget) if self.speculation is not None else SpeculationWish()


def _given(value: int | None, default: int) -> int:
    return default if value is None else value
