"""What a client asks for."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from easyspec.speculation.parameters import (
    LayerPlanRequest,
    SamplingParameters,
    StopConditions,
    TreeBudget,
)
from easyspec.speculation.sources import DraftSources
from gateway.conversation import Conversation


@dataclass(frozen=True)
class TokenIds:
    """A prompt that is tokenized already."""

    ids: tuple[int, ...]


class SpeculationMode(enum.Enum):
    """Whether to speculate; AUTO leaves it to the gateway."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


@dataclass(frozen=True)
class SpeculationWish:
    """How a request wants to be drafted, and whether to tell about it; None takes the gateway's default.

    `budget` is the size of every tree with ON, and the largest one with AUTO.
    """

    mode: SpeculationMode = SpeculationMode.AUTO
    budget: TreeBudget | None = None
    layer_plan: LayerPlanRequest = field(default_factory=LayerPlanRequest)
    is_traced: bool = False
    sources: DraftSources | None = None


@dataclass(frozen=True)
class GenerationRequest:
    """What a client asks for; nothing is checked yet.

    `client` tells clients apart for fairness and limits: the name of an API key, or the network peer.
    `generation.proto` states `num_choices`, `num_top_logprobs`, `echo`, `includes_stop` and `is_strict`.
    """

    prompt: str | TokenIds | Conversation
    sampling: SamplingParameters
    stop: StopConditions = field(default_factory=StopConditions)
    stop_strings: tuple[str, ...] = ()
    speculation: SpeculationWish = field(default_factory=SpeculationWish)
    model: str = ""
    request_id: str = ""
    client: str = ""
    num_choices: int = 1
    num_top_logprobs: int | None = None
    echo: bool = False
    includes_stop: bool = False
    is_strict: bool = False
