"""Commands of the recipe: `python -m models.recipe train | evaluate | cut | widen`."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from models.recipe.cut import cut_and_heal
from models.recipe.distil import distil
from models.recipe.evaluate import evaluate_pair
from models.recipe.llama import load_model, publish_member
from models.recipe.pretrain import pretrain, teach_copying
from models.recipe.report import record_effort, write_cut_report, write_report
from models.recipe.settings import MODELS, RecipeSettings
from models.recipe.tokenizer import load_tokenizer
from models.recipe.tokens import ensure_tokenizer
from models.recipe.trainer import Effort
from models.recipe.widen import WidenSettings, widen_checkpoint

_MIN_PARAMETER_RATIO = 8


def main(arguments: list[str]) -> None:
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
        train(settings)
    if options.command == "cut":
        cut(settings)
    else:
        evaluate(settings, command)
    if options.command != "train" and (settings.out / "base-small").exists():
        write_cut_report(settings, command)


def train(settings: RecipeSettings) -> None:
    """Make `<out>/base`, let it go on with copying, and make `<out>/draft` from the base that ships, rounding included.
    Stages of the base that an earlier, interrupted run has finished in this work folder are left out."""
    if _is_due(settings, "base"):
        _publish(settings, "base", "base", *pretrain(settings))
    base = load_model(settings.out / "base", settings.device)
    if _is_due(settings, "copying"):
        _publish(settings, "copying", "base", base, teach_copying(settings, base))
        base = load_model(settings.out / "base", settings.device)
    _publish(settings, "draft", "draft", *distil(settings, base), exit_layers=list(settings.distil.exit_layers))


def cut(settings: RecipeSettings) -> None:
    """Make `<out>/base-small` from `<out>/base`, unless an earlier run has already made it in this work folder."""
    if _is_due(settings, "base-small"):
        small, kept, effort = cut_and_heal(settings, load_model(settings.out / "base", settings.device))
        _publish(settings, "base-small", "base-small", small, effort, kept_layers=kept)


def _is_due(settings: RecipeSettings, stage: str) -> bool:
    return not (settings.work / f"{stage}.done").exists()


def _publish(
    settings: RecipeSettings, stage: str, member: str, model: LlamaForCausalLM, effort: Effort, **extra_config: Any
) -> None:
    # The cut base's stage may have no corpus of its own, and takes the tokenizer of the base that ships.
    is_cut = stage == "base-small"
    tokenizer = load_tokenizer(settings.out / "base") if is_cut else ensure_tokenizer(settings)
    publish_member(model, tokenizer, settings.out / member, extra_config)
    record_effort(settings.out, stage, effort)
    (settings.work / f"{stage}.done").touch()


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
    given = vars(options)
    optims = {"base": settings.base_optim, "copying": settings.copying_optim, "draft": settings.distil.optim}
    base, copying, draft = (
        replace(optim, num_steps=given[f"{name}_steps"], max_seconds=(given[f"{name}_minutes"] or 0) * 60 or None)
        for name, optim in optims.items()
    )
    heal = replace(settings.cut.heal.optim, max_seconds=options.cut_minutes * 60)
    own_text = replace(settings.distil.own_text, num_batches=options.own_batches)
    distil = replace(settings.distil, optim=draft, own_text=own_text)
    cut = replace(settings.cut, heal=replace(settings.cut.heal, optim=heal))
    return replace(settings, base_optim=base, copying_optim=copying, distil=distil, cut=cut)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models.recipe", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    recipe = RecipeSettings()
    for name, purpose in (
        ("train", "make the pair, resuming an interrupted run, and evaluate it"),
        ("evaluate", "measure all models and write EVALUATION.json and the cards"),
        ("cut", "make a second, shallower base of the finished base, and measure it"),
    ):
        command = commands.add_parser(name, help=purpose)
        command.add_argument("--out", type=Path, default=recipe.out)
        command.add_argument("--work", type=Path, default=recipe.work)
        command.add_argument("--device", default=recipe.device)
        command.add_argument("--threads", type=int, default=torch.get_num_threads())
        command.add_argument("--own-batches", type=int, default=recipe.distil.own_text.num_batches)
        healing_minutes = (recipe.cut.heal.optim.max_seconds or 0) / 60
        command.add_argument("--cut-minutes", type=float, default=healing_minutes, help="how long the cut base heals")
        for stage, optim in (
            ("base", recipe.base_optim),
            ("copying", recipe.copying_optim),
            ("draft", recipe.distil.optim),
        ):
            command.add_argument(f"--{stage}-steps", type=int, default=optim.num_steps)
            command.add_argument(
                f"--{stage}-minutes", type=float, help=f"end the schedule of {stage} by then at the latest"
            )
    widen = commands.add_parser("widen", help="write a larger base that computes the same")
    defaults = WidenSettings()
    widen.add_argument("--source", type=Path, default=MODELS / "base")
    widen.add_argument("--out", type=Path, default=Path(".bench/base"))
    widen.add_argument("--factor", type=int, default=defaults.factor)
    widen.add_argument("--extra-layers", type=int, default=defaults.num_extra_layers)
    widen.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    widen.add_argument("--seed", type=int, default=defaults.seed)
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
