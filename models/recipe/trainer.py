"""The training loop both models share: micro-batches, schedule, checkpoints, log."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from models.recipe.optim import lr_factor, optimizers_for, schedule_progress, set_lr_factor
from models.recipe.settings import OptimSettings, RecipeSettings

_LOG_EVERY = 10


@dataclass(frozen=True)
class Effort:
    """What a finished run took; `seconds` are wall-clock, without interruptions."""

    num_steps: int
    num_tokens: int
    seconds: float


class Trainer:
    """Runs a schedule to its end with Muon and AdamW, resuming from `<work>/<name>.pt` where that exists. `publish` is
    called with `<work>/<name>-latest` every `publish_seconds`."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        optim: OptimSettings,
        settings: RecipeSettings,
        publish: Callable[[Path], None],
    ) -> None:
        self._name = name
        self._model = model
        self._optim = optim
        self._settings = settings
        self._publish = publish
        self._optimizers = optimizers_for(model, optim)
        self._checkpoint = settings.work / f"{name}.pt"
        self._log = settings.work / f"{name}.log"
        self._reported: float | None = None

    def run(self, losses_of: Callable[[int, float], Iterator[Tensor]]) -> Effort:
        """Train until progress is 1. `losses_of(step, progress)` yields the micro-batches' losses one at a time, each
        already weighted by its share of the step, so that their gradients add up to the step's."""
        step, seconds_before = self._resume()
        start = saved = published = logged = time.monotonic()
        losses: list[float] = []
        self._model.train()
        while True:
            now = time.monotonic()
            seconds = seconds_before + now - start
            progress = schedule_progress(step, seconds, self._optim)
            if len(losses) == _LOG_EVERY:
                self._report(step, progress, sum(losses) / len(losses), now - logged)
                logged, losses = now, []
            if progress >= 1 or now - saved > self._settings.checkpoint_seconds:
                self._save(step, seconds)
                saved = now
            if now - published > self._settings.publish_seconds:
                self._publish(self._settings.work / f"{self._name}-latest")
                published = now
            if progress >= 1:
                return Effort(step, step * self._optim.tokens_per_step, round(seconds, 1))
            set_lr_factor(self._optimizers, lr_factor(step, progress, self._optim))
            losses.append(0.0)
            for loss in losses_of(step, progress):
                loss.backward()
                losses[-1] += loss.item()
            nn.utils.clip_grad_norm_(self._model.parameters(), self._optim.max_grad_norm)
            for optimizer in self._optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1

    def _resume(self) -> tuple[int, float]:
        if not self._checkpoint.exists():
            return 0, 0.0
        state = torch.load(self._checkpoint, map_location=self._settings.device)
        self._model.load_state_dict(state["model"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return state["step"], state["seconds"]

    def _save(self, step: int, seconds: float) -> None:
        state = {
            "step": step,
            "seconds": seconds,
            "model": self._model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }
        partial = self._checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self._checkpoint)

    def _report(self, step: int, progress: float, loss: float, seconds: float) -> None:
        rate = _LOG_EVERY * self._optim.tokens_per_step / seconds
        line = (
            f"{time.strftime('%H:%M:%S')} {self._name} step {step} progress {progress:.1%} "
            f"loss {loss:.4f} {rate:.0f} tokens/s"
        )
        if self._reported is not None and progress > self._reported:
            eta = (1 - progress) / (progress - self._reported) * seconds / 60
            line += f" eta {eta:.1f} min"
        self._reported = progress
        with self._log.open("a", encoding="utf-8") as log:
            log.write(line + "\n")
