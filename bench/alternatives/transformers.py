"""transformers' own ways to generate: plain, assisted by a draft model, and by looking into the prompt."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

from bench.alternatives.timed_completion import Answer, Maker
from bench.harness.streams import Task
from easyspec.checkpoint.location import is_gguf
from easyspec.checkpoint.tokenizer_files import load_tokenizer

PROGRAM = "transformers"
# The number of its documentation's example; every other setting is transformers' default.
_PROMPT_LOOKUP_TOKENS = 10


class TransformersGeneration:
    """One way, by an assistant model or by what its `config` says."""

    def __init__(self, maker: Maker, model: Any, tokenizer: Any, assistant: Any = None, **config: Any) -> None:
        self.maker = maker
        self._model = model
        self._tokenizer = tokenizer
        self._assistant = assistant
        self._config_fields = config

    @classmethod
    def all_ways(cls, base: Path, draft: Path | None) -> list[Self]:
        """All of them, sharing the loaded models; without a draft model nothing assists. Weights keep the checkpoint's
        type, as easyspec's do; those of a GGUF file it can only compute in bfloat16."""
        tokenizer = load_tokenizer(base)
        model = _model(base)
        assisted = [] if draft is None else [cls(Maker(PROGRAM, "assisted"), model, tokenizer, _model(draft))]
        return [
            cls(Maker(PROGRAM), model, tokenizer),
            *assisted,
            cls(Maker(PROGRAM, "prompt lookup"), model, tokenizer, prompt_lookup_num_tokens=_PROMPT_LOOKUP_TOKENS),
        ]

    async def complete(self, task: Task) -> Answer:
        """Return exactly `task.max_tokens` new tokens, whatever the model would have stopped at."""
        token_ids = await asyncio.to_thread(self._complete, task)
        return Answer(token_ids, len(token_ids))

    def _complete(self, task: Task) -> tuple[int, ...]:
        torch.manual_seed(task.seed)
        sampling = {"do_sample": True, "temperature": task.temperature, "top_k": 0} if task.temperature else {}
        config = GenerationConfig(
            max_new_tokens=task.max_tokens,
            eos_token_id=None,
            pad_token_id=self._tokenizer.pad_token_id,
            **sampling,
            **self._config_fields,
        )
        inputs = self._tokenizer(task.prompt, return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            output = self._model.generate(**inputs, generation_config=config, assistant_model=self._assistant)
        new = output[0, inputs["input_ids"].shape[1] :].tolist()
        return tuple(new[: task.max_tokens])


def _model(path: Path) -> Any:
    if not is_gguf(path):
        return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    packed = GgufConfig(dequantize=True)
    found = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=packed, dtype=torch.bfloat16
    )
    return found.eval()
