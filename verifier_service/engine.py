"""The verifier's engine: the event loop's side of the device thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

import torch

from easyspec.engine.shell import EngineShell
from easyspec.errors import CapacityError
from easyspec.model.loading import LoadedModel, load_model
from easyspec.model.row_probe import is_row_invariant
from easyspec.speculation.grammar_compiler import GrammarCompiler
from easyspec.speculation.messages import ModelInfo, OpenVerification, Verdict, VerifyTimings
from easyspec.speculation.token_tree import TokenTree
from easyspec.telemetry.metrics import StepObserver, ignore_step
from easyspec.tokenizer_fingerprint import tokens_by_id
from verifier_service.config import VerifierSettings
from verifier_service.scheduler import SchedulerLimits
from verifier_service.verifier import OpenTask, Verifier, VerifierLimits, VerifyTask


class VerifierEngine(EngineShell[Verifier]):
    """Loads the base model on its own thread and hands sessions' tasks to it."""

    def __init__(self, settings: VerifierSettings, on_step: StepObserver = ignore_step) -> None:
        super().__init__("verifier-device", settings.step_timeout_s)
        self._settings = settings
        self._on_step = on_step
        self._loaded: LoadedModel | None = None
        self._grammars: GrammarCompiler | None = None
        self.max_tree_nodes = settings.max_tree_nodes
        self.row_invariant = False

    async def stop(self) -> None:
        await super().stop()
        if self._grammars is not None:
            self._grammars.close()

    @property
    def model_info(self) -> ModelInfo:
        """The base model; valid after `start`."""
        assert self._loaded is not None, "started"
        return self._loaded.info

    async def vocabulary(self) -> Mapping[int, str]:
        """The tokenizer's entries, read from the checkpoint: seldom asked for."""
        assert self._loaded is not None, "started"
        return await asyncio.to_thread(tokens_by_id, self._loaded.folder)

    async def open(self, request: OpenVerification) -> int:
        """Open a session and return its id, waiting for KV memory if need be.

        Raises the EasyspecError that the request deserves. A caller that stops waiting holds nothing.
        """
        grammar, compiled = request.sampling.grammar, None
        if grammar is not None:
            assert self._grammars is not None, "started"
            request.sampling.check(self.model_info.vocab_size)
            compiled = await self._grammars.compile(grammar)
        # Compiled before the session takes its place in the queue for memory: compiling may take seconds.
        timeout_s = self._settings.admission_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await self._thread.submit_opening(OpenTask(request, compiled), self.close)
        except TimeoutError:
            raise CapacityError(f"KV memory was full for {timeout_s:g} s", timeout_s) from None

    async def verify(self, session_id: int, base_length: int, tree: TokenTree) -> tuple[Verdict, VerifyTimings]:
        """The verdict on a tree; raises StalePositionError or InvalidTreeError and then changes nothing."""
        return await self._thread.submit(VerifyTask(session_id, base_length, tree))

    async def verdicts(
        self, session_id: int, base_length: int, tree: TokenTree, num_plain_rounds: int
    ) -> AsyncIterator[tuple[Verdict, VerifyTimings]]:
        """The verdict on a tree, and those of the plain rounds behind it; raises what `verify` raises."""
        task = VerifyTask(session_id, base_length, tree, num_plain_rounds)
        yield await self._thread.submit(task)
        # The device thread sets `following` before it resolves the future, so that it is seen here.
        while task.following is not None:
            task = task.following
            yield await asyncio.wrap_future(task.future)

    def _build(self) -> Verifier:
        settings = self._settings
        self._loaded = loaded = load_model(settings)
        self._thread.when_idle = loaded.decoder.keep_followers
        self._thread.when_stopped = loaded.dismiss_followers
        with torch.inference_mode():
            self.row_invariant = is_row_invariant(loaded.decoder, loaded.memory.pool)
        info = loaded.info
        self._grammars = GrammarCompiler(loaded.folder, info.vocab_size, info.eos_token_ids)
        self._grammars.prepare()
        limits = VerifierLimits(settings.served_model_name, info.max_model_len, settings.max_tree_nodes)
        scheduler_limits = SchedulerLimits(
            max_batch_rows=settings.max_batch_rows,
            prefill_chunk=settings.prefill_chunk,
            max_tree_nodes=settings.max_tree_nodes,
            max_waiting_sessions=settings.max_waiting_sessions,
            retry_after_s=settings.admission_timeout_s,
            max_prefill_slowdown=settings.max_prefill_slowdown,
            reads_on_the_side=loaded.decoder.can_slice,
        )
        verifier = Verifier(loaded.decoder, loaded.memory, limits, scheduler_limits, self._on_step)
        self._thread.patience_s = verifier.patience_s
        return verifier


def follow(settings: VerifierSettings) -> None:
    """What a rank other than 0 does, from loading until rank 0 dismisses it; raises EngineLostError."""
    loaded = load_model(settings)
    with torch.inference_mode():
        loaded.follow()
