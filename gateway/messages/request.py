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
from gateway.text.conversation import Conversation


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
    draft_ahead: bool = True


@dataclass(frozen=True)
class GenerationRequest:
    """What a client asks for; nothing is checked yet.

    `client` tells clients apart for fairness and limits: the name of an API key, or the network peer.
    `generation.proto` states `num_choices`, `num_top_logprobs`, `echo`, `includes_stop` and `is_strict`;
    `num_prompt_logprobs` is `num_top_logprobs` for the prompt's tokens, echoed or not.
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
    num_prompt_logprobs: int | None = None
    echo: bool = False
    includes_stop: bool = False
    is_strict: bool = False

    @property
    def most_logprobs(self) -> int | None:
        """Of the likeliest tokens that are asked for anywhere, the most; None: no log-probabilities."""
        return max(
            (wanted for wanted in (self.num_top_logprobs, self.num_prompt_logprobs) if wanted is not None), default=None
        )

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the prompt's own log-probabilities are part of the output."""
        return self.num_prompt_logprobs is not None or (self.echo and self.num_top_logprobs is not None)

    @property
    def has_prompt_chunk(self) -> bool:
        """Whether a choice begins with a chunk of the prompt's tokens."""
        return self.echo or self.wants_prompt_logprobs
