"""`python -m bench.replay`: tokens per round and processor time of fusing, replayed without services.

What a base model says does not depend on the drafter, so its outputs are recorded once, and once the draft model's tree
at each of their positions. Then every set of sources, budget and way to search is replayed on the same rounds in a few
seconds. Times are of the replaying thread's processor, for everything but the models: reading the verdict, learning
from it, looking up, fusing. Made tables of docs/sources.md and docs/decisions/0021.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench.source_datastore import ensure_datastore
from bench.source_tasks import TASK_NAMES, source_tasks
from bench.sources import source_sets
from bench.tree_search import SEARCHES, Search
from drafter_service.acceptance_estimate import AcceptanceEstimate, RequestBias
from drafter_service.config import DrafterSettings
from drafter_service.fused_drafting import DEFAULT_MIN_NODE_VALUE
from drafter_service.fusion import FusedTree, learn
from drafter_service.sources.layer_parallel import LayerParallelSource
from drafter_service.sources.model_guesses import ModelGuesser
from drafter_service.sources.source import DraftJob, DraftSession
from drafter_service.sources.text import TextDrafting, TextResources
from easyspec.cli.processes import DEFAULT_BASE, DEFAULT_DRAFT
from easyspec.datastore.ngram_table import NgramTable
from easyspec.datastore.suffix_index import SuffixIndex
from easyspec.model.loading import load_model
from easyspec.parallel.layer_groups import paper_plan
from easyspec.speculation.messages import OpenVerification
from easyspec.speculation.parameters import MlpPlacement, SamplingParameters, StopConditions, TreeBudget
from easyspec.speculation.sources import TEXT_SOURCES, DraftSources, parse_sources
from easyspec.speculation.token_tree import EMPTY_TREE, ScoredTree, TokenTree
from easyspec.tokenizer_fingerprint import tokenizer_fingerprint
from gateway.tokenizer import Tokenizer
from verifier_service.config import VerifierSettings
from verifier_service.engine import VerifierEngine

_NUM_LEVELS, _WIDTH, _MAX_NODES = 5, 4, 64
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


@dataclass(frozen=True)
class Replayed:
    """Rounds and tokens of a kind of task (name and temperature), and milliseconds of every round."""

    num_tokens: dict[tuple[str, float], int]
    num_rounds: dict[tuple[str, float], int]
    round_ms: list[float]

    def tokens_per_round(self, kind: tuple[str, float]) -> float:
        return self.num_tokens[kind] / self.num_rounds[kind]


def main(argv: Sequence[str]) -> int:
    """Print a table."""
    arguments = _parser().parse_args(argv)
    recorded = _tasks(arguments.num_prompts, arguments.seed, arguments.temperature)
    asyncio.run(_record_outputs(recorded, arguments.max_tokens))
    _record_model_trees(recorded)
    resources = _resources()
    kinds = [(name, temperature) for temperature in arguments.temperature for name in TASK_NAMES]
    print(
        "| nodes | sources | search | " + " | ".join(f"{name}, T = {t:g}" for name, t in kinds) + " | ms, p50 | p95 |"
    )
    print("|---" * (len(kinds) + 5) + "|")
    sets = [parse_sources(names.split(",")) for names in arguments.sources] or _replayed_sets()
    for num_nodes in arguments.nodes:
        for sources in sets:
            for search in arguments.search if sources & TEXT_SOURCES else [SEARCHES[0].name]:
                chosen = next(each for each in SEARCHES if each.name == search)
                result = replay(recorded, resources, sources, num_nodes, chosen)
                lengths = " | ".join(f"{result.tokens_per_round(kind):.2f}" for kind in kinds)
                p50, p95 = np.percentile(result.round_ms, [50, 95])
                label = "+".join(sources.names)
                print(f"| {num_nodes} | {label} | {search} | {lengths} | {p50:.2f} | {p95:.2f} |", flush=True)
    return 0


def _replayed_sets() -> list[DraftSources]:
    """Trees of the whole model are recorded, not those of its early exits."""
    return [sources for sources in source_sets() if DraftSources.EARLY_EXIT not in sources]


def replay(
    recorded: Sequence[Recorded], resources: TextResources, sources: DraftSources, num_nodes: int, search: Search
) -> Replayed:
    """Draft every recorded completion anew, with an estimate that begins knowing nothing."""
    estimate = AcceptanceEstimate()
    result = Replayed(defaultdict(int), defaultdict(int), [])
    for completion in recorded:
        kind = (completion.task_name, completion.sampling.temperature)
        draft = _drafting(completion, resources, sources, num_nodes, search, estimate)
        position, new = 1, completion.output[:1]
        while position < len(completion.output):
            started_ns = time.thread_time_ns()
            tree = draft(new, completion.model_trees[position - 1])
            result.round_ms.append((time.thread_time_ns() - started_ns) / 1e6)
            num_tokens = _num_output_tokens(tree, completion.output[position:])
            new = completion.output[position : position + num_tokens]
            position += num_tokens
            result.num_tokens[kind] += num_tokens
            result.num_rounds[kind] += 1
    return result


def _drafting(
    completion: Recorded,
    resources: TextResources,
    sources: DraftSources,
    num_nodes: int,
    search: Search,
    estimate: AcceptanceEstimate,
) -> Callable[[Sequence[int], ScoredTree], TokenTree]:
    """One request's rounds, as FusedDrafting has them, by any search: new tokens and the model's tree to a tree."""
    if not sources & TEXT_SOURCES:
        return lambda _, model_tree: model_tree.pruned(num_nodes)
    text = TextDrafting(resources, sources, completion.sampling)
    text.extend(completion.prompt)
    bias = RequestBias()
    num_read, last = len(completion.prompt), None

    def draft(new: Sequence[int], model_tree: ScoredTree) -> TokenTree:
        nonlocal num_read, last
        if last is not None:
            learn(last, new, estimate, bias)
        text.extend(new)
        num_read += len(new)
        models = [ModelGuesser(model_tree)] if DraftSources.MODEL in sources else []
        fused: FusedTree = search(
            [*models, *text.guessers(num_read)], estimate, bias, num_nodes, DEFAULT_MIN_NODE_VALUE
        )
        last = fused
        return fused.tree

    return draft


def _num_output_tokens(tree: TokenTree, truth: Sequence[int]) -> int:
    """How many tokens a round yields: accepted ones and the bonus token."""
    row = 0
    for num_accepted, token_id in enumerate(truth):
        child = tree.children[row].get(token_id)
        if child is None:
            return num_accepted + 1
        row = child
    return len(truth)


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

    async def record(one: Recorded) -> None:
        stop = StopConditions(max_tokens, ignore_eos=True)
        session_id = await verifier.open(OpenVerification(one.prompt, one.sampling, stop))
        while len(one.output) < max_tokens:
            verdict, _ = await verifier.verify(session_id, len(one.prompt) + len(one.output), EMPTY_TREE)
            one.output += verdict.token_ids
        verifier.close(session_id)

    for begin in range(0, len(recorded), _NUM_AT_ONCE):
        await asyncio.gather(*(record(one) for one in recorded[begin : begin + _NUM_AT_ONCE]))
    await verifier.stop()


def _record_model_trees(recorded: Sequence[Recorded]) -> None:
    settings = DrafterSettings(model=str(DEFAULT_DRAFT))
    loaded = load_model(settings, is_exact=False)
    source = LayerParallelSource(loaded.decoder, loaded.memory, settings.prefill_chunk, _MAX_NODES)
    plan = paper_plan(loaded.decoder.config.num_layers, _LAYER_PARALLEL_SIZE, MlpPlacement.STAGED)
    budget = TreeBudget(_NUM_LEVELS, _WIDTH, _MAX_NODES)
    for begin in range(0, len(recorded), _NUM_AT_ONCE):
        batch = {
            number: (
                one,
                DraftSession(
                    number, [*one.prompt], len(one.prompt) + len(one.output), one.sampling, plan, calibration=True
                ),
            )
            for number, one in enumerate(recorded[begin : begin + _NUM_AT_ONCE])
        }
        for _, session in batch.values():
            source.open(session)
        for position in range(len(recorded[begin].output) - 1):
            for one, session in batch.values():
                session.token_ids.append(one.output[position])
                source.begin(DraftJob(session, 1, budget))
            num_waiting = len(batch)
            while num_waiting:
                for proposal in source.step().proposals:
                    batch[proposal.job.session.session_id][0].model_trees.append(proposal.tree)
                    num_waiting -= 1
        for _, session in batch.values():
            source.close(session)


def _resources() -> TextResources:
    _, index, _, ngrams = ensure_datastore(DEFAULT_BASE)
    fingerprint = tokenizer_fingerprint(DEFAULT_BASE)
    return TextResources(SuffixIndex(Path(index), fingerprint), NgramTable(Path(ngrams), fingerprint))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.replay", description=__doc__)
    add = parser.add_argument
    add("--nodes", type=int, nargs="+", default=[16], help="nodes of a tree (default: 16)")
    add("--sources", nargs="+", default=[], metavar="NAMES", help="such as model,ngram (default: every set)")
    add("--search", nargs="+", choices=[each.name for each in SEARCHES], default=[SEARCHES[0].name])
    add("--temperature", type=float, nargs="+", default=[0.0, 0.8])
    add("--num-prompts", type=int, default=8, help="of each kind (default: 8)")
    add("--max-tokens", type=int, default=128)
    add("--seed", type=int, default=7)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
