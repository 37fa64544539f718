"""Every number the recipe depends on, in frozen dataclasses; a larger run changes these only."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

MODELS = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class ModelShape:
    """Shape of one Llama-style decoder with tied embeddings; units are counts."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    vocab_size: int = 4096
    max_positions: int = 8192
    rope_theta: float = 10_000.0


@dataclass(frozen=True)
class CorpusSettings:
    """What is read, in which order; shares are of training text."""

    stdlib: Path = Path(sysconfig.get_paths()["stdlib"])
    seed: int = 20_311
    passes_per_test: int = 4
    chat_share: float = 0.12
    max_chat_source_chars: int = 3_000
    max_chat_docstring_chars: int = 400
    max_document_chars: int = 400_000
    max_digit_share: float = 0.25


@dataclass(frozen=True)
class CopyingSettings:
    """Exercises in copying beside the corpus: `share` of all tokens, in blocks of one training window."""

    share: float = 0.5
    block_tokens: int = 512
    original_chars: tuple[int, int] = (100, 1_000)
    seed: int = 20_312


@dataclass(frozen=True)
class OptimSettings:
    """Muon for the matrices of the blocks, AdamW for embeddings and norms.

    The learning rate warms up over `num_warmup_steps`, stays, and falls linearly to zero over the last `decay_share` of
    the run. The run is over after `num_steps` or `max_seconds`, whichever comes first, and the fall is timed to it:
    exact reruns give steps only, a machine that others use too gets a budget. Attention over long windows is the
    dearest part on a CPU, so windows have `short_tokens` first and `long_tokens` for the last `long_share` of the run.
    """

    num_steps: int
    max_seconds: float | None = None
    tokens_per_step: int = 3_072
    micro_batch_tokens: int = 1_024
    short_tokens: int = 256
    long_tokens: int = 512
    long_share: float = 0.3
    num_warmup_steps: int = 40
    decay_share: float = 0.6
    matrix_lr: float = 8e-3
    vector_lr: float = 4e-3
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    seed: int = 1


@dataclass(frozen=True)
class OwnTextSettings:
    """Text the base writes itself: continuations of random corpus windows, KV-cached.

    A sequence is `prompt_tokens` of corpus followed by `new_tokens` of the base; the first
    `greedy_share` of a batch's rows decode greedily, the others sample at `temperature`.
    """

    num_batches: int = 10
    batch_size: int = 64
    prompt_tokens: int = 128
    new_tokens: int = 385
    greedy_share: float = 0.5
    temperature: float = 0.8
    seed: int = 2


@dataclass(frozen=True)
class DistilSettings:
    """What the draft learns from: the base's own text and the corpus, `own_share` of tokens."""

    optim: OptimSettings
    own_text: OwnTextSettings = field(default_factory=OwnTextSettings)
    exit_layers: tuple[int, ...] = (6, 9, 12)
    own_share: float = 0.5


@dataclass(frozen=True)
class CutSettings:
    """The shallower base: how many layers stay, on which text their worth is measured, how they are healed (the exit
    being the last of them)."""

    heal: DistilSettings
    num_layers: int = 16
    num_calibration_windows: int = 8
    calibration_tokens: int = 128


BASE_SHAPE = ModelShape(hidden_size=160, num_layers=24, num_heads=4, num_kv_heads=2, head_dim=40, mlp_size=432)
DRAFT_SHAPE = ModelShape(hidden_size=64, num_layers=12, num_heads=4, num_kv_heads=2, head_dim=16, mlp_size=192)


@dataclass(frozen=True)
class RecipeSettings:
    """The whole recipe; paths are folders, `checkpoint_seconds` is wall-clock."""

    out: Path = MODELS
    work: Path = MODELS / ".work"
    device: str = "cpu"
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    base_shape: ModelShape = BASE_SHAPE
    draft_shape: ModelShape = DRAFT_SHAPE
    base_optim: OptimSettings = OptimSettings(num_steps=1_000)
    copying: CopyingSettings | None = field(default_factory=CopyingSettings)
    copying_optim: OptimSettings = OptimSettings(num_steps=1_050, tokens_per_step=4_096, long_share=1.0, seed=6)
    distil: DistilSettings = DistilSettings(
        OptimSettings(
            num_steps=3_600,
            tokens_per_step=2_048,
            long_share=1.0,
            matrix_lr=1e-2,
            vector_lr=6e-3,
            weight_decay=0.02,
            seed=3,
        )
    )
    cut: CutSettings = CutSettings(
        DistilSettings(
            OptimSettings(
                num_steps=400,
                max_seconds=300.0,
                tokens_per_step=2_048,
                long_tokens=256,
                long_share=1.0,
                num_warmup_steps=10,
                decay_share=0.8,
                matrix_lr=4e-3,
                vector_lr=2e-3,
                weight_decay=0.0,
                seed=4,
            ),
            OwnTextSettings(num_batches=2, prompt_tokens=64, new_tokens=193, seed=5),
        )
    )
    checkpoint_seconds: float = 120.0
    publish_seconds: float = 600.0
