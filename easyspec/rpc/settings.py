"""Settings that several roles share, and how settings are read: one definition for environment and flags.

Every description states unit, range and why the default is what it is; `--help` is made of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from easyspec.errors import ConfigurationError
from easyspec.telemetry.logs import LogFormat

MAX_PORT = 65_535

_SettingsT = TypeVar("_SettingsT", bound=BaseSettings)


def address_field(default: str) -> Any:
    """The `address` field of a role; each role has a port of its own."""
    return Field(
        default=default,
        description="host:port to listen on, port 0 to 65535. 0 takes a free port, named in the `serving` event. "
        "Loopback by default, as there is no authentication on this port.",
    )


class ServerSettings(BaseSettings):
    """What every process that serves has. A role sets `address` (`address_field`), env_prefix and cli_prog_name."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", cli_kebab_case=True, cli_hide_none_type=True, allow_inf_nan=False
    )

    address: str
    log_format: LogFormat = Field(
        default="auto",
        description="auto, json or console: how events are written to stderr. auto is console on a terminal, "
        "JSON elsewhere.",
    )
    drain_grace_s: float = Field(
        default=30.0,
        ge=0.0,
        le=3600.0,
        description="Seconds that running requests get to finish after SIGTERM or Ctrl-C, 0 to 3600. "
        "30 is what container platforms wait before they kill.",
    )

    @field_validator("address")
    @classmethod
    def _check_address(cls, address: str) -> str:
        host, separator, port = address.rpartition(":")
        if not (separator and host and port.isdecimal() and int(port) <= MAX_PORT):
            raise ValueError(f"it must be host:port with port 0 to {MAX_PORT}")
        return address


def _last_part_of_model(fields: dict[str, Any]) -> str:
    return Path(fields["model"]).resolve().name


class EngineSettings(ServerSettings):
    """What every role that owns a model has."""

    model: str = Field(
        min_length=1,
        description="Checkpoint: a folder with config.json, safetensors and tokenizer, or a Hugging Face hub id. "
        "No default: there is no model that fits everyone.",
    )
    served_model_name: str = Field(
        default_factory=_last_part_of_model,
        min_length=1,
        description="Name that requests use. By default the last part of --model, which is how people call it.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="auto, cpu or cuda: where the model runs. auto takes the GPU if there is one.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="auto, float32, bfloat16 or float16: type of weights and computation. "
        "auto is the checkpoint's own, the one the model was made for.",
    )
    num_threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="CPU threads of the model's computation, 1 to 1024. Unset is one a core, and 1 for a model whose "
        "matrices are so small that threads would wait for each other longer than they compute.",
    )
    num_kv_slots: int | None = Field(
        default=None,
        ge=16,
        le=2**31 - 1,
        description="Size of the KV pool in tokens, shared by all sessions, 16 to 2147483647. Unset is made from "
        "--kv-memory-fraction. A pool smaller than the model's context makes the context as short.",
    )
    kv_memory_fraction: float | None = Field(
        default=None,
        gt=0.0,
        le=0.95,
        description="Share of the memory that is free once the weights are loaded that the KV pool takes where "
        "--num-kv-slots is unset, above 0 up to 0.95. Unset is 0.2 on a CPU, whose memory others use too, with at most "
        "32768 tokens or four contexts, which a CPU hardly serves at once; and 0.85 on a GPU.",
    )
    share_prefixes: bool = Field(
        default=True,
        description="Whether sessions whose texts begin alike share KV memory and its computation. On by default: "
        "results are the same, system prompts and earlier turns of a chat are read once.",
    )
    max_prefill_slowdown: float = Field(
        default=1.7,
        ge=1.05,
        le=100.0,
        description="How many times as long as without them a step may take for the prompts it reads while others "
        "decode, 1.05 to 100. 1.7 keeps their pauses below twice the usual with room for noise.",
    )
    max_model_len: int | None = Field(
        default=None,
        ge=2,
        le=2**31 - 1,
        description="Most tokens of prompt and output together, 2 to 2147483647. Unset is the model's own limit.",
    )
    max_tree_nodes: int = Field(
        default=64,
        ge=1,
        le=4096,
        description="Most nodes of one draft tree, root excluded, 1 to 4096. "
        "64 is beyond what pays on any measured pair and bounds what one request can cost.",
    )
    max_batch_rows: int = Field(
        default=512,
        ge=2,
        le=65_536,
        description="Most token rows of all sessions in one engine step, 2 to 65536; at least --prefill-chunk and "
        "more than --max-tree-nodes. 512 bounds the time that one step keeps the others waiting.",
    )
    prefill_chunk: int = Field(
        default=256,
        ge=1,
        le=65_536,
        description="Most prompt tokens (rows) computed in one engine step, 1 to 65536; fewer while others decode, see "
        "--max-prefill-slowdown. 256 fills the machine and does not keep a newcomer waiting long.",
    )

    @model_validator(mode="after")
    def _check_step_fits(self) -> Self:
        least = max(self.prefill_chunk, self.max_tree_nodes + 1)
        if self.max_batch_rows < least:
            raise ValueError(
                f"max_batch_rows is {self.max_batch_rows}; allowed: at least {least}, so that a prefill chunk "
                f"({self.prefill_chunk}) and a tree with its root ({self.max_tree_nodes} + 1) fit one step"
            )
        return self


def load_settings(settings_type: type[_SettingsT], arguments: Sequence[str]) -> _SettingsT:
    """Settings from flags, then environment, then defaults.

    Raises ConfigurationError naming field, value and what is allowed; an unknown flag and `--help` end the process
    (SystemExit 2 and 0), as is usual.
    """
    try:
        return settings_type(_cli_parse_args=list(arguments))
    except ValidationError as error:
        # A default made from another field cannot be made if that one is wrong, which is said already.
        problems = [problem for problem in error.errors() if problem["type"] != "default_factory_not_called"]
        raise ConfigurationError("; ".join(_explain(settings_type, problem) for problem in problems)) from None


def _explain(settings_type: type[BaseSettings], problem: Any) -> str:
    if not problem["loc"]:  # a rule over several fields: its message names them
        return str(problem["ctx"]["error"])
    name = str(problem["loc"][0])
    description = settings_type.model_fields[name].description or ""
    variable = f"{settings_type.model_config.get('env_prefix', '')}{name}".upper()
    where = f"{name} (--{name.replace('_', '-')}, {variable})"
    if problem["type"] == "missing":
        return f"{where} is not set; allowed: {description}"
    why = problem["ctx"]["error"] if problem["type"] == "value_error" else problem["msg"]
    return f"{where} is {problem['input']!r}: {why}; allowed: {description}"
