"""EVALUATION.json and the model cards, written from measured figures."""

from __future__ import annotations

import datetime
import json
import platform
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from models.recipe.evaluate import TextFigures, evaluate_pair
from models.recipe.llama import load_model
from models.recipe.settings import ModelShape, RecipeSettings
from models.recipe.trainer import Effort

EFFORTS = "TRAINING.json"
LICENCE = """\
## Licence

The weights were trained on the standard library of CPython, which is under the PSF licence. The
folder holds no text of it. The models are small and may nevertheless repeat short passages.
"""

# A sample of the held-out modules: base and small base read all of it twice.
_MAX_WINDOWS = 64
_TEXT_NAMES = {
    "held_out": "held-out modules",
    "own_greedy": "greedy text of a",
    "own_temperature_0.8": "text of a at T = 0.8",
}


def write_report(
    settings: RecipeSettings, command: str, num_params: dict[str, int], figures: dict[str, TextFigures]
) -> None:
    """Write `EVALUATION.json` and both cards below `settings.out`."""
    efforts = json.loads((settings.out / EFFORTS).read_text(encoding="utf-8"))
    told = {name: asdict(value) for name, value in figures.items()}
    _write_record(settings.out, command, num_params=num_params, training=efforts, figures=told)
    (settings.out / "base" / "README.md").write_text(
        base_card(settings, num_params["base"], {k: Effort(**v) for k, v in efforts.items()}, figures), encoding="utf-8"
    )
    (settings.out / "draft" / "README.md").write_text(
        draft_card(settings, num_params["draft"], Effort(**efforts["draft"]), figures), encoding="utf-8"
    )


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
    told = {name: {text: asdict(value) for text, value in each.items()} for name, each in figures.items()}
    _write_record(folder, command, training=effort, figures=told)
    (folder / "README.md").write_text(cut_card(settings, Effort(**effort), figures), encoding="utf-8")


def _write_record(folder: Path, command: str, **found: Any) -> None:
    record = {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        **found,
    }
    (folder / "EVALUATION.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def record_effort(out: Path, name: str, effort: Effort) -> None:
    """Add one model's effort to `TRAINING.json`, which a later evaluation reads."""
    path = out / EFFORTS
    efforts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    efforts[name] = asdict(effort)
    path.write_text(json.dumps(efforts, indent=2) + "\n", encoding="utf-8")


def base_card(
    settings: RecipeSettings, num_params: int, efforts: dict[str, Effort], figures: dict[str, TextFigures]
) -> str:
    optim, effort = settings.base_optim, efforts["base"]
    return f"""\
# easyspec bundled base

A Llama-shaped language model of {num_params:,} parameters that continues Python. It exists so that
the service can be run, tested and measured without a download. It is not a useful assistant.

{shape_words(settings.base_shape)}

## Data and recipe

Source and docstrings of CPython {platform.python_version()}'s standard library, its tests seen
{settings.corpus.passes_per_test} times as rarely as the rest, the topics of `help()`, and
{settings.corpus.chat_share:.0%} ChatML exchanges derived from documented functions. The modules in
`models/heldout.txt` and their tests were left out.

{effort.num_tokens / 1e6:.2f} M tokens in {effort.num_steps} steps of {optim.tokens_per_step} tokens,
windows of {optim.short_tokens} and, for the last {optim.long_share:.0%} of the run,
{optim.long_tokens} tokens; Muon and AdamW; {effort.seconds / 60:.0f} minutes on 2 shared CPU cores in float32, stored
as bfloat16.
{_copying_words(settings, efforts.get("copying"))}
`python -m models.recipe train` makes it again.

## Figures

Loss on the held-out modules: **{figures["held_out"].base_loss:.3f} nats a token** over
{figures["held_out"].num_tokens:,} tokens, after rounding (`models/EVALUATION.json`).
The model has seen few tokens: what it writes looks like Python and means little, and decoded greedily
it falls into loops ({figures["own_greedy"].repeated_share:.0%} of the tokens end an 8-token run that
occurred before in the same continuation). Trained on windows of at most {optim.long_tokens} tokens:
quality beyond is not measured.

{LICENCE}"""


def _copying_words(settings: RecipeSettings, effort: Effort | None) -> str:
    if settings.copying is None or effort is None:
        return ""
    optim, share = settings.copying_optim, settings.copying.share
    return f"""
Then {effort.num_tokens / 1e6:.2f} M tokens in {effort.num_steps} steps of {optim.tokens_per_step} tokens and
{effort.seconds / 60:.0f} minutes, {share:.0%} of them exercises in copying: functions of the corpus repeated, renamed
or stripped of their docstring, docstrings quoted, stretches of it said twice (`models/recipe/copying.py`).
Without them a base of this age does not look back for what it is asked to repeat.
"""


def draft_card(settings: RecipeSettings, num_params: int, effort: Effort, figures: dict[str, TextFigures]) -> str:
    own = settings.distil.own_text
    rows = "\n".join(
        f"| {name} | {text.num_tokens:,} | {layer} | {found.loss:.3f} | {found.divergence:.3f} "
        f"| {found.top1_agreement:.3f} | {found.overlap:.3f} |"
        for name, text in figures.items()
        for layer, found in text.exits.items()
    )
    return f"""\
# easyspec bundled draft

A Llama-shaped draft model of {num_params:,} parameters for the bundled base, same tokenizer. Layers
{", ".join(map(str, settings.distil.exit_layers))} are exits: the final norm and LM head may be
applied after any of them (`exit_layers` in `config.json`).

{shape_words(settings.draft_shape)}

## Data and recipe

Distilled from the base: mean over the exits of KL(base || draft) at temperature 1, on
{effort.num_tokens / 1e6:.2f} M tokens in {effort.num_steps} steps and {effort.seconds / 60:.0f} minutes;
{settings.distil.own_share:.0%} of
the windows are {own.prompt_tokens} corpus tokens continued by the base ({own.greedy_share:.0%} of them
greedily, the others at temperature {own.temperature}), the rest is the base's corpus. The embedding
starts from the base's principal directions. Made on 2 CPU cores in float32, stored as bfloat16.

## Figures

| text | tokens | exit | loss | KL to base | top-1 agreement | overlap |
|---|---|---|---|---|---|---|
{rows}

Loss and KL in nats a token; overlap is the sum of min(base, draft). The first row group is text of
held-out modules, the others are continuations by the base of held-out prompts; of the greedy ones,
{figures["own_greedy"].repeated_share:.0%} of the tokens end an 8-token run that occurred before in
the same continuation. (`models/EVALUATION.json`)

{LICENCE}"""


def cut_card(settings: RecipeSettings, effort: Effort, figures: dict[str, dict[str, TextFigures]]) -> str:
    rows = "\n".join(
        f"| {pair} | {_TEXT_NAMES[name]} | {text.num_tokens:,} | {found.divergence:.3f} | {found.top1_agreement:.3f} "
        f"| {found.overlap:.3f} |"
        for pair, texts in figures.items()
        for name, text in texts.items()
        for found in text.exits.values()
    )
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
{rows}

"b by a" is how well b guesses what a says: KL(a || b) in nats a token, overlap the sum of min(a, b).
(`models/base-small/EVALUATION.json`)

{LICENCE}"""


def shape_words(shape: ModelShape) -> str:
    return (
        f"{shape.num_layers} layers, hidden size {shape.hidden_size}, {shape.num_heads} heads of "
        f"{shape.head_dim}, {shape.num_kv_heads} KV heads, MLP {shape.mlp_size}, vocabulary "
        f"{shape.vocab_size}, tied embeddings."
    )
