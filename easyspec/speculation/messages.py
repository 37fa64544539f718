"""What the roles say to each other, as plain data; `easyspec/rpc/convert.py` knows the wire form."""

from __future__ import annotations

from dataclasses import dataclass

from easyspec.speculation.parameters import (
    FinishReason,
    LayerPlanRequest,
    SamplingParameters,
    StopConditions,
    TreeBudget,
)
from easyspec.speculation.sources import DraftSources
from easyspec.speculation.token_tree import TokenTree


@dataclass(frozen=True)
class OpenVerification:
    """Opens a session at the verifier. `output_token_ids` were emitted before (by whichever replica).

    `model_fingerprint` is the one that the replica's model must have, if not empty.
    `num_top_logprobs` None means no log-probabilities at all; 0 those of the emitted tokens alone.
    """

    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParameters
    stop: StopConditions
    output_token_ids: tuple[int, ...] = ()
    model: str = ""
    request_id: str = ""
    num_top_logprobs: int | None = None
    prompt_logprobs: bool = False
    model_fingerprint: str = ""


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely the base model found a token, and the likeliest at its place: (token id, logprob), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What the base model says to a tree: accepted tokens, then the bonus token unless a stop came first.

    `token_ids` is never empty; the first `num_accepted` of them were draft tokens and stand at
    `accepted_rows` of the tree. `logprobs` has one entry per token where the session asked for them. A session's
    first verdict carries `prompt_logprobs`, one per prompt token but the first, if asked for, and `num_cached_tokens`,
    whose KV was there when it opened.
    """

    base_length: int
    token_ids: tuple[int, ...]
    accepted_rows: tuple[int, ...]
    finish_reason: FinishReason | None = None
    matched_stop_token_id: int | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    num_cached_tokens: int = 0

    @property
    def num_accepted(self) -> int:
        return len(self.accepted_rows)


@dataclass(frozen=True)
class VerifyTimings:
    """Cost of a verdict; `compute_ns` is shared with the sessions of the same step."""

    queue_ns: int
    compute_ns: int
    num_batch_rows: int
    num_batch_sessions: int


@dataclass(frozen=True)
class OpenSpeculation:
    """Opens a session at the drafter with every token committed so far, the last `num_output_tokens` being output.

    `max_total_length` is the most tokens the session can come to hold (None: the draft model's context); KV memory is
    budgeted by it. `sources` None takes the drafter's. `base_fingerprint` names the base model that guesses are for.
    `draft_ahead` says whether it may guess verdicts before they come.
    """

    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParameters
    layer_plan: LayerPlanRequest = LayerPlanRequest()
    max_total_length: int | None = None
    model: str = ""
    request_id: str = ""
    sources: DraftSources | None = None
    num_output_tokens: int = 0
    base_fingerprint: str = ""
    draft_ahead: bool = True


@dataclass(frozen=True)
class Calibration:
    """Commits `token_ids` (accepted + bonus) on top of `base_length` tokens and asks for a tree."""

    base_length: int
    token_ids: tuple[int, ...]
    budget: TreeBudget


@dataclass(frozen=True)
class DraftTimings:
    """Cost of a tree; the passes are shared with the sessions of the same step.

    `ahead_ns` is the time of passes that were run while the last tree was being verified, 0 if they guessed wrongly,
    None if nothing was drafted ahead.
    """

    queue_ns: int = 0
    calibrate_ns: int = 0
    fuzzy_ns: int = 0
    num_fuzzy_steps: int = 0
    ahead_ns: int | None = None


@dataclass(frozen=True)
class Draft:
    """The drafter's answer: guesses on top of `base_length` committed tokens; may be empty.

    `node_sources` says which source guessed each node; empty if that is not known.
    """

    base_length: int
    tree: TokenTree
    timings: DraftTimings = DraftTimings()
    node_sources: tuple[DraftSources, ...] = ()


@dataclass(frozen=True)
class ModelInfo:
    """The model behind a service. Replicas with equal `fingerprint` (see `easyspec.model.fingerprint`) say the same.

    `executor` is what computes it, with its code path; `weight_format` what its matrices are kept in.
    """

    name: str
    vocab_size: int
    max_model_len: int
    tokenizer_fingerprint: str
    num_parameters: int
    dtype: str
    eos_token_ids: tuple[int, ...]
    num_layers: int
    fingerprint: str = ""
    executor: str = ""
    weight_format: str = ""


@dataclass(frozen=True)
class KvUsage:
    """KV memory in token slots, and the sessions that hold them.

    `num_cached_slots` keep prefixes of past texts and count as free. Of the tokens that sessions brought along when
    they opened (`num_prefix_query_tokens`), `num_prefix_hit_tokens` were there already. `num_preemptions` counts
    sessions whose slots were taken back for older ones. The last three are totals since the start.
    """

    num_slots: int
    num_used_slots: int
    num_sessions: int
    num_cached_slots: int = 0
    num_prefix_query_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_preemptions: int = 0
