"""The engine of a drafter without a draft model: no weights, no KV memory, no torch; any verifier can use it."""

from __future__ import annotations

from drafter_service.drafter import Drafter
from drafter_service.fusion.rounds import Rounds
from drafter_service.request import DrafterLimits
from drafter_service.shell import DrafterShell, open_text_resources
from easyspec.checkpoint.location import TOKENIZER_PATTERNS, model_path
from easyspec.parallel.layer_groups import sequential_plan
from easyspec.speculation.messages import ModelInfo
from easyspec.tokenizer_fingerprint import tokenizer_fingerprint, tokens_by_id

# Text has no context length; this bounds what one session may hold.
_DEFAULT_MAX_LEN = 1 << 20
# A vocabulary is padded to this many entries at most in practice: ids beyond the tokenizer's are never sampled, but
# a request may contain them.
_MAX_VOCAB_SIZE = 1 << 21


class TextDrafterEngine(DrafterShell):
    """Guesses on a thread of its own, as the engine with a model does."""

    def _build(self) -> Drafter:
        settings = self._settings
        folder = model_path(str(settings.tokenizer or settings.model), TOKENIZER_PATTERNS)
        self._tokenizer = folder
        fingerprint = tokenizer_fingerprint(folder)
        max_len = settings.max_model_len or _DEFAULT_MAX_LEN
        self._info = ModelInfo(
            name=settings.served_model_name,
            vocab_size=max(tokens_by_id(folder), default=-1) + 1,
            max_model_len=max_len,
            tokenizer_fingerprint=fingerprint,
            num_parameters=0,
            dtype="",
            eos_token_ids=(),
            num_layers=0,
        )
        limits = DrafterLimits(
            settings.served_model_name,
            _MAX_VOCAB_SIZE,
            max_len,
            settings.max_tree_nodes,
            sequential_plan(1),
            settings.draft_sources,
        )
        rounds = Rounds(asks_all_sources=settings.ask == "always")
        return Drafter(limits, rounds, open_text_resources(settings, fingerprint), on_step=self._on_step)
