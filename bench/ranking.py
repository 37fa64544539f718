"""`python -m bench.ranking`: tokens per round by tree budget and ranking settings, on the bundled pair.

The engines run in this process, without gRPC between them, all prompts at once: what counts is which tokens are
accepted, not how long it takes. Made the table in docs/decisions/0004.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

from drafter_service.config import DrafterSettings
from drafter_service.engine import DrafterEngine
from easyspec.cli.processes import DEFAULT_BASE, DEFAULT_DRAFT
from easyspec.speculation.messages import Calibration, OpenSpeculation, OpenVerification
from easyspec.speculation.parameters import (
    LayerPlanRequest,
    MlpPlacement,
    SamplingParameters,
    StopConditions,
    TreeBudget,
)
from easyspec.speculation.sources import DraftSources
from easyspec.speculation.token_tree import TokenTree
from gateway.decode_loop import TimedDraft, TimedVerdict, decode
from gateway.speculation_policy import FixedPolicy
from gateway.tokenizer import Tokenizer
from models.heldout import held_out_prompts
from verifier_service.config import VerifierSettings
from verifier_service.engine import VerifierEngine

_PLAN = LayerPlanRequest(6, MlpPlacement.STAGED)
_FIRST_SEED = 100


@dataclass(frozen=True)
class _Session:
    """Both sides of one request, as the decode loop wants them."""

    verifier: VerifierEngine
    drafter: DrafterEngine
    verifier_id: int
    drafter_id: int

    async def verify(self, base_length: int, tree: TokenTree, num_plain_rounds: int = 0) -> TimedVerdict:
        verdict, timings = await self.verifier.verify(self.verifier_id, base_length, tree)
        return TimedVerdict(verdict, timings, elapsed_ns=0)

    async def draft(self, calibration: Calibration) -> TimedDraft:
        draft = await self.drafter.draft(self.drafter_id, calibration)
        return TimedDraft(draft.tree, draft.timings)

    def skip(self, token_ids: Sequence[int]) -> None:
        """A fixed budget skips nothing."""


async def count_tokens(
    verifier: VerifierEngine,
    drafter: DrafterEngine,
    opening: OpenVerification,
    budget: TreeBudget,
    draft_sampling: SamplingParameters | None = None,
) -> tuple[int, int]:
    """Output tokens and rounds of one completion, the first round (the empty tree) left out.

    The drafter is told `draft_sampling`, by default the verifier's.
    """
    prompt, sampling = opening.prompt_token_ids, draft_sampling or opening.sampling
    length = len(prompt) + (opening.stop.max_tokens or 0)
    session = _Session(
        verifier,
        drafter,
        await verifier.open(opening),
        await drafter.open(
            OpenSpeculation(prompt, sampling, _PLAN, max_total_length=length, sources=DraftSources.MODEL)
        ),
    )
    async with aclosing(decode(len(prompt), FixedPolicy(None, budget), session, session)) as rounds:
        counts = [len(round_.answer.verdict.token_ids) async for round_ in rounds]
    verifier.close(session.verifier_id)
    drafter.close(session.drafter_id)
    return sum(counts[1:]), len(counts) - 1


async def _tokens_per_round(arguments: argparse.Namespace, budget: TreeBudget, temperature: float) -> float:
    verifier = VerifierEngine(VerifierSettings(model=str(DEFAULT_BASE)))
    drafter = DrafterEngine(
        DrafterSettings(
            model=str(DEFAULT_DRAFT), initial_sharpness=arguments.sharpness, sharpness_rate=arguments.sharpness_rate
        )
    )
    tokenizer = Tokenizer.load(DEFAULT_BASE)
    prompts = [tuple(tokenizer.encode(text)) for text in held_out_prompts(arguments.num_prompts, seed=7, max_chars=600)]
    stop = StopConditions(arguments.max_tokens)
    await asyncio.gather(verifier.start(), drafter.start())
    try:
        openings = [
            OpenVerification(prompt, SamplingParameters(seed=_FIRST_SEED + index, temperature=temperature), stop)
            for index, prompt in enumerate(prompts)
        ]
        counts = await asyncio.gather(*(count_tokens(verifier, drafter, opening, budget) for opening in openings))
    finally:
        await asyncio.gather(verifier.stop(), drafter.stop())
    return sum(tokens for tokens, _ in counts) / sum(rounds for _, rounds in counts)


def main(argv: Sequence[str]) -> int:
    """Print one line per temperature."""
    parser = argparse.ArgumentParser(prog="python -m bench.ranking", description="tokens per round on held-out prompts")
    parser.add_argument("--budget", type=int, nargs=3, default=[5, 4, 15], metavar=("LEVELS", "WIDTH", "NODES"))
    parser.add_argument("--sharpness", type=float, default=2.0)
    parser.add_argument("--sharpness-rate", type=float, default=0.1)
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_args(argv)
    for temperature in arguments.temperature:
        value = asyncio.run(_tokens_per_round(arguments, TreeBudget(*arguments.budget), temperature))
        print(f"T = {temperature:g}: {value:.2f} tokens per round")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
