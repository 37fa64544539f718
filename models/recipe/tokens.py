"""Token streams on disk and the batches drawn from them."""

from __future__ import annotations

import functools
import random
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from models.recipe.copying import Stream, copying_stream
from models.recipe.corpus import Kind, training_pass
from models.recipe.settings import OptimSettings, RecipeSettings
from models.recipe.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer


def ensure_tokenizer(settings: RecipeSettings) -> PreTrainedTokenizerFast:
    """Return the work folder's tokenizer, trained on the first pass if it is not there yet."""
    folder = settings.work / "tokenizer"
    if not folder.exists():
        texts = [d.text for d in training_pass(settings.corpus, 0) if d.kind is not Kind.CHAT]
        train_tokenizer(texts, settings.base_shape.vocab_size).save_pretrained(folder)
    return load_tokenizer(folder)


def pass_stream(settings: RecipeSettings, pass_index: int) -> Stream:
    """Return one pass of the corpus as token ids, documents ended by the separator; cached. With `settings.copying`
    exercises come after it, in blocks that begin where windows begin."""
    copying = settings.copying
    path = settings.work / f"pass-{pass_index}{'' if copying is None else '-copying'}.npy"
    if not path.exists():
        tokenizer = ensure_tokenizer(settings)
        documents = training_pass(settings.corpus, pass_index)
        corpus = encode_documents(tokenizer, [d.text for d in documents])
        if copying is not None:
            corpus = corpus[: len(corpus) // copying.block_tokens * copying.block_tokens]
            originals = [document for document in documents if document.kind is not Kind.CHAT]
            seeded = replace(copying, seed=copying.seed + pass_index)
            corpus = np.concatenate([corpus, copying_stream(tokenizer, originals, corpus, seeded)])
        np.save(path, corpus)
    stream: Stream = np.load(path, mmap_mode="r")
    return stream


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Stream:
    """Return the concatenated token ids of all texts, each followed by the separator."""
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    return np.asarray([token for ids in encoded for token in [*ids, end]], dtype=np.uint16)


class WindowSampler:
    """Every window of a pass once, in seeded order, then the next pass; window size may change. A batch depends on its
    step and window size alone, so a resumed run sees the same batches."""

    def __init__(self, settings: RecipeSettings, optim: OptimSettings) -> None:
        self._optim = optim
        self._stream = functools.cache(functools.partial(pass_stream, settings))
        self._orders: dict[tuple[int, int], list[int]] = {}

    def batch(self, step: int, progress: float) -> Tensor:
        """Return the token windows of one step, [B, T + 1] int64, with T by the curriculum."""
        window = window_tokens(progress, self._optim)
        num_rows = self._optim.tokens_per_step // window
        return torch.stack([self._window(step, row, window) for row in range(num_rows)])

    def _window(self, step: int, row: int, window: int) -> Tensor:
        rows_per_step = self._optim.tokens_per_step // window
        index = step * rows_per_step + row
        pass_index = 0
        while index >= len(self._order(pass_index, window)):
            index -= len(self._order(pass_index, window))
            pass_index += 1
        start = self._order(pass_index, window)[index] * window
        tokens = self._stream(pass_index)[start : start + window + 1]
        return torch.from_numpy(tokens.astype(np.int64))  # [T + 1]

    def _order(self, pass_index: int, window: int) -> list[int]:
        """Return the start windows in seeded order of 512-token blocks, so that the short and
        the long part of a run walk the same blocks and do not repeat each other's text."""
        key = (pass_index, window)
        if key not in self._orders:
            per_block = max(1, self._optim.long_tokens // window)
            num_blocks = (len(self._stream(pass_index)) - 1) // (window * per_block)
            blocks = list(range(num_blocks))
            random.Random(f"{self._optim.seed}:{pass_index}").shuffle(blocks)
            self._orders[key] = [block * per_block + part for block in blocks for part in range(per_block)]
        return self._orders[key]


def window_tokens(progress: float, optim: OptimSettings) -> int:
    """Return the window length: short first, long for the last share of the run."""
    return optim.long_tokens if progress >= 1 - optim.long_share else optim.short_tokens
