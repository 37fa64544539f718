"""Flags from a settings dataclass: a field's type, default and `flag` are all that a flag needs."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

S = TypeVar("S")

# Of every benchmark, beside the fields of its settings.
_JSON = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results to FILE.")]
_QUICK = Annotated[bool, typer.Option("--quick", help="Few and short: does it run, roughly how fast.")]


def flag(
    text: str, name: str | None = None, *, choices: Collection[str] = (), minimum: float | None = None, **rest: Any
) -> Any:
    """What a field says of its flag in `Annotated`; `name` is the field's by default."""
    if choices:
        rest |= {"parser": _one_of(choices), "metavar": "|".join(choices)}
    return typer.Option(*([name] if name else []), help=text, min=minimum, **rest)


def _one_of(choices: Collection[str]) -> Callable[[str], str]:
    def choice(text: str) -> str:
        if text not in choices:
            raise typer.BadParameter(f"{text!r} is none of {', '.join(choices)}")
        return text

    return choice


def parse_settings(settings: type[S], command: str, about: str, argv: Sequence[str]) -> tuple[S, Path | None]:
    """The settings that `argv` asks for, and the result file; raises SystemExit after --help and for what is wrong.
    Where the class has a mapping QUICK, `--quick` replaces the defaults that it names."""
    quick: Mapping[str, Any] = getattr(settings, "QUICK", {})
    found: list[dict[str, Any]] = []

    def note(**values: Any) -> None:
        found.append(values)

    hints = get_type_hints(settings, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
    parameters = [_parameter(field, hints[name]) for name, field in fields.items()]
    parameters.append(inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_JSON))
    if quick:
        parameters.append(inspect.Parameter("quick", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_QUICK))
    note.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(cls=_ListsCommand, help=about)(note)
    try:
        app(list(argv), prog_name=command)
    except SystemExit:
        if not found:
            raise
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in found[0].items()
    }
    path: Path | None = values.pop("json")
    if values.pop("quick", False):
        values |= {name: value for name, value in quick.items() if values[name] == fields[name].default}
    return settings(**values), path


def _parameter(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    """As typer wants it: a list for a tuple of any length, and no --no-NAME for a bool."""
    kind, info, *_ = get_args(hint)
    default: Any = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
    if get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis:
        kind, default = list[get_args(kind)[0]], list(default)  # type: ignore[misc]
    if kind is bool and not info.param_decls:
        info.param_decls = ("--" + field.name.replace("_", "-"),)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )


class _ListsCommand(TyperCommand):
    """`--rows 1 4` says what `--rows 1 --rows 4` says."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        lists = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        return super().parse_args(ctx, one_by_one(args, lists))


def one_by_one(arguments: Sequence[str], lists: Collection[str]) -> list[str]:
    """The name of a flag of `lists` before each of its values."""
    spelled: list[str] = []
    name, is_bare = "", False
    for argument in arguments:
        if argument in lists:
            name, is_bare = argument, True
        elif argument.startswith("--"):
            name, is_bare = "", False
            spelled.append(argument)
        else:
            spelled += [name, argument] if name else [argument]
            is_bare = False
    # One without values is left for the parser to complain about.
    return [*spelled, name] if is_bare else spelled
