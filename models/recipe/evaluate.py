"""Figures of the shipped pair on held-out modules and on the base's own continuations.

Dimensions: B rows, T tokens, H hidden size, V vocabulary, E exits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from transformers import LlamaForCausalLM

from models.heldout import held_out_texts
from models.recipe.distil import base_hidden, exit_hidden
from models.recipe.llama import load_model
from models.recipe.own_text import continue_text, prompts_of
from models.recipe.tokenizer import load_tokenizer
from models.recipe.tokens import encode_documents

_WINDOW = 512
_NUM_PROMPTS = 64
_PROMPT_TOKENS = 128
_NEW_TOKENS = 128
_ROWS_AT_ONCE = 2
_REPEAT_TOKENS = 8
_SEED = 7


@dataclass(frozen=True)
class ExitFigures:
    """One exit against the base, means over positions; losses in nats a token."""

    loss: float
    divergence: float
    top1_agreement: float
    overlap: float


@dataclass(frozen=True)
class TextFigures:
    """The pair on one kind of text; `overlap` of an exit is the sum of min(base, draft)."""

    num_tokens: int
    base_loss: float
    repeated_share: float
    exits: dict[str, ExitFigures]


def evaluate_pair(
    base_folder: Path, draft_folder: Path, exit_layers: tuple[int, ...], max_windows: int | None = None
) -> dict[str, TextFigures]:
    """Return the figures of the models in two folders on three kinds of text. Of the held-out modules all windows of
    512 tokens count, or `max_windows` of them, evenly spread."""
    base, draft = load_model(base_folder, "cpu"), load_model(draft_folder, "cpu")
    stream = encode_documents(load_tokenizer(base_folder), list(held_out_texts().values()))
    num_windows = (len(stream) - 1) // _WINDOW
    starts = [index * _WINDOW for index in range(num_windows)]
    windows = torch.tensor([stream[start : start + _WINDOW + 1].tolist() for start in starts])
    if max_windows is not None:
        windows = windows[:: max(1, -(-len(windows) // max_windows))]
    figures = {"held_out": text_figures(base, draft, exit_layers, windows, 0)}
    for name, temperature in (("own_greedy", 0.0), ("own_temperature_0.8", 0.8)):
        prompts = prompts_of(stream, _NUM_PROMPTS, _PROMPT_TOKENS, _SEED)
        own = continue_text(base, prompts, _NEW_TOKENS, torch.full((_NUM_PROMPTS,), temperature), _SEED)
        figures[name] = text_figures(base, draft, exit_layers, own.token_ids, _PROMPT_TOKENS - 1)
    return figures


@torch.inference_mode()
def text_figures(
    base: LlamaForCausalLM, draft: LlamaForCausalLM, exit_layers: tuple[int, ...], windows: Tensor, first: int
) -> TextFigures:
    """Return the means over the predictions made at positions `first`.. of windows [B, T + 1]."""
    sums: dict[str, Tensor] = {}
    base_sum = torch.zeros(())
    for rows in windows.split(_ROWS_AT_ONCE):
        targets = rows[:, first + 1 :].flatten()
        hidden = base_hidden(base, rows[:, :-1])[:, first:]
        base_logprobs = log_softmax(base.lm_head(hidden.flatten(0, 1)), dim=-1)
        base_probs = base_logprobs.exp()
        base_sum += cross_entropy(base_logprobs, targets, reduction="sum")
        exits = exit_hidden(draft, rows[:, :-1], exit_layers)
        for layer, states in zip(exit_layers, exits, strict=True):
            draft_logprobs = log_softmax(draft.lm_head(states[:, first:].flatten(0, 1)), dim=-1)
            found = (  # of ExitFigures' fields, in their order
                cross_entropy(draft_logprobs, targets, reduction="sum"),
                (base_probs * (base_logprobs - draft_logprobs)).sum(),
                (draft_logprobs.argmax(-1) == base_logprobs.argmax(-1)).sum(),
                torch.minimum(base_probs, draft_logprobs.exp()).sum(),
            )
            sums[str(layer)] = sums.get(str(layer), torch.zeros(4)) + torch.stack(found)
    num_tokens = windows[:, first + 1 :].numel()
    return TextFigures(
        num_tokens=num_tokens,
        base_loss=round(base_sum.item() / num_tokens, 4),
        repeated_share=repeated_share(windows[:, first + 1 :].tolist()),
        exits={
            layer: ExitFigures(*(round(value / num_tokens, 4) for value in total.tolist()))
            for layer, total in sums.items()
        },
    )


def repeated_share(rows: Iterable[list[int]]) -> float:
    """Return the share of tokens that end an 8-token run already seen in their own row. Agreement on loops is cheap, so
    greedy figures are to be read beside this one."""
    num_repeated = num_all = 0
    for row in rows:
        seen: set[tuple[int, ...]] = set()
        for end in range(_REPEAT_TOKENS, len(row) + 1):
            run = tuple(row[end - _REPEAT_TOKENS : end])
            num_repeated += run in seen
            num_all += 1
            seen.add(run)
    return round(num_repeated / max(1, num_all), 4)
