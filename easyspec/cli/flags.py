"""Flags that several commands share, and what they mean together."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from easyspec.cli.clients import GenerateFlags
from easyspec.errors import InvalidRequestError
from easyspec.planner.placement import Wishes
from easyspec.speculation.parameters import SamplingParameters, TreeBudget

# Nothing of a model is known before its services run; they check again, by their own limits.
_ANY_VOCAB_SIZE = 2**31
_ANY_NUM_NODES = 4096


class Mlp(enum.Enum):
    """Where the MLPs of a layer group run."""

    sequential = "sequential"
    staged = "staged"


class Placement(enum.Enum):
    """What the drafter's ranks share."""

    layers = "layers"
    layers_sharded_mlp = "layers-sharded-mlp"
    tensor = "tensor"


Base = Annotated[Path, typer.Option("--base", help="Checkpoint folder of the base model.", show_default="bundled")]
Draft = Annotated[Path, typer.Option("--draft", help="Checkpoint folder of the draft model.", show_default="bundled")]
NoDraft = Annotated[bool, typer.Option("--no-draft", help="Plain decoding; no drafter is started.")]
Gateway = Annotated[
    str | None, typer.Option(help="host:port of a running gateway. Unset: start the services, and stop them after.")
]
Also = Annotated[
    list[str] | None,
    typer.Option(
        help="A further base model, as NAME=FOLDER; may be repeated. It has its own verifier and shares the drafter.",
        show_default=False,
    ),
]
Model = Annotated[str, typer.Option(help="Name of the model to ask; unset: the gateway's first.", show_default=False)]
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
RankPlacementFlag = Annotated[
    Placement | None,
    typer.Option(
        "--rank-placement",
        help="What the drafter's ranks share: the layers of groups, these and sharded MLPs, or every layer.",
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the logs of the services that are started.")]

Seed = Annotated[int | None, typer.Option(help="Reproduces a completion. Unset: drawn, and reported.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy. [default: 1.0]")]
TopK = Annotated[int | None, typer.Option(help="Keep the k likeliest tokens. [default: all]")]
TopP = Annotated[float | None, typer.Option(help="Keep this much probability. [default: 1.0]")]
MinP = Annotated[float | None, typer.Option(help="Drop tokens below this share of the likeliest.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1 discourages seen tokens.")]
PresencePenalty = Annotated[float | None, typer.Option(help="Per token seen in the output, once.")]
FrequencyPenalty = Annotated[float | None, typer.Option(help="Per token seen in the output, each time.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the output; may be repeated.")]

NumDraftLevels = Annotated[int | None, typer.Option(help="Levels of a draft tree.")]
TreeWidth = Annotated[int | None, typer.Option(help="Nodes expanded per level.")]
Sources = Annotated[
    str | None, typer.Option(help="Who guesses: some of model,retrieval,ngram,early_exit. [default: the drafter's]")
]
NumNodes = Annotated[int | None, typer.Option(help="Nodes of a draft tree.")]
LayerParallelSize = Annotated[
    int | None, typer.Option(help="Draft layers whose attention runs at the same time; 1 is sequential.")
]
MlpFlag = Annotated[Mlp | None, typer.Option("--mlp", help="Where the MLPs of a layer group run.")]


def wishes_of(
    tensor_parallel_size: int | None = None,
    drafter_ranks: int | None = None,
    layer_parallel_size: int | None = None,
    mlp: Mlp | None = None,
    rank_placement: Placement | None = None,
) -> Wishes:
    """What these flags ask for; the rest is planned."""
    return Wishes(
        tensor_parallel_size,
        drafter_ranks,
        layer_parallel_size,
        None if mlp is None else mlp.value,
        None if rank_placement is None else rank_placement.value,
    )


def check_flags(flags: GenerateFlags) -> None:
    """Raise InvalidRequestError for what can be told without a model, before anything is started."""
    given = {name: value for name, value in vars(flags.sampling).items() if value is not None}
    SamplingParameters(**({"seed": 0} | given)).check(_ANY_VOCAB_SIZE)
    flags.stop.check(_ANY_VOCAB_SIZE)
    TreeBudget(_or_one(flags.num_draft_levels), _or_one(flags.tree_width), _or_one(flags.num_nodes)).check(
        _ANY_NUM_NODES
    )
    layer_parallel_size = flags.layer_plan.layer_parallel_size
    if layer_parallel_size is not None and layer_parallel_size < 1:
        raise InvalidRequestError("layer_parallel_size", layer_parallel_size, "at least 1")


def named_folders(flag: str, values: list[str] | None) -> dict[str, Path]:
    """Folders by name; InvalidRequestError unless each value is NAME=FOLDER, with names that differ."""
    folders: dict[str, Path] = {}
    for value in values or []:
        name, separator, folder = value.partition("=")
        if not (name and separator and folder) or name in folders:
            raise InvalidRequestError(flag, value, "NAME=FOLDER, each name once")
        folders[name] = Path(folder)
    return folders


def _or_one(value: int | None) -> int:
    return 1 if value is None else value


def checked_address(flag: str, address: str) -> str:
    """The address; InvalidRequestError unless it is host:port."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and int(port) < 2**16):
        raise InvalidRequestError(flag, address, "host:port")
    return address
