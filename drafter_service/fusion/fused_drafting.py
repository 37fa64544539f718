"""Drafting for many requests from several sources at once: whom each request asks, and one tree for all.

A round has two parts. `begin` reads what was committed, learns from it and looks up what text sources need; it does not
depend on the draft model, which may be at work meanwhile. `finish` asks everybody and fuses, when the model's tree is
there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from drafter_service.fusion.acceptance_estimate import AcceptanceEstimate, RequestBias
from drafter_service.fusion.estimates_by_target import EstimatesByTarget
from drafter_service.fusion.model_guesses import ModelGuesser
from drafter_service.fusion.model_use import ModelUse
from drafter_service.fusion.text_use import TextGains, TextUse
from drafter_service.fusion.union import AllowedAfter, FusedTree, PathGuesser, fuse, learn
from drafter_service.text.guessers import TextDrafting, TextResources
from easyspec.speculation.parameters import SamplingParameters
from easyspec.speculation.sources import DraftSources

# Nodes worth less than this cost the verifier more than they can bring.
DEFAULT_MIN_NODE_VALUE = 0.002
_READ_TOKENS = 2048


@dataclass
class _Request:
    """One request's text, what is peculiar to it, its last tree, and tokens that nobody has read yet."""

    text: TextDrafting
    estimate: AcceptanceEstimate
    model_use: ModelUse
    text_use: TextUse
    text_gains: TextGains
    unread: list[int]
    num_read: int = 0
    bias: RequestBias = field(default_factory=RequestBias)
    last: FusedTree | None = None
    guessers: list[PathGuesser] = field(default_factory=list)


class FusedDrafting:
    """Requests that draft from text, alone or beside the model. What is shared between them is numbers, never text."""

    def __init__(self, resources: TextResources, min_node_value: float = DEFAULT_MIN_NODE_VALUE) -> None:
        self._resources = resources
        self._min_node_value = min_node_value
        self._estimates = EstimatesByTarget()
        self._requests: dict[int, _Request] = {}

    def open(
        self,
        session_id: int,
        token_ids: Sequence[int],
        sampling: SamplingParameters,
        sources: DraftSources,
        target: str = "",
    ) -> None:
        """Take a request to the base model `target` up; its prompt is read piece by piece."""
        text = TextDrafting(self._resources, sources, sampling)
        gains = self._estimates.gains_of(target, is_greedy=sampling.is_greedy)
        self._requests[session_id] = _Request(
            text=text,
            estimate=self._estimates.of(target),
            model_use=ModelUse(gains.of_model),
            text_use=TextUse(gains.of_text),
            text_gains=gains.of_text,
            unread=[*token_ids],
        )

    def close(self, session_id: int) -> None:
        """Forget all of a request; idempotent."""
        self._requests.pop(session_id, None)

    def read(self, session_id: int) -> bool:
        """Read a piece of the prompt; False if more is left."""
        request = self._requests[session_id]
        piece, request.unread = request.unread[:_READ_TOKENS], request.unread[_READ_TOKENS:]
        request.text.extend(piece)
        request.num_read += len(piece)
        return not request.unread

    def begin(self, session_id: int, new_token_ids: Sequence[int]) -> int | None:
        """Commit the verdict's tokens: learn from them, read them, look things up.

        Returns how many of them the last tree brought, the bonus token among them; None if there was no tree.
        """
        request = self._requests[session_id]
        num_brought = None
        if request.last is not None:
            num_brought = learn(request.last, new_token_ids, request.estimate, request.bias)
            request.last = None
        request.unread.extend(new_token_ids)
        while not self.read(session_id):
            pass
        request.guessers = request.text.guessers(request.num_read)
        return num_brought

    def model_use(self, session_id: int) -> ModelUse:
        """What decides whether a round of the request is worth the draft model's time."""
        return self._requests[session_id].model_use

    def text_use(self, session_id: int) -> TextUse:
        """What decides whether a round of the request is worth text's work, where the model drafts it."""
        return self._requests[session_id].text_use

    def text_took(self, session_id: int, work_s: float, round_s: float) -> None:
        """A round of the request that both drafted took so long, of which text had `work_s`."""
        self._requests[session_id].text_gains.took(work_s, round_s)

    def draft_text(self, session_id: int, num_nodes: int, allowed_after: AllowedAfter | None = None) -> FusedTree:
        """The tree of text alone; after `begin`. `finish` may follow or not."""
        request = self._requests[session_id]
        return fuse(request.guessers, request.estimate, request.bias, num_nodes, self._min_node_value, allowed_after)

    def keep(self, session_id: int, tree: FusedTree) -> FusedTree:
        """Take a tree of `draft_text` for the round's."""
        request = self._requests[session_id]
        request.guessers = []
        request.last = tree
        return tree

    def finish(
        self,
        session_id: int,
        model: ModelGuesser | None,
        num_nodes: int,
        allowed_after: AllowedAfter | None = None,
    ) -> FusedTree:
        """The round's tree; `model` has the draft model's, where it takes part: what is allowed only."""
        request = self._requests[session_id]
        guessers = request.guessers if model is None else [model, *request.guessers]
        request.guessers = []
        request.last = fuse(guessers, request.estimate, request.bias, num_nodes, self._min_node_value, allowed_after)
        return request.last
