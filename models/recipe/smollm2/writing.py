"""The base writes texts, many at once, on the engine that serves it.

Dimensions: B texts in a pass, V vocabulary, K kept logits.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from easyspec.checkpoint.tokenizer_files import load_tokenizer
from easyspec.model.config import load_config
from easyspec.model.decoder import Decoder
from easyspec.model.row_layout import Segment, lay_out
from easyspec.model.weight_source import open_weights
from easyspec.ops.executor import choose_executor
from models.recipe.smollm2.openings import Opening, Openings
from models.recipe.smollm2.settings import Smollm2Settings, WritingSettings

# Who wrote a token.
GIVEN, USER, ASSISTANT = 0, 1, 2


@dataclass
class Text:
    """A text while the base writes it.

    `writers` names each token's; for each token that the base wrote, `best_ids` and `best_logprobs` [K] are the
    likeliest tokens in its place, at temperature 1.
    """

    index: int
    opening: Opening
    temperature: float
    choose: random.Random
    slots: NDArray[np.int64]
    token_ids: list[int]
    writers: list[int] = field(default_factory=list)
    best_ids: list[NDArray[np.uint16]] = field(default_factory=list)
    best_logprobs: list[NDArray[np.float16]] = field(default_factory=list)
    num_read: int = 0
    num_in_turn: int = 0

    def segment(self) -> Segment:
        """The tokens that the base has not read."""
        positions = range(self.num_read, len(self.token_ids))
        fresh = self.token_ids[self.num_read :]
        visible = [position + 1 for position in positions]
        return Segment(fresh, positions, self.slots[self.num_read : len(self.token_ids)].tolist(), visible, self.slots)


class Writer:
    """Writes shards of texts; one thread, so that several processes can share a machine's cores."""

    def __init__(self, settings: Smollm2Settings) -> None:
        self._settings = settings.writing
        self.tokenizer: Any = load_tokenizer(settings.base)
        self._openings = Openings(self.tokenizer, settings.corpus, self._settings)
        executor = choose_executor("auto", torch.device("cpu"), num_threads=1, is_auto_8bit=True)
        self._decoder = Decoder(settings.base, load_config(settings.base), executor, open_tensors=open_weights)
        self._capacity = self._settings.max_given_tokens + self._settings.max_user_tokens
        self._capacity += self._settings.max_answer_tokens + 16
        self._pool = self._decoder.new_pool(self._settings.rows_at_once * self._capacity)
        self._turn_end: int = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        self._text_end: int = self.tokenizer.convert_tokens_to_ids("<|endoftext|>")
        self._answer_header: list[int] = self._encoded("\n<|im_start|>assistant\n")

    def shard(self, index: int) -> Iterator[Text]:
        settings = self._settings
        waiting = iter(range(index * settings.texts_per_shard, (index + 1) * settings.texts_per_shard))
        slots = np.arange(1, settings.rows_at_once * self._capacity + 1).reshape(settings.rows_at_once, -1)
        texts = [self._begin(number, own) for own, number in zip(slots, waiting, strict=False)]
        while texts:
            self._write_one_token(texts)
            for place, text in enumerate(texts):
                if self._is_finished(text):
                    yield text
                    number = next(waiting, None)
                    texts[place] = text if number is None else self._begin(number, text.slots)
            texts = [text for text in texts if not self._is_finished(text)]

    def _encoded(self, text: str) -> list[int]:
        token_ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return token_ids

    def _begin(self, index: int, slots: NDArray[np.int64]) -> Text:
        settings = self._settings
        choose = random.Random(f"{settings.seed}:{index}")
        values, weights = zip(*settings.answer_temperatures, strict=True)
        temperature = choose.choices(values, weights)[0]
        token_ids: list[int] = []
        while not 0 < len(token_ids) <= settings.max_given_tokens:
            opening = self._openings.draw(choose)
            token_ids = self._encoded(opening.text)
        return Text(index, opening, temperature, choose, slots, token_ids, [GIVEN] * len(token_ids))

    @torch.inference_mode()
    def _write_one_token(self, texts: list[Text]) -> None:
        layout = lay_out([text.segment() for text in texts])
        last_rows = [layout.flat_row(place, len(segment) - 1) for place, segment in enumerate(layout.segments)]
        logits = self._decoder.forward(layout, self._pool, logit_rows=last_rows).logits  # [B, V]
        sums = logits.logsumexp(1, keepdim=True)
        best = logits.topk(self._settings.num_sampled, dim=1)
        for text, token_ids, logprobs in zip(texts, best.indices.numpy(), (best.values - sums).numpy(), strict=True):
            text.num_read = len(text.token_ids)
            self._add(text, token_ids, logprobs)

    def _add(self, text: Text, token_ids: NDArray[np.int64], logprobs: NDArray[np.float32]) -> None:
        settings = self._settings
        has_answer_header = text.token_ids[-len(self._answer_header) :] == self._answer_header
        is_user = text.opening.role == "user" and ASSISTANT not in text.writers and not has_answer_header
        temperature = settings.user_temperature if is_user else text.temperature
        top_p = settings.user_top_p if is_user else 1.0
        chosen = int(token_ids[_choose(logprobs, temperature, top_p, text.choose.random())])
        # Copies: views would keep whole batches alive.
        text.best_ids.append(token_ids[: settings.num_kept_logits].astype(np.uint16))
        text.best_logprobs.append(logprobs[: settings.num_kept_logits].astype(np.float16))
        text.token_ids.append(chosen)
        text.writers.append(USER if is_user else ASSISTANT)
        text.num_in_turn += 1
        if is_user and (chosen == self._turn_end or text.num_in_turn == settings.max_user_tokens):
            given = self._answer_header if chosen == self._turn_end else [self._turn_end, *self._answer_header]
            text.token_ids += given
            text.writers += [GIVEN] * len(given)
            text.num_in_turn = 0

    def _is_finished(self, text: Text) -> bool:
        if text.writers[-1] != ASSISTANT:
            return text.token_ids[-1] == self._text_end
        return (
            text.token_ids[-1] in (self._turn_end, self._text_end)
            or text.num_in_turn == self._settings.max_answer_tokens
        )


def _choose(logprobs: NDArray[np.float32], temperature: float, top_p: float, uniform: float) -> int:
    """The index that a uniform number in [0, 1) falls on; `logprobs` fall."""
    if temperature == 0:
        return 0
    weights = np.exp((logprobs - logprobs[0]).astype(np.float64) / temperature)
    sums = np.cumsum(weights)
    kept = np.searchsorted(sums, top_p * sums[-1]) + 1
    return int(np.searchsorted(sums[:kept], uniform * sums[:kept][-1], side="right"))


def write_shards(settings: Smollm2Settings, shards: range) -> None:
    """Write each shard that is not there to `<work>/texts/<shard>.npz`."""
    folder = settings.work / "texts"
    folder.mkdir(parents=True, exist_ok=True)
    writer: Writer | None = None
    for shard in shards:
        path = folder / f"{shard:05}.npz"
        if path.exists():
            continue
        writer = writer or Writer(settings)
        _save(path, sorted(writer.shard(shard), key=lambda text: text.index), settings.writing)


def _save(path: Path, texts: list[Text], settings: WritingSettings) -> None:
    partial = path.with_suffix(".partial.npz")
    np.savez_compressed(
        partial,
        lengths=np.array([len(text.token_ids) for text in texts], np.int32),
        token_ids=np.concatenate([np.array(text.token_ids, np.uint16) for text in texts]),
        writers=np.concatenate([np.array(text.writers, np.uint8) for text in texts]),
        best_ids=np.concatenate([np.stack(text.best_ids) for text in texts]),
        best_logprobs=np.concatenate([np.stack(text.best_logprobs) for text in texts]),
        temperatures=np.array([text.temperature for text in texts], np.float32),
    )
    partial.rename(path)
