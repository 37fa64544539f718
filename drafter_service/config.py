"""Settings of the drafter."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from easyspec.rpc.settings import EngineSettings, address_field


class DrafterSettings(EngineSettings):
    """Serves the draft model, which guesses. Flags win over EASYSPEC_DRAFTER_... variables."""

    model_config = SettingsConfigDict(env_prefix="EASYSPEC_DRAFTER_", cli_prog_name="python -m drafter_service")

    address: str = address_field("127.0.0.1:50052")
    layer_groups: str | None = Field(
        default=None,
        description="Layers whose attention runs at the same time, as '0 | 1-3 | 4-7 | 8-10 | 11': every layer of the "
        "draft model once, in order. Unset: made from --layer-parallel-size.",
    )
    layer_parallel_size: int = Field(
        default=4,
        ge=1,
        le=1024,
        description="Layers per group where --layer-groups is unset, 1 to 1024; first and last layer stay alone and 1 "
        "is ordinary sequential execution. 4 is the paper's setting, where 5 is too fuzzy to pay.",
    )
    mlp: Literal["sequential", "staged"] = Field(
        default="staged",
        description="sequential or staged: MLPs of a group one after the other, as in the paper, or all at once. "
        "staged measured faster at almost the same acceptance.",
    )
    rank_placement: Literal["layers", "layers-sharded-mlp", "tensor"] = Field(
        default="layers",
        description="layers, layers-sharded-mlp or tensor: what the ranks that torchrun starts share. layers: each "
        "runs the attention of its layers of a group, and all the MLPs alike (or, staged, those of its layers), which "
        "is the paper's way; layers-sharded-mlp splits sequential MLPs over the ranks; tensor splits every layer.",
    )
    initial_sharpness: float = Field(
        default=2.0,
        ge=0.25,
        le=4.0,
        description="How far the draft's ranking is trusted when a session starts, 0.25 to 4. 2 was best or near it on "
        "the bundled pair, greedy and sampled (docs/decisions/0004).",
    )
    sharpness_rate: float = Field(
        default=0.1,
        ge=0.0,
        le=1.0,
        description="How fast that trust follows the verdicts of the session, 0 (never) to 1. 0.1 was best with "
        "trees of 15 nodes.",
    )
