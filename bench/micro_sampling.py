"""Cost of one `choose_tokens` call on a CPU: `python bench/micro_sampling.py [--threads N]`.

Sixteen rows are a root and a tree of 15 nodes in five levels. Logits are normal (standard deviation 2.5) with a few
high ones, as a language model's are. Prints the best and the median of the repetitions in milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from easyspec.speculation.parameters import SamplingParameters
from easyspec.speculation.sampling import TokenHistory, choose_tokens, tree_choice_rows
from easyspec.speculation.token_tree import TokenTree

NUM_ROWS = 16
TREE = TokenTree(tuple(range(15)), tuple(max(0, row - 3) for row in range(1, NUM_ROWS)))
SETTINGS = {
    "greedy": SamplingParameters(seed=1, temperature=0.0),
    "temperature 0.8": SamplingParameters(seed=1, temperature=0.8),
    "+ top_p 0.9": SamplingParameters(seed=1, temperature=0.8, top_p=0.9),
    "+ top_k 50": SamplingParameters(seed=1, temperature=0.8, top_k=50),
    "+ penalties": SamplingParameters(
        seed=1, temperature=0.8, repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.5
    ),
}


def model_like_logits(vocab_size: int) -> torch.Tensor:
    """float32 [NUM_ROWS, vocab_size]."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(NUM_ROWS, vocab_size, generator=generator) * 2.5
    likely = torch.randint(vocab_size, (NUM_ROWS, 20), generator=generator)
    logits.scatter_add_(1, likely, torch.rand(NUM_ROWS, 20, generator=generator) * 10 + 5)
    return logits


def milliseconds(sampling: SamplingParameters, logits: torch.Tensor, num_repetitions: int) -> list[float]:
    """Sorted times of one call each."""
    history = TokenHistory([index % 1000 for index in range(2000)], range(500))
    rows = tree_choice_rows(TREE, 2500, sampling, history)
    times = []
    for _ in range(num_repetitions):
        begin = time.perf_counter()
        choose_tokens(logits, rows)
        times.append((time.perf_counter() - begin) * 1e3)
    return sorted(times)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{'V':>7}  {'sampling':<16} {'best ms':>8} {'median':>8}")
    for vocab_size in (4096, 152064):
        logits = model_like_logits(vocab_size)
        for name, sampling in SETTINGS.items():
            times = milliseconds(sampling, logits, arguments.repetitions)
            print(f"{vocab_size:>7}  {name:<16} {times[0]:8.2f} {statistics.median(times):8.2f}")


if __name__ == "__main__":
    main()
