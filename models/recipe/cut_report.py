"""Figures and model card of the shallower base."""

from __future__ import annotations

import datetime
import json
import platform
from dataclasses import asdict, replace
from importlib.metadata import version

from models.recipe.evaluate import TextFigures, evaluate_pair
from models.recipe.llama import load_model
from models.recipe.report import EFFORTS, LICENCE, shape_words
from models.recipe.settings import RecipeSettings
from models.recipe.trainer import Effort

# A sample of the held-out modules: base and small base read all of it twice.
_MAX_WINDOWS = 64
_TEXT_NAMES = {
    "held_out": "held-out modules",
    "own_greedy": "greedy text of a",
    "own_temperature_0.8": "text of a at T = 0.8",
}


def write_cut_report(settings: RecipeSettings, command: str) -> None:
    """Measure `<out>/base-small` against the base it was cut from and against the draft; write both into its folder."""
    folder = settings.out / "base-small"
    effort = json.loads((settings.out / EFFORTS).read_text(encoding="utf-8"))["base-small"]
    depth = settings.cut.num_layers
    last_exit = settings.distil.exit_layers[-1]
    figures = {
        "base-small by base": evaluate_pair(settings.out / "base", folder, (depth,), _MAX_WINDOWS),
        "draft by base-small": evaluate_pair(folder, settings.out / "draft", (last_exit,), _MAX_WINDOWS),
    }
    record = {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": version("torch"),
        "training": effort,
        "figures": {name: {text: asdict(value) for text, value in each.items()} for name, each in figures.items()},
    }
    (folder / "EVALUATION.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(settings, Effort(**effort), figures), encoding="utf-8")


def _card(settings: RecipeSettings, effort: Effort, figures: dict[str, dict[str, TextFigures]]) -> str:
    folder = settings.out / "base-small"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    cut, own = settings.cut, settings.cut.heal.own_text
    held_out = figures["draft by base-small"]["held_out"]
    of_base = figures["base-small by base"]["held_out"]
    return f"""\
# easyspec bundled second base

A Llama-shaped language model of {load_model(folder, "cpu").num_parameters():,} parameters, cut from the bundled base,
with its tokenizer. It exists so that one drafter can be seen to serve two base models
([docs/multi-target.md](../../docs/multi-target.md)). It is not a useful assistant.

{shape_words(replace(settings.base_shape, num_layers=cut.num_layers))}

## Recipe

Of the base's {settings.base_shape.num_layers} layers {cut.num_layers} stay:
{", ".join(map(str, config["kept_layers"]))} (`kept_layers` in `config.json`).
They went one at a time, each time the layer without which the base's distribution moved least, by KL divergence over
{cut.num_calibration_windows} windows of {cut.calibration_tokens} corpus tokens.

Healed by distillation from the base: KL(base || cut) at temperature 1 on {effort.num_tokens / 1e6:.2f} M tokens in
{effort.num_steps} steps and {effort.seconds / 60:.0f} minutes on one CPU core;
{cut.heal.own_share:.0%} of the windows are {own.prompt_tokens} corpus tokens continued by the base
({own.greedy_share:.0%} of them greedily, the others at temperature {own.temperature}), the rest is the base's corpus.
Windows of {cut.heal.optim.long_tokens} tokens: quality beyond is not measured. Stored as bfloat16.
`python -m models.recipe cut` makes it again.

## Figures

Loss on {held_out.num_tokens:,} tokens of the held-out modules: **{held_out.base_loss:.3f} nats a token**
(the base it was cut from: {of_base.base_loss:.3f}).

| pair | text | tokens | KL | top-1 agreement | overlap |
|---|---|---|---|---|---|
{_rows(figures)}

"b by a" is how well b guesses what a says: KL(a || b) in nats a token, overlap the sum of min(a, b).
(`models/base-small/EVALUATION.json`)

{LICENCE}"""


def _rows(figures: dict[str, dict[str, TextFigures]]) -> str:
    return "\n".join(
        f"| {pair} | {_TEXT_NAMES[name]} | {text.num_tokens:,} | {found.divergence:.3f} | {found.top1_agreement:.3f} "
        f"| {found.overlap:.3f} |"
        for pair, texts in figures.items()
        for name, text in texts.items()
        for found in text.exits.values()
    )
