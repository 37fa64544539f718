"""Flags that several commands share, and what they mean together."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from easyspec.cli.clients import GenerateFlags, SamplingFlags
from easyspec.cli.processes import DRAFTER, VERIFIER
from easyspec.errors import InvalidRequestError
from easyspec.planner.placement import Wishes
from easyspec.speculation.parameters import (
    LayerPlanRequest,
    MlpPlacement,
    SamplingParameters,
    StopConditions,
    TreeBudget,
)
from easyspec.speculation.sources import DraftSources
from easyspec.tls import is_loopback

# Nothing of a model is known before its services run; they check again, by their own limits.
_ANY_VOCAB_SIZE = 2**31
_ANY_NUM_NODES = 4096


_A_MODEL = "folder, GGUF file, hub id, or a name that `easyspec models` lists"
BaseModel = Annotated[
    str | None, typer.Argument(metavar="[MODEL]", help=f"The base model: {_A_MODEL}. [default: bundled]")
]
Base = Annotated[str | None, typer.Option("--base", help="The same as MODEL.")]
Draft = Annotated[
    str | None,
    typer.Option(
        "--draft",
        help="The draft model, named likewise. [default: the bundled one where it has the base's tokenizer, else "
        "guesses from the text itself]",
    ),
]
NoDraft = Annotated[bool, typer.Option("--no-draft", help="Plain decoding; no drafter is started.")]
Also = Annotated[
    list[str] | None,
    typer.Option(
        help="A further base model, as NAME=FOLDER; may be repeated. It has its own verifier and shares the drafter."
    ),
]
TensorParallelSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Ranks (processes, one a GPU) that share the base model's layers. [default: planned; 1 without GPUs]",
    ),
]
DrafterRanks = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Ranks that share the draft model's layers, as --rank-placement says. [default: planned; 1 without GPUs]",
    ),
]
Sources = Annotated[
    str | None,
    typer.Option(help="Sources of guesses: some of model,retrieval,ngram,early_exit. [default: the drafter's]"),
]
LayerParallelSize = Annotated[
    int | None, typer.Option(help="Draft layers whose attention runs at the same time; 1 is sequential.")
]
MlpFlag = Annotated[MlpPlacement | None, typer.Option("--mlp", help="Where the MLPs of a layer group run.")]


@dataclass(frozen=True)
class RankFlags:
    """How many ranks the roles have, and what a drafter's share."""

    tensor_parallel_size: TensorParallelSize = None
    drafter_ranks: DrafterRanks = None
    layer_parallel_size: LayerParallelSize = None
    mlp: MlpFlag = None
    rank_placement: Annotated[
        Literal["layers", "layers-sharded-mlp", "tensor"] | None,
        typer.Option(
            help="What the drafter's ranks share: the layers of groups, these and sharded MLPs, or every layer."
        ),
    ] = None

    @property
    def wishes(self) -> Wishes:
        return Wishes(**vars(self) | {"mlp": None if self.mlp is None else self.mlp.value})


@dataclass(frozen=True)
class ServiceFlags:
    """How the models of verifier and drafter are run."""

    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None,
        typer.Option(help="Type that both models compute in. [default: the checkpoint's own]"),
    ] = None
    executor: Annotated[
        Literal["auto", "native", "native-8bit", "reference"] | None,
        typer.Option(
            help="What computes both models; native-8bit rounds inputs of 8-bit and 4-bit weights as llama.cpp does, "
            "which makes products of several rows faster. [default: auto]"
        ),
    ] = None
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of each model. [default: one a core]")] = None
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Most tokens of prompt and output. [default: the model's own limit]")
    ] = None
    kv_memory: Annotated[
        float | None,
        typer.Option(min=0.001, help="GiB of the base model's KV memory. [default: a share of what is free]"),
    ] = None
    served_model_name: Annotated[
        str | None, typer.Option(help="Name that requests use. [default: the last part of MODEL]")
    ] = None
    sources: Annotated[
        str | None,
        typer.Option(help="Sources of guesses where a request names none: some of model,retrieval,ngram,early_exit."),
    ] = None

    def by_role(self) -> dict[str, list[str]]:
        """What these flags are called at verifier and drafter."""
        both = _given(("--dtype", self.dtype), ("--executor", self.executor), ("--num-threads", self.threads))
        verifier = _given(("--max-model-len", self.max_model_len), ("--kv-memory-gib", self.kv_memory))
        return {VERIFIER: [*both, *verifier], DRAFTER: [*both, *_given(("--sources", self.sources))]}


@dataclass(frozen=True)
class ReachFlags:
    """Which clients reach the gateway, and how."""

    api_key_file: Annotated[
        Path | None,
        typer.Option(help="File with the API keys of clients, one a line, as name:key. [default: no key is needed]"),
    ] = None
    allow_plaintext: Annotated[
        bool,
        typer.Option("--allow-plaintext", help="Serve beyond this machine without TLS, on a network that encrypts."),
    ] = False
    tls_certificate: Annotated[
        Path | None, typer.Option(help="PEM file with the gateway's certificate chain; turns TLS on.")
    ] = None
    tls_key: Annotated[Path | None, typer.Option(help="PEM file with its private key.")] = None
    cors_origins: Annotated[
        str | None,
        typer.Option(
            help="Web pages that may call the REST API: origins separated by commas, or *. [default: the playground]"
        ),
    ] = None

    def of_gateway(self) -> list[str]:
        return _given(
            ("--api-keys-file", self.api_key_file),
            ("--tls-certificate", self.tls_certificate),
            ("--tls-key", self.tls_key),
            ("--cors-origins", self.cors_origins),
            ("--allow-plaintext", "true" if self.allow_plaintext else None),
        )

    def check(self, flag: str, address: str) -> None:
        """Raise InvalidRequestError for an address beyond this machine unless something makes it safe to serve it."""
        is_safe = self.allow_plaintext or self.tls_certificate is not None
        if not is_safe and not is_loopback(address):
            raise InvalidRequestError(
                flag,
                address,
                "127.0.0.1, [::1] or localhost; beyond this machine with --tls-certificate and --tls-key, or with "
                "--allow-plaintext where the network encrypts (and --api-key-file to ask for keys)",
            )


@dataclass(frozen=True)
class StackFlags:
    """Which services a command asks: those of a running gateway, or its own."""

    gateway: Annotated[
        str | None, typer.Option(help="host:port of a running gateway. Unset: start the services, and stop them after.")
    ] = None
    base: Base = None
    draft: Draft = None
    no_draft: NoDraft = False
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the logs of the services that are started.")] = False


@dataclass(frozen=True)
class RequestFlags:
    """What a command asks for, beside its prompt and how tokens are chosen."""

    model: Annotated[str, typer.Option(help="Name of the model to ask; unset: the gateway's first.")] = ""
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the output; may be repeated.")] = None
    num_draft_levels: Annotated[int | None, typer.Option(help="Levels of a draft tree.")] = None
    tree_width: Annotated[int | None, typer.Option(help="Nodes expanded per level.")] = None
    num_nodes: Annotated[int | None, typer.Option(help="Nodes of a draft tree.")] = None
    layer_parallel_size: LayerParallelSize = None
    mlp: MlpFlag = None

    def request(
        self,
        prompt: str,
        sampling: SamplingFlags,
        stop: StopConditions,
        *,
        is_chat: bool,
        is_drafting: bool,
        sources: DraftSources | None = None,
        calibrates: bool = True,
    ) -> GenerateFlags:
        """The request; raises InvalidRequestError for what can be told without a model, before anything is started."""
        given = {name: value for name, value in vars(sampling).items() if value is not None}
        SamplingParameters(**({"seed": 0} | given)).check(_ANY_VOCAB_SIZE)
        stop.check(_ANY_VOCAB_SIZE)
        sizes = (self.num_draft_levels, self.tree_width, self.num_nodes)
        TreeBudget(*(1 if size is None else size for size in sizes)).check(_ANY_NUM_NODES)
        if self.layer_parallel_size is not None and self.layer_parallel_size < 1:
            raise InvalidRequestError("layer_parallel_size", self.layer_parallel_size, "at least 1")
        return GenerateFlags(
            prompt=prompt,
            model=self.model,
            sampling=sampling,
            stop=stop,
            stop_strings=tuple(self.stop or ()),
            is_chat=is_chat,
            is_drafting=is_drafting,
            num_draft_levels=self.num_draft_levels,
            tree_width=self.tree_width,
            num_nodes=self.num_nodes,
            sources=sources,
            layer_plan=LayerPlanRequest(self.layer_parallel_size, self.mlp, calibrates),
        )


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command, which takes dataclasses of flags, as typer wants it: each field is a parameter of its own."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    parameters = []
    for given in inspect.signature(command).parameters.values():
        if given.name not in groups:
            parameters.append(given.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[given.name]))
            continue
        of_fields = get_type_hints(groups[given.name], include_extras=True)
        parameters += [
            inspect.Parameter(
                each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=of_fields[each.name]
            )
            for each in dataclasses.fields(groups[given.name])
        ]

    @functools.wraps(command)
    def spread_command(**values: Any) -> None:
        made = {
            name: group(**{each.name: values.pop(each.name) for each in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        command(**values, **made)

    spread_command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return spread_command


def _given(*pairs: tuple[str, object]) -> list[str]:
    return [part for flag, value in pairs if value is not None for part in (flag, str(value))]


def named_folders(flag: str, values: list[str] | None) -> dict[str, Path]:
    """Folders by name; InvalidRequestError unless each value is NAME=FOLDER, with names that differ."""
    folders: dict[str, Path] = {}
    for value in values or []:
        name, separator, folder = value.partition("=")
        if not (name and separator and folder) or name in folders:
            raise InvalidRequestError(flag, value, "NAME=FOLDER, each name once")
        folders[name] = Path(folder)
    return folders


def model_and_prompt(words: list[str]) -> tuple[str | None, str]:
    """What `[MODEL] PROMPT` stands for; InvalidRequestError for more words."""
    if len(words) > 2:
        raise InvalidRequestError("PROMPT", " ".join(words), "one argument, in quotes if it has blanks")
    return (None if len(words) == 1 else words[0]), words[-1]


def checked_address(flag: str, address: str) -> str:
    """The address; InvalidRequestError unless it is host:port."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and int(port) < 2**16):
        raise InvalidRequestError(flag, address, "host:port")
    return address
