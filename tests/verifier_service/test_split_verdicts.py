"""On several ranks, verdicts without gathered logits are those with them, and move a few bytes a row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from easyspec.engine.shell import CloseTask
from easyspec.model.config import load_config
from easyspec.model.decoder import Decoder
from easyspec.model.kv_cache import KvMemory
from easyspec.ops.executor import choose_executor
from easyspec.parallel.ranks import GroupRanks, join_group
from easyspec.speculation.messages import OpenVerification, Verdict
from easyspec.speculation.parameters import SamplingParameters, StopConditions
from easyspec.speculation.token_tree import TokenTree
from tests.fakes.checkpoints import VOCAB_SIZE, write_checkpoint
from tests.parallel.rank_runner import run_ranks
from verifier_service import tree_batch
from verifier_service.scheduler import SchedulerLimits
from verifier_service.verifier import OpenTask, Verifier, VerifierLimits, VerifyTask

CPU = torch.device("cpu")
NUM_LAYERS, NUM_ROUNDS = 2, 3
TREE = TokenTree((3, 9, 4, 11, 12), (0, 0, 1, 2, 3))
NUM_ROWS = len(TREE) + 1
GREEDY = SamplingParameters(seed=0, temperature=0.0)
SAMPLED = SamplingParameters(seed=4, temperature=1.3)
FILTERED = SamplingParameters(seed=5, temperature=1.3, top_p=0.8)
PENALISED = SamplingParameters(seed=6, temperature=0.0, repetition_penalty=1.4)
# Requests of one batch, with the log-probabilities asked for.
BATCHES: dict[str, list[tuple[SamplingParameters, int | None]]] = {
    "greedy": [(GREEDY, None), (GREEDY, None)],
    "sampled": [(SAMPLED, None)],
    "greedy and sampled": [(GREEDY, None), (SAMPLED, None)],
    "filtered": [(FILTERED, None)],
    "all kinds": [(FILTERED, None), (GREEDY, None), (GREEDY, 2), (SAMPLED, None), (PENALISED, None)],
}


@dataclass(frozen=True)
class Judged:
    """Verdicts by round and request, and what each round's collectives were."""

    verdicts: list[list[Verdict]]
    counts: list[Counter[str]]
    gathered_bytes: list[int]


def judge(folder: Path, batch: list[tuple[SamplingParameters, int | None]], gathers_all: bool) -> Judged | None:
    ranks = join_group(CPU, timeout_s=60)
    assert isinstance(ranks, GroupRanks)
    decoder = Decoder(folder, load_config(folder), choose_executor("auto", CPU, 1), ranks=ranks)
    pool = decoder.new_pool(1024)
    if ranks.rank > 0:
        with torch.inference_mode():
            decoder.follow(pool)
        return None
    split = tree_batch.can_be_chosen_apart
    if gathers_all:
        tree_batch.can_be_chosen_apart = lambda case, vocab_size: False
    limits = SchedulerLimits(512, 256, 64, 8, 1.0, 1.7, reads_on_the_side=False)
    verifier = Verifier(decoder, KvMemory(pool, shares_prefixes=False), VerifierLimits("m", 256, 64), limits)
    sessions = [opened(verifier, sampling, num_top) for sampling, num_top in batch]
    judged = Judged([], [], [])
    length = 6
    for _ in range(NUM_ROUNDS):
        counts, gathered = Counter(ranks.num_collectives), ranks.num_bytes["gather"]
        judged.verdicts.append(verdicts(verifier, sessions, length))
        judged.counts.append(Counter(ranks.num_collectives) - counts)
        judged.gathered_bytes.append(ranks.num_bytes["gather"] - gathered)
        for session in sessions:
            verifier.accept(CloseTask(session))
        length += 1  # the next round judges the same trees behind longer prompts
        sessions = [opened(verifier, sampling, num_top, length) for sampling, num_top in batch]
    decoder.dismiss_followers()
    tree_batch.can_be_chosen_apart = split
    return judged


def opened(verifier: Verifier, sampling: SamplingParameters, num_top: int | None, length: int = 6) -> int:
    """A session whose prompt is read but for its last token, which the trees hang from."""
    prompt = tuple(range(5, 5 + length))
    task = OpenTask(OpenVerification(prompt, sampling, StopConditions(64, ignore_eos=True), num_top_logprobs=num_top))
    verifier.accept(task)
    while verifier.step():
        pass
    return task.future.result(timeout=0)


def verdicts(verifier: Verifier, sessions: Sequence[int], length: int) -> list[Verdict]:
    tasks = [VerifyTask(session, length, TREE) for session in sessions]
    for task in tasks:
        verifier.accept(task)
    while not all(task.future.done() for task in tasks):
        verifier.step()
    return [task.future.result()[0] for task in tasks]


def judge_all(folder: Path) -> Any:
    return {
        name: (judge(folder, batch, gathers_all=False), judge(folder, batch, gathers_all=True))
        for name, batch in BATCHES.items()
    }


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_verdicts_are_the_same_and_cost_bytes_for_best_tokens_alone(tmp_path: Path, num_ranks: int) -> None:
    folder = write_checkpoint(tmp_path, num_hidden_layers=NUM_LAYERS)
    logits_bytes, best_bytes = 4 * -(-VOCAB_SIZE // num_ranks) * NUM_ROWS, 8 * NUM_ROWS
    expected_gathers = {
        "greedy": (1, 2 * best_bytes),
        "sampled": (2, 2 * best_bytes),
        "greedy and sampled": (2, 3 * best_bytes),
        "filtered": (1, logits_bytes),
        "all kinds": (3, 3 * logits_bytes + 3 * best_bytes),
    }
    for name, (apart, together) in run_ranks(num_ranks, judge_all, folder)[0].items():
        assert apart.verdicts == together.verdicts
        num_gathers, num_bytes = expected_gathers[name]
        for counts, gathered_bytes in zip(apart.counts, apart.gathered_bytes, strict=True):
            assert counts == {"share": 1, "sum": 2 * NUM_LAYERS, "gather": num_gathers}, name
            assert gathered_bytes == num_bytes, name
        for counts, gathered_bytes in zip(together.counts, together.gathered_bytes, strict=True):
            assert counts["gather"] == 1
            assert gathered_bytes == logits_bytes * len(BATCHES[name])
