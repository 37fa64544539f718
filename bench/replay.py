"""`python -m bench.replay`: tokens per round and processor time of fusing, replayed without services.

Every set of sources, budget and way to search is replayed on the same recorded rounds in a few seconds. Times are of
the replaying thread's processor, for everything but the models: reading the verdict, learning from it, looking up,
fusing. Made tables of docs/sources.md and docs/decisions/0021.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bench.recording import Recorded, add_recording_flags, num_output_tokens, print_provenance, record, text_resources
from bench.source_lengths import length_gains
from bench.source_report import GAIN_COLUMNS
from bench.source_tasks import TASK_NAMES
from bench.sources import source_sets
from bench.tables import Row, markdown_table
from bench.tree_search import SEARCHES, Search
from drafter_service.fusion.acceptance_estimate import AcceptanceEstimate, RequestBias
from drafter_service.fusion.fused_drafting import DEFAULT_MIN_NODE_VALUE
from drafter_service.fusion.model_guesses import ModelGuesser
from drafter_service.fusion.union import FusedTree, learn
from drafter_service.text.guessers import TextDrafting, TextResources
from easyspec.speculation.sources import TEXT_SOURCES, DraftSources, parse_sources
from easyspec.speculation.token_tree import ScoredTree, TokenTree


@dataclass(frozen=True)
class Replayed:
    """Rounds and tokens of a kind of task (name and temperature), and milliseconds of every round."""

    num_tokens: dict[tuple[str, float], int]
    num_rounds: dict[tuple[str, float], int]
    round_ms: list[float]

    def tokens_per_round(self, kind: tuple[str, float]) -> float:
        return self.num_tokens[kind] / self.num_rounds[kind]


def main(argv: Sequence[str]) -> int:
    """Print tables, as Markdown: lengths of every set, and what all fused come to against the best alone."""
    arguments = _parser().parse_args(argv)
    print_provenance("bench.replay", argv)
    recorded = record(arguments.num_prompts, arguments.seed, arguments.temperature, arguments.max_tokens)
    resources = text_resources()
    kinds = [(name, temperature) for temperature in arguments.temperature for name in TASK_NAMES]
    print(
        "| nodes | sources | search | " + " | ".join(f"{name}, T = {t:g}" for name, t in kinds) + " | ms, p50 | p95 |"
    )
    print("|---" * (len(kinds) + 5) + "|")
    rows: list[Row] = []
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
                if chosen is SEARCHES[0]:
                    rows += [_row(sources, num_nodes, kind, result) for kind in kinds]
    if gains := length_gains(rows):
        print("\n" + markdown_table(GAIN_COLUMNS, [dataclasses.asdict(gain) for gain in gains]))
    return 0


def _row(sources: DraftSources, num_nodes: int, kind: tuple[str, float], result: Replayed) -> Row:
    return {
        "task": kind[0],
        "temperature": kind[1],
        "sources": sources.names,
        "node_budget": num_nodes,
        "mean_acceptance_length": result.tokens_per_round(kind),
    }


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
        kind = completion.kind
        draft = _drafting(completion, resources, sources, num_nodes, search, estimate)
        position, new = 1, completion.output[:1]
        while position < len(completion.output):
            started_ns = time.thread_time_ns()
            tree = draft(new, completion.model_trees[position - 1])
            result.round_ms.append((time.thread_time_ns() - started_ns) / 1e6)
            num_tokens = num_output_tokens(tree, completion.output[position:])
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.replay", description=__doc__)
    add = parser.add_argument
    add("--nodes", type=int, nargs="+", default=[16], help="nodes of a tree (default: 16)")
    add("--sources", nargs="+", default=[], metavar="NAMES", help="such as model,ngram (default: every set)")
    add("--search", nargs="+", choices=[each.name for each in SEARCHES], default=[SEARCHES[0].name])
    add_recording_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
