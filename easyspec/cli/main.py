"""The `easyspec` command. Imports neither torch nor transformers: it must start at once."""

from __future__ import annotations

import enum
import importlib
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from easyspec import __version__
from easyspec.cli.clients import GenerateFlags, SamplingFlags
from easyspec.cli.generate import stream_completion
from easyspec.cli.plan import plan_as_json, print_plan, print_validation
from easyspec.cli.processes import DEFAULT_BASE, DEFAULT_DRAFT, HTTP_OFF, LogSink, ServiceStack, StackSettings
from easyspec.cli.signals import run_until_signal
from easyspec.cli.up import RoleLog, serve_until_cancelled
from easyspec.errors import ConfigurationError, EasyspecError, InvalidRequestError, UnknownModelError
from easyspec.planner.acceptance import EXACT_ACCEPTANCE_RATE
from easyspec.planner.costs import CostModel
from easyspec.planner.hardware import device_named, stack_named
from easyspec.planner.planner import Workload, make_plan
from easyspec.planner.shape import find_shape
from easyspec.planner.validation import compare_with_paper
from easyspec.speculation.parameters import (
    LayerPlanRequest,
    MlpPlacement,
    SamplingParameters,
    StopConditions,
    TreeBudget,
)

EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2

# Nothing of a model is known before its services run; they check again, by their own limits.
_ANY_VOCAB_SIZE = 2**31
_ANY_NUM_NODES = 4096

app = typer.Typer(
    name="easyspec",
    help="Speculative decoding as three services: drafter, verifier, gateway.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Measurements.", no_args_is_help=True)
app.add_typer(bench, name="bench")


class Mlp(enum.Enum):
    """Where the MLPs of a layer group run."""

    sequential = "sequential"
    staged = "staged"


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"easyspec {__version__}")
        raise typer.Exit


@app.callback()
def easyspec(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Speculative decoding as three services: drafter, verifier, gateway."""


_Base = Annotated[Path, typer.Option("--base", help="Checkpoint folder of the base model.", show_default="bundled")]
_Draft = Annotated[Path, typer.Option("--draft", help="Checkpoint folder of the draft model.", show_default="bundled")]
_NoDraft = Annotated[bool, typer.Option("--no-draft", help="Plain decoding; no drafter is started.")]


@app.command()
def up(
    base: _Base = DEFAULT_BASE,
    draft: _Draft = DEFAULT_DRAFT,
    no_draft: _NoDraft = False,
    gateway_address: Annotated[str, typer.Option(help="host:port; port 0 takes a free one.")] = "127.0.0.1:50051",
    drafter_address: Annotated[str, typer.Option(help="host:port; port 0 takes a free one.")] = "127.0.0.1:50052",
    verifier_address: Annotated[str, typer.Option(help="host:port; port 0 takes a free one.")] = "127.0.0.1:50053",
    http_address: Annotated[
        str, typer.Option(help="host:port of the OpenAI-compatible REST API; port 0 takes a free one, off: none.")
    ] = "127.0.0.1:8000",
) -> None:
    """Start all services and keep them running; Ctrl-C drains and stops them."""
    log_flags = ("--log-format", "console" if sys.stderr.isatty() else "json")
    settings = StackSettings(
        base=base,
        draft=None if no_draft else draft,
        gateway_address=_checked_address("--gateway-address", gateway_address),
        verifier_address=_checked_address("--verifier-address", verifier_address),
        drafter_address=_checked_address("--drafter-address", drafter_address),
        http_address=http_address if http_address == HTTP_OFF else _checked_address("--http-address", http_address),
        flags=dict.fromkeys(("verifier", "drafter", "gateway"), log_flags),
    )
    raise typer.Exit(run_until_signal(serve_until_cancelled(settings)))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to continue.")],
    gateway: Annotated[
        str | None, typer.Option(help="host:port of a running gateway. Unset: start the services, and stop them after.")
    ] = None,
    base: _Base = DEFAULT_BASE,
    draft: _Draft = DEFAULT_DRAFT,
    no_draft: _NoDraft = False,
    chat: Annotated[bool, typer.Option("--chat", help="PROMPT is a user's message, not a text to continue.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Most output tokens.")] = 128,
    seed: Annotated[int | None, typer.Option(help="Reproduces a completion. Unset: drawn, and reported.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy. [default: 1.0]")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens. [default: all]")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep this much probability. [default: 1.0]")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this share of the likeliest.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 discourages seen tokens.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="Per token seen in the output, once.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="Per token seen in the output, each time.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the output; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end of the text.")] = False,
    num_draft_levels: Annotated[int | None, typer.Option(help="Levels of a draft tree.")] = None,
    tree_width: Annotated[int | None, typer.Option(help="Nodes expanded per level.")] = None,
    num_nodes: Annotated[int | None, typer.Option(help="Nodes of a draft tree.")] = None,
    layer_parallel_size: Annotated[
        int | None, typer.Option(help="Draft layers whose attention runs at the same time; 1 is sequential.")
    ] = None,
    mlp: Annotated[Mlp | None, typer.Option(help="Where the MLPs of a layer group run.")] = None,
    no_calibration: Annotated[
        bool, typer.Option("--no-calibration", help="Keep the drafter's fuzzy KV entries (for measurement).")
    ] = False,
    show_speculation: Annotated[
        bool, typer.Option("--show-speculation", help="Colour accepted draft tokens green and bonus tokens yellow.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the logs of the services that are started.")] = False,
) -> None:
    """Stream a completion to stdout, and statistics to stderr."""
    flags = GenerateFlags(
        prompt=prompt,
        sampling=SamplingFlags(
            seed, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty
        ),
        stop=StopConditions(max_tokens=max_tokens, ignore_eos=ignore_eos),
        stop_strings=tuple(stop or ()),
        is_chat=chat,
        is_drafting=not no_draft,
        num_draft_levels=num_draft_levels,
        tree_width=tree_width,
        num_nodes=num_nodes,
        layer_plan=LayerPlanRequest(
            layer_parallel_size, MlpPlacement(mlp.value) if mlp is not None else None, not no_calibration
        ),
    )
    _check(flags)
    if gateway is not None:
        work = stream_completion(_checked_address("--gateway", gateway), flags, show_speculation)
    else:
        settings = StackSettings(base=base, draft=None if no_draft else draft)
        work = _generate_with_own_services(settings, flags, show_speculation, RoleLog() if verbose else _no_log)
    raise typer.Exit(run_until_signal(work))


@app.command()
def plan(
    base: Annotated[
        str, typer.Option(help="Base model: folder, hub id or a known shape such as llama-3-70b.")
    ] = "llama-3-70b",
    draft: Annotated[str, typer.Option(help="Draft model, named likewise.")] = "llama-3-8b",
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of one machine.")] = 8,
    gpu: Annotated[str, typer.Option(help="Which: a100, a100-40gb, h100, h200, b200, l40s.")] = "h100",
    stack: Annotated[str, typer.Option(help="graphs, eager, or paper (transformers' eager code).")] = "graphs",
    num_draft_levels: Annotated[int, typer.Option(min=1, help="Levels of a draft tree.")] = 5,
    tree_width: Annotated[int, typer.Option(min=1, help="Nodes expanded per level.")] = 4,
    num_nodes: Annotated[int, typer.Option(min=1, help="Nodes of a draft tree.")] = 15,
    context: Annotated[int, typer.Option(min=1, help="Cached tokens of a request.")] = 2048,
    kv_tokens: Annotated[int, typer.Option(min=1, help="Tokens that the KV pools must hold.")] = 65_536,
    acceptance_rate: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Accepted / drafted levels of the draft executed exactly.")
    ] = EXACT_ACCEPTANCE_RATE,
    validate: Annotated[bool, typer.Option("--validate", help="Compare the model with the paper's Table 2.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    shows_all: Annotated[bool, typer.Option("--all", help="Show every scheme.")] = False,
) -> None:
    """Estimate what a round takes in every way of running base and draft on some GPUs, and recommend one."""
    if validate:
        print_validation(compare_with_paper())
        return
    costs = CostModel(device_named(gpu), stack_named(stack))
    workload = Workload(num_draft_levels, tree_width, num_nodes, context, kv_tokens, acceptance_rate)
    found = make_plan(costs, find_shape(base), find_shape(draft), gpus, workload)
    if as_json:
        print(plan_as_json(found, costs.device, costs.stack))
    else:
        print_plan(found, f"{base} + {draft} on {gpus} x {gpu}, {stack}", shows_all=shows_all)


_BENCH_COMMAND = {"allow_extra_args": True, "ignore_unknown_options": True}


@bench.command("decode", context_settings=_BENCH_COMMAND, add_help_option=False)
def bench_decode(context: typer.Context) -> None:
    """Measure decoding, plain and drafted; `--help` lists its flags."""
    raise typer.Exit(_run_bench("bench.decode", context.args))


@bench.command("serve", context_settings=_BENCH_COMMAND, add_help_option=False)
def bench_serve(context: typer.Context) -> None:
    """Measure many streams at once, speculation off, on and auto; `--help` lists its flags."""
    raise typer.Exit(_run_bench("bench.serve", context.args))


def _run_bench(name: str, arguments: list[str]) -> int:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in ("bench", name):
            raise
        raise ConfigurationError("the benchmarks are part of the checkout, which is not here") from error
    return int(module.main(arguments))


async def _generate_with_own_services(
    settings: StackSettings, flags: GenerateFlags, is_coloured: bool, on_log: LogSink
) -> None:
    async with ServiceStack(settings, on_log) as stack:
        await stream_completion(stack.gateway_address, flags, is_coloured)


def _no_log(_role: str, _line: str) -> None:
    """A failure quotes the last line."""


def _check(flags: GenerateFlags) -> None:
    """Raise InvalidRequestError for what can be told without a model, before anything is started."""
    if not flags.prompt:
        raise InvalidRequestError("prompt", flags.prompt, "at least one character")
    given = {name: value for name, value in vars(flags.sampling).items() if value is not None}
    SamplingParameters(**({"seed": 0} | given)).check(_ANY_VOCAB_SIZE)
    flags.stop.check(_ANY_VOCAB_SIZE)
    TreeBudget(_or_one(flags.num_draft_levels), _or_one(flags.tree_width), _or_one(flags.num_nodes)).check(
        _ANY_NUM_NODES
    )
    layer_parallel_size = flags.layer_plan.layer_parallel_size
    if layer_parallel_size is not None and layer_parallel_size < 1:
        raise InvalidRequestError("layer_parallel_size", layer_parallel_size, "at least 1")


def _or_one(value: int | None) -> int:
    return 1 if value is None else value


def _checked_address(flag: str, address: str) -> str:
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and int(port) < 2**16):
        raise InvalidRequestError(flag, address, "host:port")
    return address


def main() -> None:
    """Entry point: one line on stderr and exit code 2 for bad input, 1 for a failure."""
    try:
        app()
    except (InvalidRequestError, UnknownModelError, ConfigurationError) as error:
        _end(error, EXIT_BAD_INPUT)
    except EasyspecError as error:
        _end(error, EXIT_FAILURE)
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILURE)


def _end(error: EasyspecError, code: int) -> None:
    print(f"easyspec: {error}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
