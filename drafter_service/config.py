"""Settings of the drafter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from easyspec.errors import InvalidRequestError
from easyspec.settings import EngineSettings, address_field
from easyspec.speculation.sources import MODEL_SOURCES, DraftSources, parse_sources


def _last_part(fields: dict[str, Any]) -> str:
    return Path(os.path.abspath(fields["model"])).name.removesuffix(".gguf") if fields.get("model") else "text"


class DrafterSettings(EngineSettings):
    """Serves the draft model, which guesses. Flags win over EASYSPEC_DRAFTER_... variables."""

    model_config = SettingsConfigDict(env_prefix="EASYSPEC_DRAFTER_", cli_prog_name="python -m drafter_service")

    address: str = address_field("127.0.0.1:50052")
    model: str = Field(
        default="",
        description="Draft model: a folder with config.json, safetensors and tokenizer, a GGUF file, or a hub id. "
        "Unset only where --sources names neither model nor early_exit: such a drafter guesses from text alone, "
        "needs --tokenizer, and loads neither weights nor torch.",
    )
    served_model_name: str = Field(
        default_factory=_last_part,
        min_length=1,
        description="Name that requests use. By default the last part of --model, or 'text' where there is none.",
    )
    sources: str = Field(
        default="model,retrieval,ngram",
        description="Sources of guesses where a request names none: some of model, retrieval, ngram, early_exit, with "
        "commas. The first three, fused into one tree, get the most tokens accepted per round; early_exit needs a "
        "draft model with trained exits, and a request may name it wherever the model is here (docs/sources.md).",
    )
    ask: Literal["where-it-pays", "always"] = Field(
        default="where-it-pays",
        description="where-it-pays or always: whether a round asks all of its request's sources, or leaves out the "
        "draft model, or text, where the other alone drafts at a better rate. always gets the longest acceptance and "
        "fewer tokens per second; it is for measuring.",
    )
    draft_ahead: int = Field(
        default=3,
        ge=0,
        le=16,
        description="Verdicts that are guessed while a tree is being verified, 0 to 16, each with a tree drafted "
        "behind it; only while no request waits for the device, and only where rounds get faster by it, which is "
        "measured. 0 turns it off.",
    )
    tokenizer: Path | None = Field(
        default=None,
        description="Checkpoint folder, GGUF file or hub id whose tokenizer gives token ids their meaning: the base "
        "model's. Where --model has another vocabulary that shares most entries, only those are drafted; where it "
        "really differs, guesses come from text alone. Unset: the model's own.",
    )
    index: Path | None = Field(
        default=None,
        description="File made by `easyspec index build`, for the source retrieval. Unset: it retrieves from the "
        "request's own text alone.",
    )
    ngram_prior: Path | None = Field(
        default=None,
        description="File made by `easyspec index ngrams`, for the source ngram. Unset: it counts in the request's "
        "own text alone.",
    )
    text_memory_gib: float = Field(
        default=1.0,
        gt=0.0,
        le=1024.0,
        description="Memory in GiB for what the sources retrieval and ngram keep of requests' own texts, up to 1024. "
        "The more requests there are, the less of its text each keeps: the latest, at least 512 tokens. 1 holds the "
        "longest that one request may keep, 32768 tokens, of 23 requests.",
    )
    layer_groups: str | None = Field(
        default=None,
        description="Layers whose attention runs at the same time, as '0 | 1-3 | 4-7 | 8-10 | 11': every layer of the "
        "draft model once, in order. Unset: made from --layer-parallel-size.",
    )
    layer_parallel_size: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Layers per group where --layer-groups is unset, 1 to 1024; first and last layer stay alone and 1 "
        "is ordinary sequential execution. Unset: on one rank the fastest of several sizes, timed at start-up; on "
        "several ranks 4, the paper's setting, where 5 is too fuzzy to pay.",
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

    @property
    def draft_sources(self) -> DraftSources:
        """`sources` as a set."""
        return parse_sources(self.sources.split(","), "sources")

    @field_validator("sources")
    @classmethod
    def _check_sources(cls, sources: str) -> str:
        try:
            parse_sources(sources.split(","), "sources")
        except InvalidRequestError as error:
            raise ValueError(str(error)) from None
        return sources

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        needs_model = bool(self.draft_sources & MODEL_SOURCES)
        if needs_model and not self.model:
            raise ValueError(
                "model (--model, EASYSPEC_DRAFTER_MODEL) is not set; allowed: a checkpoint folder or a hub id, or "
                "--sources without the model"
            )
        if not needs_model and self.tokenizer is None and not self.model:
            raise ValueError("tokenizer is not set; allowed: a checkpoint folder, for a drafter without a model")
        return self
