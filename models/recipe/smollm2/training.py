"""The draft: some of the base's layers between its own embeddings and a part of its head, distilled on its texts.

Dimensions: M tokens that the base wrote, E hidden size, N tokens that the draft names, K kept logits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaForCausalLM

from easyspec.model.config import load_config
from easyspec.model.weight_source import open_weights
from easyspec.model.weights import TensorSource
from easyspec.ops.weights import quantise
from models.recipe.settings import RecipeSettings
from models.recipe.smollm2.settings import DraftSettings, Smollm2Settings
from models.recipe.smollm2.texts import Batch, WrittenText, batches, collate
from models.recipe.smollm2.writing import ASSISTANT, GIVEN
from models.recipe.trainer import Effort, Trainer

# So many imagined tokens, of a Zipf distribution over ids, are added to the counts of what the base said.
_NUM_IMAGINED = 20_000.0


class Draft(torch.nn.Module):
    """A Llama whose embeddings stay the base's, rounded as they ship, and whose head has rows for some tokens."""

    def __init__(self, base: Path, settings: DraftSettings, named: Tensor, start: Path | None = None) -> None:
        """`named` int64 [N], rising: the tokens that the draft names. Layers are those of the draft `start`, if any."""
        super().__init__()
        config = load_config(base)
        fields = {name: value for name, value in vars(config.hf_config).items() if not name.startswith("_")}
        fields |= {"num_hidden_layers": len(settings.base_layers), "dtype": torch.float32}
        fields.pop("model_type", None)
        self.model = LlamaForCausalLM(LlamaConfig(**fields))
        with open_weights(base) as source, torch.no_grad():
            self._take_over(source, settings.base_layers)
            table = self.model.model.embed_tokens.weight
            table.copy_(quantise(table, settings.table_bits).dense())
        if start is not None:
            with open_weights(start) as source, torch.no_grad():
                self._take_over(source, range(len(settings.base_layers)))
        self.model.lm_head.weight.requires_grad_(False)
        self.named = named
        place_of = torch.full((config.vocab_size,), -1)
        place_of[named] = torch.arange(len(named))
        self._place_of = place_of

    def _take_over(self, source: TensorSource, layers: Sequence[int]) -> None:
        for name, parameter in self.model.named_parameters():
            stored = name
            if name.startswith("model.layers."):
                _, _, layer, part = name.split(".", 3)
                stored = f"model.layers.{layers[int(layer)]}.{part}"
            parameter.copy_(source.tensor(stored, tuple(parameter.shape)).float())

    @functools.cached_property
    def _head(self) -> Tensor:
        table: Tensor = self.model.lm_head.weight.detach()
        head: Tensor = table[self.named]
        return head

    def forward(self, batch: Batch) -> Tensor:
        """Logits float32 [M, N] in the places of tokens that the base wrote."""
        hidden: Tensor = self.model.model(input_ids=batch.token_ids, use_cache=False).last_hidden_state
        logits: Tensor = linear(hidden.flatten(0, 1)[batch.rows], self._head)
        return logits

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy with the base's kept probabilities, in nats a token, weighted."""
        logits: Tensor = self(batch)
        places = self._place_of[batch.best_ids]  # [M, K]
        probabilities = batch.best_logprobs.exp() * (places >= 0)
        wanted = (logits.gather(1, places.clamp_min(0)) * probabilities).sum(1)
        losses = logits.logsumexp(1) * probabilities.sum(1) - wanted
        return (losses * batch.weights).sum() / batch.weights.sum()


def most_named(texts: Sequence[WrittenText], num_tokens: int, vocab_size: int) -> Tensor:
    """The `num_tokens` tokens that the base finds likeliest over its answers, rising.

    Counts begin as if it had said some tokens of a Zipf distribution: byte-pair merges found frequent tokens first.
    """
    expected = 1.0 / np.arange(1, vocab_size + 1)
    expected *= _NUM_IMAGINED / expected.sum()
    for text in texts:
        is_answer = text.writers[text.writers != GIVEN] == ASSISTANT
        probabilities = np.exp(text.best_logprobs[is_answer].astype(np.float32))
        np.add.at(expected, text.best_ids[is_answer], probabilities)
    order = sorted(range(len(expected)), key=lambda token_id: (-expected[token_id], token_id))
    return torch.tensor(sorted(order[:num_tokens]))


def train(
    settings: Smollm2Settings, texts: Sequence[WrittenText], held_out: Sequence[WrittenText]
) -> tuple[Draft, Effort]:
    """Train the draft, or resume it; agreement on `held_out` is logged when the schedule says so."""
    named_path = settings.work / "named.npy"
    if not named_path.exists():
        vocab_size = load_config(settings.base).vocab_size
        np.save(named_path, most_named(texts, settings.draft.num_draft_tokens, vocab_size).numpy())
    draft = Draft(settings.base, settings.draft, torch.from_numpy(np.load(named_path)), settings.start)
    frame = RecipeSettings(work=settings.work, publish_seconds=settings.check_seconds)

    def check(path: Path) -> None:
        with (settings.work / "agreement.log").open("a", encoding="utf-8") as log:
            log.write(" ".join(f"{name} {value:.4f}" for name, value in agreement(draft, held_out).items()) + "\n")

    trainer = Trainer("draft", draft, settings.optim, frame, check)
    stream = _Stream(texts, settings)
    return draft, trainer.run(lambda step, progress: iter([draft.loss(stream.batch(step))]))


class _Stream:
    """The batch of each step: epoch after epoch, so that a resumed run sees what an unbroken one does."""

    def __init__(self, texts: Sequence[WrittenText], settings: Smollm2Settings) -> None:
        self._texts = texts
        self._settings = settings
        self._epoch = 0
        self._first_step = 0
        self._batches = [*self._of_epoch(0)]

    def batch(self, step: int) -> Batch:
        while step - self._first_step >= len(self._batches):
            self._first_step += len(self._batches)
            self._epoch += 1
            self._batches = [*self._of_epoch(self._epoch)]
        return self._batches[step - self._first_step]

    def _of_epoch(self, epoch: int) -> Iterator[Batch]:
        optim = self._settings.optim
        seed = f"{optim.seed}:{epoch}"
        return batches(self._texts, optim.tokens_per_step, seed, self._settings.draft.user_weight)


@torch.no_grad()
def agreement(draft: Draft, texts: Sequence[WrittenText]) -> dict[str, float]:
    """How often the base's likeliest token of an answer is the draft's first, among its first four, or named at all,
    and the loss on answers."""
    draft.eval()
    found, loss = torch.zeros(4), 0.0
    for start in range(0, len(texts), 8):
        batch = collate(texts[start : start + 8], 0.0)
        loss += float(draft.loss(batch) * batch.weights.sum())
        best = draft.named[draft(batch).topk(4, dim=1).indices]  # [M, 4]
        first, is_answer = batch.best_ids[:, :1], batch.weights == 1.0
        hits = torch.stack([best[:, 0] == first[:, 0], (best == first).any(1), torch.isin(first[:, 0], draft.named)])
        found += torch.cat([hits[:, is_answer].sum(1), is_answer.sum()[None]])
    draft.train()
    top1, top4, named = (found[:3] / found[3]).tolist()
    return {"top1": top1, "top4": top4, "named": named, "loss": loss / float(found[3])}
