"""What a base model says and what the draft model guesses, recorded once, to be replayed under other rules.

What a base model says does not depend on the drafter, so its outputs are recorded once, and once the draft model's tree
at each of their positions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.harness.prompts import HELD_OUT_TEXT, prompts_in_turn
from bench.sources.datastore import ensure_datastore
from drafter_service.config import DrafterSettings
from drafter_service.model.drafting import ModelDrafting
from drafter_service.request import DraftRequest
from drafter_service.text.guessers import TextResources
from easyspec.cli.processes import DEFAULT_BASE, DEFAULT_DRAFT
from easyspec.datastore.ngram_table import NgramTable
from easyspec.datastore.suffix_index import SuffixIndex
from easyspec.model.loading import load_model
from easyspec.parallel.layer_groups import paper_plan
from easyspec.speculation.messages import OpenVerification
from easyspec.speculation.parameters import MlpPlacement, SamplingParameters, StopConditions, TreeBudget
from easyspec.speculation.token_tree import EMPTY_TREE, ScoredTree
from easyspec.tokenizer_fingerprint import tokenizer_fingerprint
from gateway.text.tokenizer import Tokenizer
from verifier_service.config import VerifierSettings
from verifier_service.engine import VerifierEngine

NUM_LEVELS, WIDTH, MAX_NODES = 5, 4, 64
_LAYER_PARALLEL_SIZE = 4
_NUM_AT_ONCE = 16


@dataclass
class Recorded:
    """A completion. `model_trees[i]` is the draft model's after `output[: i + 1]`."""

    task_name: str
    prompt: tuple[int, ...]
    sampling: SamplingParameters
    output: list[int] = field(default_factory=list)
    model_trees: list[ScoredTree] = field(default_factory=list)


async def record(num_prompts: int, seed: int, temperatures: Sequence[float], max_tokens: int) -> list[Recorded]:
    """Every prompt of every kind at every temperature; kinds take turns. With the bundled pair."""
    tokenizer = Tokenizer.load(DEFAULT_BASE)
    recorded = [
        Recorded(kind, tuple(tokenizer.encode(prompt)), SamplingParameters(seed + index, temperature))
        for index, (kind, prompt) in enumerate(prompts_in_turn(HELD_OUT_TEXT, num_prompts, seed))
        for temperature in temperatures
    ]
    await record_outputs(recorded, DEFAULT_BASE, StopConditions(max_tokens, ignore_eos=True))
    _record_model_trees(recorded)
    return recorded


async def record_outputs(recorded: Sequence[Recorded], base: Path, stop: StopConditions) -> None:
    """What the base model says to each prompt."""
    verifier = VerifierEngine(VerifierSettings(model=str(base)))
    await verifier.start()

    async def record_one(one: Recorded) -> None:
        session_id = await verifier.open(OpenVerification(one.prompt, one.sampling, stop))
        reason = None
        while reason is None:
            verdict, _ = await verifier.verify(session_id, len(one.prompt) + len(one.output), EMPTY_TREE)
            one.output += verdict.token_ids
            reason = verdict.finish_reason
        verifier.close(session_id)

    for begin in range(0, len(recorded), _NUM_AT_ONCE):
        await asyncio.gather(*(record_one(one) for one in recorded[begin : begin + _NUM_AT_ONCE]))
    await verifier.stop()


def _record_model_trees(recorded: Sequence[Recorded]) -> None:
    settings = DrafterSettings(model=str(DEFAULT_DRAFT))
    loaded = load_model(settings)
    drafting = ModelDrafting(loaded.decoder, loaded.memory, settings.prefill_chunk, MAX_NODES)
    plan = paper_plan(loaded.decoder.config.num_layers, _LAYER_PARALLEL_SIZE, MlpPlacement.STAGED)
    budget = TreeBudget(NUM_LEVELS, WIDTH, MAX_NODES)
    for begin in range(0, len(recorded), _NUM_AT_ONCE):
        batch = recorded[begin : begin + _NUM_AT_ONCE]
        requests = [DraftRequest(one.sampling, plan, len(one.prompt) + len(one.output)) for one in batch]
        states = [drafting.open(request, [*one.prompt]) for one, request in zip(batch, requests, strict=True)]
        for position in range(len(recorded[begin].output) - 1):
            for one, state in zip(batch, states, strict=True):
                state.token_ids.append(one.output[position])
                drafting.begin(state, budget, token_s=None)
            while not all(state.is_done for state in states):
                drafting.step(states)
            for one, state in zip(batch, states, strict=True):
                one.model_trees.append(state.growing.scored())
                state.timings = None
        for state in states:
            state.close()


def text_resources() -> TextResources:
    """The index and the table of the bundled pair's corpus."""
    _, index, _, ngrams = ensure_datastore(DEFAULT_BASE)
    fingerprint = tokenizer_fingerprint(DEFAULT_BASE)
    return TextResources(SuffixIndex(Path(index), fingerprint), NgramTable(Path(ngrams), fingerprint))
