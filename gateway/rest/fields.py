"""Fields that requests share. Types are strict: a number in quotes is not a number. Null means unset throughout."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar, get_args

from pydantic import AllowInfNan, BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from easyspec.speculation.parameters import LayerPlanRequest, MlpPlacement, TreeBudget
from easyspec.speculation.sources import parse_sources
from gateway.messages.request import SpeculationMode, SpeculationWish
from gateway.rest.unknown_fields import asks_for_nothing, ignored, without_unknown

_ItemT = TypeVar("_ItemT")
_KeyT = TypeVar("_KeyT")
_MAX_KEYS = 1024

Boolean: TypeAlias = Annotated[bool, Strict()]
Integer: TypeAlias = Annotated[int, Strict()]
Number: TypeAlias = Annotated[float, Strict(), AllowInfNan(False)]
Text: TypeAlias = Annotated[str, Strict()]
Count: TypeAlias = Annotated[int, Strict(), Field(ge=0, lt=2**31)]
# One wrong item is enough to refuse a request: a problem for each of a million takes a minute to put together.
ListOf: TypeAlias = Annotated[list[_ItemT], Field(fail_fast=True)]
TokenId: TypeAlias = Annotated[int, Strict(), Field(ge=0, lt=2**31)]


def unsupported(why: str) -> BeforeValidator:
    """Refuses a field of OpenAI's or vLLM's, unless it asks for nothing or the gateway is set to ignore it."""

    def refuse(value: object, info: ValidationInfo) -> None:
        name = info.field_name or ""
        if not (asks_for_nothing(name, value) or ignored(name)):
            raise PydanticCustomError("unsupported_parameter", "this field is not supported: {why}", {"why": why})

    return BeforeValidator(refuse)


def known_kinds(kinds: Any, message: str) -> BeforeValidator:
    """Refuses what is not among the literals `kinds` by its name: `message` has a place for it."""
    known = get_args(kinds)

    def check(kind: object) -> object:
        if isinstance(kind, str) and kind not in known:
            raise PydanticCustomError("unsupported_parameter", message, {"kind": kind[:40]})
        return kind

    return BeforeValidator(check)


def without_kinds(kinds: frozenset[str]) -> BeforeValidator:
    """Leaves objects of these types out of a list."""

    def kept(values: Any) -> Any:
        if not isinstance(values, list):
            return values
        # As text: a type may be any JSON value, and not all of them can be looked up in a set.
        return [value for value in values if not (isinstance(value, dict) and str(value.get("type")) in kinds)]

    return BeforeValidator(kept)


def json_text(value: Any) -> Any:
    """What a model wrote, as text again: clients parse it, and send what they made of it."""
    if value is None or isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise PydanticCustomError("too_deep", "nested too deeply") from None


WrittenText: TypeAlias = Annotated[Text | None, BeforeValidator(json_text)]


def _check_num_keys(value: Any) -> Any:
    """Refuse an object with more keys than make sense before each of them is told to be wrong."""
    if isinstance(value, dict) and len(value) > _MAX_KEYS:
        raise PydanticCustomError("too_many_keys", "an object with {count} entries", {"count": len(value)})
    return value


SmallDict: TypeAlias = Annotated[dict[_KeyT, _ItemT], BeforeValidator(_check_num_keys)]


class RestModel(BaseModel):
    """A JSON object in a request; fields it does not know are refused, unless they ask for nothing or the gateway is
    set to ignore them."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
    # By field, the values that tell of an object that a server wrote and a client sends back.
    replayed: ClassVar[Mapping[str, Collection[str]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_unknown(cls, values: Any) -> Any:
        _check_num_keys(values)
        if not isinstance(values, dict):
            return values
        known = _names_of(cls)
        if values.keys() <= known:
            return values
        if cls.is_replayed(values):
            return {name: value for name, value in values.items() if name in known}
        return without_unknown(known, values)

    @classmethod
    def is_replayed(cls, values: Mapping[str, Any]) -> bool:
        """Whether a server wrote this object and a client sends it back: fields it does not know ask for nothing."""
        return any(values.get(name) in told for name, told in cls.replayed.items())


@cache
def _names_of(model: type[BaseModel]) -> frozenset[str]:
    return frozenset(field.alias or name for name, field in model.model_fields.items())


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
    sources: ListOf[Text] | None = Field(
        None, description="Sources of guesses: some of model, retrieval, ngram, early_exit. Unset: the drafter's own."
    )
    draft_ahead: Boolean | None = Field(
        None, description="False keeps the drafter from guessing verdicts before they come."
    )
    trace: Boolean | None = Field(None, description="Tell in each streamed chunk what was guessed: its `easyspec`.")

    def wish(self, default_budget: TreeBudget) -> SpeculationWish:
        sizes = {"num_levels": self.max_levels, "width": self.width, "num_nodes": self.max_nodes}
        given = {name: size for name, size in sizes.items() if size is not None}
        return SpeculationWish(
            mode=SpeculationMode(self.mode or "auto"),
            budget=replace(default_budget, **given) if given else None,
            layer_plan=LayerPlanRequest(
                self.layer_parallel_size, MlpPlacement(self.mlp) if self.mlp else None, self.calibration is not False
            ),
            is_traced=bool(self.trace),
            sources=parse_sources(self.sources) if self.sources else None,
            draft_ahead=self.draft_ahead is not False,
        )
