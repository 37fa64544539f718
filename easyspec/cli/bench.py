"""`easyspec bench`: measurements, which are a part of the checkout and read their own flags."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from easyspec.cli.processes import CHECKOUT
from easyspec.errors import ConfigurationError

# Of a command that hands its arguments on.
OWN_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True}


class _BenchGroup(TyperGroup):
    """A first word that names no measurement is a model."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        is_named = args[0] in self.commands
        return super().resolve_command(ctx, args if is_named else ["model", *args])


bench = typer.Typer(
    cls=_BenchGroup,
    help="Measurements: of a MODEL, plain and speculating (`easyspec bench MODEL --help`), or one of those below.",
    no_args_is_help=True,
)


@bench.command("model", context_settings=OWN_FLAGS, add_help_option=False)
def bench_model(context: typer.Context) -> None:
    """Measure a model, named as for `up`, plain and speculating, on questions; `--help` lists its flags."""
    raise typer.Exit(run_bench("bench.model", context.args))


@bench.command("decode", context_settings=OWN_FLAGS, add_help_option=False)
def bench_decode(context: typer.Context) -> None:
    """Measure decoding, plain and drafted; `--help` lists its flags."""
    raise typer.Exit(run_bench("bench.decode", context.args))


@bench.command("serve", context_settings=OWN_FLAGS, add_help_option=False)
def bench_serve(context: typer.Context) -> None:
    """Measure many streams at once, speculation off, on and auto; `--help` lists its flags."""
    raise typer.Exit(run_bench("bench.serve", context.args))


@bench.command("sources", context_settings=OWN_FLAGS, add_help_option=False)
def bench_sources(context: typer.Context) -> None:
    """Measure every source of guesses, alone and fused, at equal node budgets; `--help` lists its flags."""
    raise typer.Exit(run_bench("bench.sources", context.args))


@bench.command("targets", context_settings=OWN_FLAGS, add_help_option=False)
def bench_targets(context: typer.Context) -> None:
    """Measure two base models that share one drafter, plain and drafted side by side; `--help` lists its flags."""
    raise typer.Exit(run_bench("bench.targets", context.args))


@bench.command("alternatives", context_settings=OWN_FLAGS, add_help_option=False)
def bench_alternatives(context: typer.Context) -> None:
    """Measure easyspec beside transformers' own generation, plain and assisted; `--help` lists its flags."""
    raise typer.Exit(run_bench("bench.alternatives", context.args))


def run_bench(name: str, arguments: list[str]) -> int:
    """The exit code of a module's `main`; raises ConfigurationError where there is no checkout."""
    if str(CHECKOUT) not in sys.path:
        sys.path.append(str(CHECKOUT))
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in ("bench", name):
            raise
        raise ConfigurationError("the benchmarks are part of the checkout, which is not here") from error
    return int(module.main(arguments))
