"""What a request asks of the drafter, and what it may ask for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from drafter_service.grammar_preference import GrammarPreference
from easyspec.errors import InvalidRequestError
from easyspec.parallel.layer_groups import LayerPlan, paper_plan
from easyspec.speculation.checks import check_model, check_prompt
from easyspec.speculation.grammar_compiler import GrammarCompiler
from easyspec.speculation.messages import OpenSpeculation
from easyspec.speculation.parameters import SamplingParameters, TreeBudget
from easyspec.speculation.sources import MODEL_SOURCES, TEXT_SOURCES, DraftSources


@dataclass(frozen=True)
class DraftRequest:
    """Fixed for a whole session, which comes to hold `max_length` tokens at most. `calibration` False keeps fuzzy KV
    entries, for the ablation.

    `target` tells base models apart: what is learned about acceptance by one must not be held against another.
    """

    sampling: SamplingParameters
    plan: LayerPlan
    max_length: int
    calibration: bool = True
    sources: DraftSources = DraftSources.MODEL
    preference: GrammarPreference | None = None
    target: str = ""
    drafts_ahead: bool = True

    @property
    def asks_model(self) -> bool:
        return bool(self.sources & MODEL_SOURCES)

    @property
    def asks_text(self) -> bool:
        return bool(self.sources & TEXT_SOURCES)


@dataclass(frozen=True)
class DrafterLimits:
    """What a session may ask for; `max_model_len` is what fits the KV memory.

    `plan` and `sources` are those of a session that names none. `early_exits` are those of the draft model that
    sessions may use; there may be none, for the reason `no_exits_because`.
    """

    served_model_name: str
    vocab_size: int
    max_model_len: int
    max_tree_nodes: int
    plan: LayerPlan
    sources: DraftSources = DraftSources.MODEL
    early_exits: tuple[int, ...] = ()
    no_exits_because: str = ""

    def checked(self, opening: OpenSpeculation, grammars: GrammarCompiler | None) -> DraftRequest:
        """What the session asks for; raises the EasyspecError that it deserves."""
        num_tokens = len(opening.prompt_token_ids)
        check_model(opening.model, self.served_model_name)
        check_prompt(opening.prompt_token_ids, self.vocab_size, self.max_model_len)
        opening.sampling.check(self.vocab_size)
        if opening.num_output_tokens > num_tokens:
            raise InvalidRequestError("num_output_tokens", opening.num_output_tokens, f"0 to {num_tokens}")
        sources = self.sources if opening.sources is None else self._known(opening.sources)
        preference, grammar = None, opening.sampling.grammar
        size, mlp = opening.layer_plan.layer_parallel_size, opening.layer_plan.mlp or self.plan.mlp
        plan = replace(self.plan, mlp=mlp) if size is None else paper_plan(self.plan.num_layers, size, mlp)
        if grammar is not None and grammars is not None:
            preference = GrammarPreference(grammars, grammar, num_tokens - opening.num_output_tokens)
        return DraftRequest(
            opening.sampling,
            plan.cut_at(self.early_exits) if DraftSources.EARLY_EXIT in sources else plan,
            min(max(opening.max_total_length or self.max_model_len, num_tokens), self.max_model_len),
            opening.layer_plan.calibration,
            sources,
            preference,
            opening.base_fingerprint,
            opening.draft_ahead,
        )

    def check_budget(self, budget: TreeBudget) -> None:
        """Raise InvalidRequestError for a tree that is too large."""
        budget.check(self.max_tree_nodes)
        if budget.width * (budget.num_levels - 1) > self.max_tree_nodes:
            allowed = f"width x (num_levels - 1) up to {self.max_tree_nodes}"
            raise InvalidRequestError("budget.width", budget.width, allowed)

    def _known(self, wanted: DraftSources) -> DraftSources:
        has_exits = bool(self.early_exits) and DraftSources.MODEL in self.sources
        known = self.sources | DraftSources.EARLY_EXIT if has_exits else self.sources
        if missing := wanted & ~known:
            allowed = f"some of {', '.join(known.names)}"
            if DraftSources.EARLY_EXIT in missing and self.no_exits_because:
                allowed += f" ({self.no_exits_because})"
            raise InvalidRequestError("sources", ", ".join(wanted.names), allowed)
        return wanted
