"""One rank's share of a tensor-parallel model: query heads, KV heads, MLP columns and vocabulary.

Heads and MLP are split evenly; where there are fewer KV heads than ranks, several ranks hold the same one. The
vocabulary is cut into equal shares of which the last may be short.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from easyspec.errors import ConfigurationError
from easyspec.model.config import ModelConfig
from easyspec.model.layer_spec import HeadNorm
from easyspec.parallel.rank_placement import RankPlacement


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `size`."""

    rank: int = 0
    size: int = 1

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigurationError, naming the sizes that work, if the model cannot be split this way."""
        if not _splits(config, self.size):
            working = [size for size in range(1, config.num_heads + 1) if _splits(config, size)]
            raise ConfigurationError(
                f"tensor_parallel_size is {self.size}: {config.num_heads} heads, {config.num_kv_heads} KV heads and an "
                f"MLP of {min(_mlp_sizes(config))} do not split evenly; allowed: {', '.join(map(str, working))}"
            )

    def check_mlp(self, config: ModelConfig) -> None:
        """The same where the MLPs alone are split."""
        sizes = _mlp_sizes(config)
        if any(size % self.size != 0 for size in sizes):
            working = [ranks for ranks in range(1, 2 * self.size) if all(size % ranks == 0 for size in sizes)]
            size = min(sizes)
            raise ConfigurationError(
                f"rank_placement is 'layers-sharded-mlp' on {self.size} ranks: an MLP of {size} does not split evenly; "
                f"allowed: {', '.join(map(str, working))} ranks, or another placement"
            )

    def of(self, config: ModelConfig) -> ModelConfig:
        """The model as this rank's layers see it: fewer heads and a narrower MLP, everything else the same."""
        return replace(
            config,
            num_heads=config.num_heads // self.size,
            num_kv_heads=max(1, config.num_kv_heads // self.size),
            intermediate_size=config.intermediate_size // self.size,
        )

    def rows(self, num_rows: int) -> range:
        """This rank's part of `num_rows` that are split evenly."""
        share = num_rows // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def vocabulary(self, vocab_size: int) -> range:
        """This rank's token ids; all ranks' shares but the last are equally large."""
        share = self.vocabulary_share(vocab_size)
        return range(min(self.rank * share, vocab_size), min((self.rank + 1) * share, vocab_size))

    def vocabulary_share(self, vocab_size: int) -> int:
        """Token ids of every rank but the last, which may have fewer."""
        return -(-vocab_size // self.size)

    def kv_heads(self, num_kv_heads: int) -> range:
        """The KV heads that this rank's query heads read."""
        if num_kv_heads >= self.size:
            return self.rows(num_kv_heads)
        head = self.rank * num_kv_heads // self.size
        return range(head, head + 1)


WHOLE = Shard()


def check_splits(config: ModelConfig, placement: RankPlacement) -> None:
    """Raise ConfigurationError where layers cannot be split over ranks for another reason than their sizes."""
    if placement is RankPlacement.LAYERS:
        return
    layers = config.spec.layers
    if placement is RankPlacement.TENSOR and any(layer.attention.head_norm is HeadNorm.ROWS for layer in layers):
        raise ConfigurationError(
            f"tensor_parallel_size: a {config.hf_config.model_type} model norms all heads of a row together, and no "
            "rank has them all; allowed: 1, or a draft model's rank_placement layers"
        )


def _splits(config: ModelConfig, size: int) -> bool:
    has_whole_kv_heads = config.num_kv_heads % size == 0 or size % config.num_kv_heads == 0
    return (
        has_whole_kv_heads and config.num_heads % size == 0 and all(inner % size == 0 for inner in _mlp_sizes(config))
    )


def _mlp_sizes(config: ModelConfig) -> set[int]:
    return {layer.mlp.size for layer in config.spec.layers}
