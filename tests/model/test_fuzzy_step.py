"""Layer groups against a literal transcription of EasySpec's Algorithm 2 (arXiv 2502.02493), layer by layer.

The transcription calls transformers' own modules and its KV cache. Tolerance: 2e-4 absolute, where logits
reach 5 to 15; six layers of float32 sums in another order differ by about 2e-5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from easyspec.model.decoder import _MAX_PROGRAMS
from easyspec.parallel.layer_groups import LayerPlan, paper_plan, parse_plan, sequential_plan
from easyspec.speculation.parameters import MlpPlacement
from easyspec.speculation.token_tree import TokenTree
from tests.fakes.checkpoints import VOCAB_SIZE, reference_model, write_checkpoint
from tests.fakes.families import FAMILY_OPTIONS
from tests.model.passes import Passes, cached, random_token_ids

TOLERANCE = 2e-4
NUM_LAYERS = 9
PLANS: dict[str, Callable[[MlpPlacement], LayerPlan]] = {
    "N=2": lambda mlp: paper_plan(NUM_LAYERS, 2, mlp),
    "N=3": lambda mlp: paper_plan(NUM_LAYERS, 3, mlp),
    "N=4": lambda mlp: paper_plan(NUM_LAYERS, 4, mlp),
    "N=6": lambda mlp: paper_plan(NUM_LAYERS, 6, mlp),
    "explicit": lambda mlp: parse_plan("0-1 | 2 | 3-7 | 8", NUM_LAYERS, mlp),
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, biases": {"attention_bias": True, "mlp_bias": True, "head_dim": 24},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "num_key_value_heads": 1},
    "qwen3_moe": {"model_type": "qwen3_moe", **FAMILY_OPTIONS["qwen3_moe"]},
    "olmo2": {"model_type": "olmo2"},
    "glm4": {"model_type": "glm4", **FAMILY_OPTIONS["glm4"]},
    "cohere2": {
        "model_type": "cohere2",
        "pad_token_id": 0,
        "layer_types": ["full_attention"] * NUM_LAYERS,
        "logit_scale": 1.0,
    },
}
CONTEXT = random_token_ids(126, VOCAB_SIZE)
GUESSES = random_token_ids(4, VOCAB_SIZE, seed=1)


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"num_hidden_layers": NUM_LAYERS, "std": 0.12, **MODELS[request.param]}
    return write_checkpoint(tmp_path_factory.mktemp("draft"), **options)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return reference_model(folder, attn_implementation="eager")


@pytest.fixture(scope="module")
def exact_steps(reference: Any) -> torch.Tensor:
    return literal_path(reference, sequential_plan(NUM_LAYERS))


@pytest.fixture(scope="module")
def both_executors(folder: Path) -> tuple[Passes, Passes]:
    return Passes(folder, executor="native"), Passes(folder, executor="reference")


class LiteralSteps:
    """Fuzzy steps on transformers' modules, one row and one layer at a time, after an exact context."""

    def __init__(self, model: Any, context: Sequence[int]) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._length = len(context)
        model(torch.tensor([context]), past_key_values=self._cache)

    def step(self, token_id: int, plan: LayerPlan) -> torch.Tensor:
        """Logits [V] after `token_id`; its fuzzy keys and values stay in the cache."""
        inner = self._model.model
        hidden = inner.embed_tokens(torch.tensor([[token_id]]))  # [1, 1, E]
        rotation = inner.rotary_emb(hidden, torch.tensor([[self._length]]))
        for group in plan.groups:
            entrance = hidden
            layers = [inner.layers[index] for index in group]
            attended = [self._attend(layer, entrance, rotation) for layer in layers]
            if plan.mlp is MlpPlacement.STAGED:
                hidden = self._staged(layers, entrance, attended)
                continue
            for layer, output in zip(layers, attended, strict=True):
                hidden = hidden + output + mlp_of(layer, hidden, output)
        self._length += 1
        logits: torch.Tensor = self._model.lm_head(inner.norm(hidden))[0, 0]
        return logits * getattr(self._model.config, "logit_scale", 1.0)

    def _attend(self, layer: Any, entrance: torch.Tensor, rotation: Any) -> torch.Tensor:
        has_entrance_norm = hasattr(layer, "input_layernorm")
        output, _ = layer.self_attn(
            layer.input_layernorm(entrance) if has_entrance_norm else entrance,
            position_embeddings=rotation,
            attention_mask=None,
            past_key_values=self._cache,
        )
        exit_norm = getattr(layer, "post_self_attn_layernorm", None)
        if not has_entrance_norm:
            exit_norm = layer.post_attention_layernorm
        attended: torch.Tensor = output if exit_norm is None else exit_norm(output)
        return attended

    @staticmethod
    def _staged(layers: Sequence[Any], entrance: torch.Tensor, attended: Sequence[torch.Tensor]) -> torch.Tensor:
        result = entrance + sum(attended)
        for place, layer in enumerate(layers):
            result = result + mlp_of(layer, entrance + sum(attended[:place]), attended[place])
        return result


def mlp_of(layer: Any, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """What a layer's MLP adds, given what came before its attention and what that came to."""
    if hasattr(layer, "post_feedforward_layernorm"):  # norms behind attention and MLP alone
        behind: torch.Tensor = layer.post_feedforward_layernorm(layer.mlp(hidden + attended))
        return behind
    if not hasattr(layer, "post_attention_layernorm"):  # parallel
        return layer.mlp(layer.input_layernorm(hidden))  # type: ignore[no-any-return]
    output: torch.Tensor = layer.mlp(layer.post_attention_layernorm(hidden + attended))
    return layer.post_mlp_layernorm(output) if hasattr(layer, "post_mlp_layernorm") else output


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0.0)


@torch.inference_mode()
def literal_path(reference: Any, plan: LayerPlan, token_ids: Sequence[int] = GUESSES) -> torch.Tensor:
    steps = LiteralSteps(reference, CONTEXT)
    return torch.stack([steps.step(token_id, plan) for token_id in token_ids])


def fuzzy_path(passes: Passes, plan: LayerPlan, token_ids: Sequence[int] = GUESSES) -> torch.Tensor:
    """An exact prompt, then a pass of one row for every guess."""
    session = passes.open()
    passes.run(session.chain(CONTEXT))
    logits = [passes.run(session.chain([token_id]), plan=plan)[0] for token_id in token_ids]
    session.close()
    return torch.cat(logits)


@pytest.mark.parametrize("plan_name", PLANS)
@pytest.mark.parametrize("mlp", MlpPlacement)
def test_fuzzy_steps_are_the_literal_algorithm(
    both_executors: tuple[Passes, Passes], reference: Any, exact_steps: torch.Tensor, plan_name: str, mlp: MlpPlacement
) -> None:
    plan = PLANS[plan_name](mlp)
    expected = literal_path(reference, plan)
    assert expected.abs().max() > 2.0
    assert (expected - exact_steps).abs().max() > 100 * TOLERANCE  # a fuzzy step is really another function
    for passes in both_executors:
        assert_close(fuzzy_path(passes, plan), expected)


def test_the_transcription_of_single_layers_is_the_model(reference: Any, exact_steps: torch.Tensor) -> None:
    with torch.inference_mode():
        expected = reference(torch.tensor([[*CONTEXT, *GUESSES]])).logits[0, len(CONTEXT) :]
    assert_close(exact_steps, expected)


@pytest.mark.parametrize("mlp", MlpPlacement)
def test_a_fuzzy_level_of_a_tree_is_every_path_alone(
    both_executors: tuple[Passes, Passes], reference: Any, mlp: MlpPlacement
) -> None:
    """The drafter's shape: a level at a time, whose rows see their fuzzy ancestors; here all levels in one pass."""
    plan = paper_plan(NUM_LAYERS, 4, mlp)
    tree = TokenTree((5, 6, 7, 8, 9, 10), (0, 0, 1, 2, 1, 3))
    paths = [(0, *tree.path_rows(leaf)) for leaf in (4, 5, 6)]
    expected = [literal_path(reference, plan, [(4, *tree.token_ids)[row] for row in rows]) for rows in paths]
    for passes in both_executors:
        session = passes.open()
        passes.run(session.chain(CONTEXT))
        (logits,) = passes.run(session.tree(4, tree), plan=plan)
        session.close()
        for rows, path_logits in zip(paths, expected, strict=True):
            assert_close(logits[list(rows)], path_logits)


@pytest.mark.parametrize("mlp", MlpPlacement)
def test_groups_of_one_are_sequential_bit_for_bit(both_executors: tuple[Passes, Passes], mlp: MlpPlacement) -> None:
    explicit = parse_plan(" | ".join(str(layer) for layer in range(NUM_LAYERS)), NUM_LAYERS, mlp)
    for passes in both_executors:
        sequential = fuzzy_path(passes, sequential_plan(NUM_LAYERS))
        for plan in (paper_plan(NUM_LAYERS, 1, mlp), explicit):
            assert torch.equal(fuzzy_path(passes, plan), sequential)


def test_exact_rows_replace_fuzzy_ones(both_executors: tuple[Passes, Passes]) -> None:
    """Calibration: after fuzzy rows are dropped and run again layer by layer, nothing of them is left."""
    plan = paper_plan(NUM_LAYERS, 4, MlpPlacement.STAGED)
    for passes in both_executors:
        results = []
        for guesses_before in (True, False):
            session = passes.open()
            passes.run(session.chain(CONTEXT))
            if guesses_before:
                passes.run(session.chain(GUESSES), plan=plan)
                session.slots.truncate(len(CONTEXT))
            (logits,) = passes.run(session.chain(GUESSES))
            results.append((logits, cached(passes.pool, session.slots.by_position[: session.slots.num_cached])))
            session.close()
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("mlp", MlpPlacement)
def test_half_types_stay_near_float32(tmp_path: Path, mlp: MlpPlacement) -> None:
    """bfloat16 keeps eight bits: logits of 5 to 10 are off by a few hundredths on average."""
    write_checkpoint(tmp_path, "qwen2", dtype=torch.bfloat16, num_hidden_layers=4, std=0.1)
    plan = parse_plan("0 | 1-2 | 3", 4, mlp)
    expected = literal_path(reference_model(tmp_path, attn_implementation="eager"), plan)
    error = (fuzzy_path(Passes(tmp_path), plan) - expected).abs()
    assert expected.abs().max() > 2.0
    assert 1e-4 < error.mean() < 0.05


def test_any_number_of_plans_keeps_few_programs(both_executors: tuple[Passes, Passes]) -> None:
    """Clients choose plans, each of which is a program with buffers of its own."""
    passes = both_executors[1]
    plans = [parse_plan(plan, NUM_LAYERS, mlp) for plan in explicit_plans() for mlp in MlpPlacement]
    assert len(set(plans)) > _MAX_PROGRAMS
    for plan in plans:
        passes.prefill([1], plan)
        assert len(passes.decoder._passes) <= _MAX_PROGRAMS
    assert plans[-1] in {plan for plan, *_ in passes.decoder._passes}


def explicit_plans() -> list[str]:
    """Every place that one group of two or more layers can have."""
    return [
        " | ".join([*map(str, range(start)), f"{start}-{stop - 1}", *map(str, range(stop, NUM_LAYERS))])
        for start in range(NUM_LAYERS)
        for stop in range(start + 2, NUM_LAYERS + 1)
    ]
