"""`python -m bench.batching`: what company costs at the verifier, measured on this machine without gRPC in between.

Three tables: a step by the number of sessions that decode plainly; a step of trees of mixed sizes, against what the
rows alone would cost if all had the same; and the pauses of sessions that decode while a long prompt is read.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Sequence

from easyspec.speculation.messages import OpenVerification
from easyspec.speculation.parameters import SamplingParameters, StopConditions
from easyspec.speculation.token_tree import EMPTY_TREE, TokenTree
from verifier_service.config import VerifierSettings
from verifier_service.engine import VerifierEngine

NUM_SESSIONS = (1, 4, 16, 32, 64)
TREE_SIZES = {"0": (0,), "7": (7,), "15": (15,), "31": (31,), "0, 15": (0, 15), "0, 7, 15, 31": (0, 7, 15, 31)}
NUM_TREE_SESSIONS = 8


class Stream:
    """A session that decodes on and on, with a tree of wrong guesses of a given size, and notes when tokens come."""

    def __init__(self, engine: VerifierEngine, num_prompt_tokens: int, seed: int) -> None:
        self._engine = engine
        vocab_size = engine.model_info.vocab_size
        self._prompt = tuple(random.Random(seed).randrange(1, vocab_size) for _ in range(num_prompt_tokens))
        self._seed = seed
        self._session_id = 0
        self._length = num_prompt_tokens
        self.gaps_ms: list[float] = []
        self.compute_ms: list[float] = []

    async def open(self) -> None:
        sampling = SamplingParameters(seed=self._seed, temperature=0.8)
        request = OpenVerification(self._prompt, sampling, StopConditions(None, ignore_eos=True))
        self._session_id = await self._engine.open(request)

    async def decode(self, num_rounds: int, num_nodes: int = 0) -> None:
        """So many verdicts, each noted."""
        for _ in range(num_rounds):
            started_ns = time.monotonic_ns()
            tree = EMPTY_TREE if num_nodes == 0 else TokenTree(tuple(range(num_nodes)), (0,) * num_nodes)
            verdict, timings = await self._engine.verify(self._session_id, self._length, tree)
            self._length += len(verdict.token_ids)
            self.gaps_ms.append((time.monotonic_ns() - started_ns) / 1e6)
            self.compute_ms.append(timings.compute_ns / 1e6)

    def close(self) -> None:
        self._engine.close(self._session_id)


async def streams(engine: VerifierEngine, count: int, num_prompt_tokens: int) -> list[Stream]:
    """Sessions whose prompts have been read."""
    opened = [Stream(engine, num_prompt_tokens, seed) for seed in range(count)]
    for stream in opened:
        await stream.open()
    await asyncio.gather(*(stream.decode(3) for stream in opened))
    for stream in opened:
        stream.gaps_ms.clear()
        stream.compute_ms.clear()
    return opened


async def step_ms(engine: VerifierEngine, sizes: Sequence[int], num_prompt_tokens: int, num_rounds: int) -> float:
    """Median time between two verdicts of a session, one session for each of `sizes` (nodes of its trees)."""
    opened = await streams(engine, len(sizes), num_prompt_tokens)
    await asyncio.gather(*(stream.decode(num_rounds, size) for stream, size in zip(opened, sizes, strict=True)))
    for stream in opened:
        stream.close()
    return statistics.median(gap for stream in opened for gap in stream.gaps_ms)


async def plain_table(engine: VerifierEngine, context: int, num_rounds: int, num_repeats: int) -> None:
    """Interleaved, and the best of the repeats, as others may use the machine."""
    best: dict[int, float] = {}
    for _ in range(num_repeats):
        for count in NUM_SESSIONS:
            measured = await step_ms(engine, (0,) * count, context, num_rounds)
            best[count] = min(best.get(count, measured), measured)
    print(f"\nplain sessions, contexts of {context} tokens\nsessions  ms a step  tokens/s  times one session")
    for count, milliseconds in best.items():
        throughput = 1e3 * count / milliseconds
        print(f"{count:8}  {milliseconds:9.2f}  {throughput:8.0f}  {throughput * best[1] / 1e3:17.2f}")


async def tree_table(engine: VerifierEngine, context: int, num_rounds: int, num_repeats: int) -> None:
    best: dict[str, float] = {}
    for _ in range(num_repeats):
        for name, sizes in TREE_SIZES.items():
            mix = [sizes[index % len(sizes)] for index in range(NUM_TREE_SESSIONS)]
            measured = await step_ms(engine, mix, context, num_rounds)
            best[name] = min(best.get(name, measured), measured)
    print(f"\n{NUM_TREE_SESSIONS} sessions with trees, contexts of {context} tokens")
    print("nodes of the trees   rows  ms a step  as if each size had its share of a step of its own kind")
    for name, sizes in TREE_SIZES.items():
        num_rows = sum(1 + sizes[index % len(sizes)] for index in range(NUM_TREE_SESSIONS))
        apart = statistics.mean(best[str(size)] for size in sizes)
        print(f"{name:19}  {num_rows:5}  {best[name]:9.2f}  {apart:9.2f}")


async def pause_table(engine: VerifierEngine, context: int, num_prompt_tokens: int, num_repeats: int) -> None:
    """Pauses of four sessions with a long prompt beside them and, over as many rounds of the same texts, without."""
    without: list[float] = []
    beside: list[float] = []
    prompt_ms: list[float] = []
    for repeat in range(num_repeats):
        opened = await streams(engine, 4, context)
        long = Stream(engine, num_prompt_tokens, seed=1000 + repeat)
        await long.open()
        reading = asyncio.ensure_future(long.decode(1))
        num_rounds = 0
        while not reading.done():
            await asyncio.gather(*(stream.decode(1) for stream in opened))
            num_rounds += 1
        await reading
        beside += [gap for stream in opened for gap in stream.gaps_ms]
        prompt_ms += long.gaps_ms
        for stream in [*opened, long]:
            stream.close()
        opened = await streams(engine, 4, context)
        for _ in range(num_rounds):
            await asyncio.gather(*(stream.decode(1) for stream in opened))
        without += [gap for stream in opened for gap in stream.gaps_ms]
        for stream in opened:
            stream.close()
    print(f"\n4 sessions decode while a prompt of {num_prompt_tokens} tokens is read\n             p50 ms   p95 ms")
    for name, gaps in (("without", without), ("beside it", beside)):
        cuts = statistics.quantiles(gaps, n=20)
        print(f"{name:10}  {statistics.median(gaps):7.2f}  {cuts[18]:7.2f}")
    ratio = statistics.quantiles(beside, n=20)[18] / statistics.quantiles(without, n=20)[18]
    print(f"p95 ratio {ratio:.2f}; the prompt's first token after {statistics.median(prompt_ms):.0f} ms")


async def measure(arguments: argparse.Namespace) -> None:
    engine = VerifierEngine(VerifierSettings(model=arguments.model, num_threads=arguments.num_threads))
    await engine.start()
    try:
        for context in arguments.contexts:
            await plain_table(engine, context, arguments.rounds, arguments.repeats)
        await tree_table(engine, arguments.contexts[0], arguments.rounds, arguments.repeats)
        await pause_table(engine, arguments.contexts[0], arguments.prompt, arguments.repeats)
    finally:
        await engine.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/base", help="checkpoint folder")
    parser.add_argument("--num-threads", type=int, help="CPU threads; the service's own choice if unset")
    parser.add_argument("--contexts", type=int, nargs="+", default=[60, 300], help="tokens before decoding begins")
    parser.add_argument("--prompt", type=int, default=4000, help="tokens of the long prompt")
    parser.add_argument("--rounds", type=int, default=30, help="verdicts of each session that are measured")
    parser.add_argument("--repeats", type=int, default=3, help="times everything is measured; the best counts")
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
