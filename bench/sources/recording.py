"""What a base model says and what the draft model guesses, recorded once, to be replayed under other rules.

What a base model says does not depend on the drafter, so its outputs are recorded once, and once the draft model's tree
at each of their positions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.harness.tasks import TASK_NAMES, source_tasks
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
from easyspec.speculation.growing_tree import num_followed
from easyspec.speculation.messages import OpenVerification
from easyspec.speculation.parameters import MlpPlacement, SamplingParameters, StopConditions, TreeBudget
from easyspec.speculation.token_tree import EMPTY_TREE, ScoredTree, TokenTree
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

    @property
    def kind(self) -> tuple[str, float]:
        """The kind of task: its name and temperature."""
        return self.task_name, self.sampling.temperature


async def record(num_prompts: int, seed: int, temperatures: Sequence[float], max_tokens: int) -> list[Recorded]:
    """Every prompt of every kind at every temperature; kinds take turns. With the bundled pair."""
    recorded = _tasks(num_prompts, seed, temperatures)
    await _record_outputs(recorded, max_tokens)
    _record_model_trees(recorded)
    return recorded


def num_output_tokens(tree: TokenTree, truth: Sequence[int]) -> int:
    """How many tokens of what is left of an output a round yields."""
    return min(num_followed(tree, truth) + 1, len(truth))


def _tasks(num_prompts: int, seed: int, temperatures: Sequence[float]) -> list[Recorded]:
    """Every prompt at every temperature; kinds take turns."""
    tokenizer = Tokenizer.load(DEFAULT_BASE)
    by_name = [source_tasks(name, num_prompts, seed) for name in TASK_NAMES]
    tasks = [task for group in zip(*by_name, strict=True) for task in group]
    return [
        Recorded(task.name, tuple(tokenizer.encode(task.prompt)), SamplingParameters(seed + index, temperature))
        for index, task in enumerate(tasks)
        for temperature in temperatures
    ]


async def _record_outputs(recorded: Sequence[Recorded], max_tokens: int) -> None:
    verifier = VerifierEngine(VerifierSettings(model=str(DEFAULT_BASE)))
    await verifier.start()

    async def record_one(one: Recorded) -> None:
        stop = StopConditions(max_tokens, ignore_eos=True)
        session_id = await verifier.open(OpenVerification(one.prompt, one.sampling, stop))
        while len(one.output) < max_tokens:
            verdict, _ = await verifier.verify(session_id, len(one.prompt) + len(one.output), EMPTY_TREE)
            one.output += verdict.token_ids
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
