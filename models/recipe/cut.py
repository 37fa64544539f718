"""A second, shallower base: layers of the base left out, the rest healed by distillation.

It speaks the base's vocabulary and costs about two thirds as much a pass, so that one drafter can be shown to serve two
base models. Layers go one at a time, each time the one whose absence moves the base's distribution least.

Dimensions: B rows, T tokens, H hidden size, V vocabulary, L layers.
"""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from transformers import LlamaForCausalLM

from models.recipe.copying import Stream
from models.recipe.distil import layer_states, learn
from models.recipe.llama import TOKENIZER_FILES
from models.recipe.own_text import write_own_text
from models.recipe.settings import CutSettings, RecipeSettings
from models.recipe.tokenizer import load_tokenizer
from models.recipe.tokens import pass_stream
from models.recipe.trainer import Effort

_LAYER_NUMBER = re.compile(r"(?<=^model\.layers\.)\d+")


def cut_and_heal(settings: RecipeSettings, base: LlamaForCausalLM) -> tuple[LlamaForCausalLM, list[int], Effort]:
    """Return the shallower base in float32, the layers of `base` it was cut from, and what healing it took.

    The corpus is read in the tokens of the base in `settings.out`, which need not be trained again for it. Writes
    below `settings.work`; an interrupted run goes on.
    """
    adopt_tokenizer(settings)
    stream = pass_stream(settings, 0)
    kept = kept_layers(base, calibration_windows(stream, settings.cut), settings.cut.num_layers)
    small = without_layers(base, kept).to(settings.device)
    heal = replace(settings.cut.heal, exit_layers=(settings.cut.num_layers,))
    healing = replace(settings, distil=heal)
    own = write_own_text(base, stream, healing.distil.own_text, settings.work / "own-cut")
    return small, kept, learn("base-small", small, base, own, load_tokenizer(settings.out / "base"), healing)


def adopt_tokenizer(settings: RecipeSettings) -> None:
    """Let the work folder use the tokenizer of the finished base, unless it has one of its own."""
    folder = settings.work / "tokenizer"
    if not folder.exists():
        folder.mkdir(parents=True)
        for name in TOKENIZER_FILES:
            shutil.copyfile(settings.out / "base" / name, folder / name)


def calibration_windows(stream: Stream, settings: CutSettings) -> Tensor:
    """Return windows [B, T] spread evenly over a corpus pass."""
    stride = (len(stream) - settings.calibration_tokens) // settings.num_calibration_windows
    starts = [index * stride for index in range(settings.num_calibration_windows)]
    return torch.tensor([stream[start : start + settings.calibration_tokens].tolist() for start in starts])


@torch.inference_mode()
def kept_layers(base: LlamaForCausalLM, windows: Tensor, num_layers: int) -> list[int]:
    """Return the ascending indices of the `num_layers` layers that stay. One layer goes at a time: the one without
    which KL(base || cut), a mean over windows [B, T], is smallest."""
    head, norm = base.lm_head.weight, base.model.norm
    kept = list(range(len(base.model.layers)))
    entrances = layer_states(base, kept, base.model.embed_tokens(windows))
    wanted = log_softmax(norm(entrances[-1]) @ head.t(), dim=-1)
    while len(kept) > num_layers:
        harms = []
        for place in range(len(kept)):
            last = layer_states(base, kept[place + 1 :], entrances[place])[-1]
            found = log_softmax(norm(last) @ head.t(), dim=-1)
            harms.append((wanted.exp() * (wanted - found)).sum(-1).mean().item())
        del kept[harms.index(min(harms))]
        entrances = layer_states(base, kept, entrances[0])
    return kept


def without_layers(base: LlamaForCausalLM, kept: Sequence[int]) -> LlamaForCausalLM:
    """Return a model of the layers `kept` of `base`, in that order; `base` is not touched."""
    config = copy.deepcopy(base.config)
    config.num_hidden_layers = len(kept)
    small = LlamaForCausalLM(config)
    old: dict[str, Tensor] = nn.Module.state_dict(base)
    old_keys = {key: _LAYER_NUMBER.sub(lambda found: str(kept[int(found[0])]), key) for key in small.state_dict()}
    small.load_state_dict({key: old[old_key] for key, old_key in old_keys.items()})
    return small
