"""Every number that the draft of SmolLM2-135M-Instruct depends on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from models.recipe.settings import MODELS, CorpusSettings, OptimSettings


@dataclass(frozen=True)
class WritingSettings:
    """What the base writes. A shard is `texts_per_shard` texts; text i depends on the seed and i alone.

    Of texts that begin with a user's turn, `opened_share` have its first words given; the other shares are of all
    texts. Temperatures are drawn with their weights. Units of lengths are tokens.
    """

    texts_per_shard: int = 192
    rows_at_once: int = 32
    max_user_tokens: int = 80
    max_answer_tokens: int = 160
    max_given_tokens: int = 160
    opened_share: float = 0.65
    code_question_share: float = 0.08
    continuation_share: float = 0.04
    user_temperature: float = 1.0
    user_top_p: float = 0.95
    answer_temperatures: tuple[tuple[float, float], ...] = ((0.0, 0.6), (0.8, 0.3), (1.0, 0.1))
    num_kept_logits: int = 16
    num_sampled: int = 64
    seed: int = 90


@dataclass(frozen=True)
class DraftSettings:
    """The draft: which layers of the base it begins as, how many tokens it can name, how much a token of a user's turn
    counts in training beside one of an answer, and the bits of its table of embeddings and its layers as they ship."""

    base_layers: tuple[int, ...] = (0, 29)
    num_draft_tokens: int = 8_192
    user_weight: float = 0.3
    table_bits: int = 4
    layer_bits: int = 8


OPTIM = OptimSettings(
    num_steps=4_000,
    tokens_per_step=2_048,
    num_warmup_steps=30,
    decay_share=0.7,
    matrix_lr=2e-3,
    vector_lr=2e-3,
    weight_decay=0.01,
    seed=91,
)


@dataclass(frozen=True)
class Smollm2Settings:
    """The whole recipe; paths are folders or files. One text in `every_held_out` is for measuring while training.

    `start` is a published draft to go on from instead of the base's layers.
    """

    base: Path
    start: Path | None = None
    out: Path = MODELS / "smollm2-draft"
    work: Path = MODELS / ".work" / "smollm2"
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    writing: WritingSettings = WritingSettings()
    draft: DraftSettings = DraftSettings()
    optim: OptimSettings = OPTIM
    num_shards: int = 64
    every_held_out: int = 24
    check_seconds: float = 240.0
