"""Commands of the recipe: `python -m models.recipe train | evaluate | cut | widen`."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch

from models.recipe.cut import cut_and_heal
from models.recipe.cut_report import write_cut_report
from models.recipe.distil import distil
from models.recipe.evaluate import evaluate_pair
from models.recipe.llama import load_model
from models.recipe.pretrain import pretrain, teach_copying
from models.recipe.publish import publish_member
from models.recipe.report import record_effort, write_report
from models.recipe.settings import MODELS, RecipeSettings
from models.recipe.tokenizer import load_tokenizer
from models.recipe.tokens import ensure_tokenizer
from models.recipe.widen import WidenSettings, widen_checkpoint

_MIN_PARAMETER_RATIO = 8


def main(arguments: list[str]) -> None:
    """Run one command; raises SystemExit on bad arguments."""
    options = _parser().parse_args(arguments)
    if options.command == "widen":
        dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
        widen = WidenSettings(options.factor, options.extra_layers, dtype, options.seed)
        num_params = widen_checkpoint(options.source, options.out, widen)
        print(f"{options.out}: {num_params:,} parameters")
        return
    settings = _settings(options)
    command = "python -m models.recipe " + shlex.join(arguments)
    if options.command == "train":
        train_base(settings)
        train_copying(settings)
        train_draft(settings)
    if options.command == "cut":
        cut(settings)
    else:
        evaluate(settings, command)
    if options.command != "train" and (settings.out / "base-small").exists():
        write_cut_report(settings, command)


def train_base(settings: RecipeSettings) -> None:
    """Make `<out>/base`, unless an earlier, interrupted run has already made it."""
    done = settings.work / "base.done"
    if done.exists():
        return
    base, effort = pretrain(settings)
    publish_member(base, ensure_tokenizer(settings), settings.out / "base", {})
    record_effort(settings.out, "base", effort)
    done.touch()


def train_copying(settings: RecipeSettings) -> None:
    """Make `<out>/base` go on from the pre-trained one there, unless an earlier run has already done it."""
    done = settings.work / "copying.done"
    if done.exists():
        return
    base = load_model(settings.out / "base", settings.device)
    effort = teach_copying(settings, base)
    publish_member(base, ensure_tokenizer(settings), settings.out / "base", {})
    record_effort(settings.out, "copying", effort)
    done.touch()


def train_draft(settings: RecipeSettings) -> None:
    """Make `<out>/draft` from the base that ships, rounding included."""
    base = load_model(settings.out / "base", settings.device)
    draft, effort = distil(settings, base)
    extra = {"exit_layers": list(settings.distil.exit_layers)}
    publish_member(draft, ensure_tokenizer(settings), settings.out / "draft", extra)
    record_effort(settings.out, "draft", effort)


def cut(settings: RecipeSettings) -> None:
    """Make `<out>/base-small` from `<out>/base`, unless an earlier run has already made it in this work folder."""
    done = settings.work / "base-small.done"
    if done.exists():
        return
    small, kept, effort = cut_and_heal(settings, load_model(settings.out / "base", settings.device))
    publish_member(small, load_tokenizer(settings.out / "base"), settings.out / "base-small", {"kept_layers": kept})
    record_effort(settings.out, "base-small", effort)
    done.touch()


def evaluate(settings: RecipeSettings, command: str) -> None:
    """Write figures and cards of the pair in `settings.out`; raises if the base is not at least 8 times the draft."""
    num_params = {name: load_model(settings.out / name, "cpu").num_parameters() for name in ("base", "draft")}
    if num_params["base"] < _MIN_PARAMETER_RATIO * num_params["draft"]:
        raise ValueError(f"the base must have 8 times the draft's parameters, not {num_params}")
    figures = evaluate_pair(settings.out / "base", settings.out / "draft", settings.distil.exit_layers)
    write_report(settings, command, num_params, figures)


def _settings(options: argparse.Namespace) -> RecipeSettings:
    torch.set_num_threads(options.threads)
    settings = RecipeSettings(out=options.out, work=options.work, device=options.device)
    settings.work.mkdir(parents=True, exist_ok=True)
    base = replace(
        settings.base_optim,
        num_steps=options.base_steps,
        max_seconds=options.base_minutes and options.base_minutes * 60,
    )
    copying = replace(
        settings.copying_optim,
        num_steps=options.copying_steps,
        max_seconds=options.copying_minutes and options.copying_minutes * 60,
    )
    draft = replace(
        settings.distil.optim,
        num_steps=options.draft_steps,
        max_seconds=options.draft_minutes and options.draft_minutes * 60,
    )
    heal = replace(settings.cut.heal.optim, max_seconds=options.cut_minutes * 60)
    own_text = replace(settings.distil.own_text, num_batches=options.own_batches)
    distil = replace(settings.distil, optim=draft, own_text=own_text)
    cut = replace(settings.cut, heal=replace(settings.cut.heal, optim=heal))
    return replace(settings, base_optim=base, copying_optim=copying, distil=distil, cut=cut)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models.recipe", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, purpose in (
        ("train", "make the pair, resuming an interrupted run, and evaluate it"),
        ("evaluate", "measure all models and write EVALUATION.json and the cards"),
        ("cut", "make a second, shallower base of the finished base, and measure it"),
    ):
        _add_recipe_options(commands.add_parser(name, help=purpose))
    widen = commands.add_parser("widen", help="write a larger base that computes the same")
    defaults = WidenSettings()
    widen.add_argument("--source", type=Path, default=MODELS / "base")
    widen.add_argument("--out", type=Path, default=Path(".bench/base"))
    widen.add_argument("--factor", type=int, default=defaults.factor)
    widen.add_argument("--extra-layers", type=int, default=defaults.num_extra_layers)
    widen.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    widen.add_argument("--seed", type=int, default=defaults.seed)
    return parser


def _add_recipe_options(command: argparse.ArgumentParser) -> None:
    defaults = RecipeSettings()
    command.add_argument("--out", type=Path, default=defaults.out)
    command.add_argument("--work", type=Path, default=defaults.work)
    command.add_argument("--device", default=defaults.device)
    command.add_argument("--threads", type=int, default=torch.get_num_threads())
    command.add_argument("--base-steps", type=int, default=defaults.base_optim.num_steps)
    command.add_argument("--copying-steps", type=int, default=defaults.copying_optim.num_steps)
    command.add_argument("--draft-steps", type=int, default=defaults.distil.optim.num_steps)
    own_batches = defaults.distil.own_text.num_batches
    command.add_argument("--own-batches", type=int, default=own_batches)
    healing_minutes = (defaults.cut.heal.optim.max_seconds or 0) / 60
    command.add_argument("--cut-minutes", type=float, default=healing_minutes, help="how long the shallower base heals")
    for name in ("base", "copying", "draft"):
        command.add_argument(f"--{name}-minutes", type=float, help=f"end the schedule of {name} by then at the latest")


if __name__ == "__main__":
    main(sys.argv[1:])
