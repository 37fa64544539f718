from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.cosine import TeacherForcedSteps, compare_steps, cosine_table, paper_groups
from easyspec.parallel.layer_groups import paper_plan
from easyspec.speculation.parameters import MlpPlacement


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def token_ids() -> torch.Tensor:
    return torch.randint(0, 50, (9,), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def test_the_exact_pass_is_the_models_own(model: Any, token_ids: torch.Tensor) -> None:
    steps = TeacherForcedSteps(model, token_ids)
    expected = model(token_ids[None], output_hidden_states=True)
    for state, hidden in zip(steps.exact, expected.hidden_states[:-1], strict=True):
        torch.testing.assert_close(state.h, hidden[0], atol=1e-5, rtol=1e-5)
    logits = model.lm_head(model.model.norm(steps.last_hidden))
    torch.testing.assert_close(logits, expected.logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mlp", MlpPlacement)
@torch.inference_mode()
def test_groups_of_one_are_exact(model: Any, token_ids: torch.Tensor, mlp: MlpPlacement) -> None:
    steps = TeacherForcedSteps(model, token_ids)
    for exact, fuzzy in zip(steps.exact, steps.fuzzy(paper_groups(8, 1), mlp), strict=True):
        torch.testing.assert_close(fuzzy.attention_output, exact.attention_output, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_fuzzy_step_is_a_layer_by_layer_loop_at_one_position(model: Any, token_ids: torch.Tensor) -> None:
    """Position 6 by hand: exact keys and values before it, one row, layers 1-3 on the state at their entrance."""
    steps = TeacherForcedSteps(model, token_ids)
    fuzzy = steps.fuzzy([range(1), range(1, 4), range(4, 8)], MlpPlacement.SEQUENTIAL)
    layers, position = model.model.layers, 6
    hidden = steps.exact[1].h[position]  # layer 0 stands alone, so its output is exact
    entrance = hidden
    for layer in range(1, 4):
        block, exact = layers[layer], steps.exact[layer]
        normed = block.input_layernorm(entrance)
        cos, sin = model.model.rotary_emb(entrance[None, None], torch.tensor([[position]]))
        q, k = (_rotate(project(normed).view(-1, 8), cos[0, 0], sin[0, 0]) for project in _projections(block))
        v = block.self_attn.v_proj(normed).view(-1, 8)
        heads = []
        for head in range(4):
            keys = torch.cat([exact.k[:position, head // 2], k[None, head // 2]])
            values = torch.cat([exact.v[:position, head // 2], v[None, head // 2]])
            heads.append(torch.softmax(keys @ q[head] / 8**0.5, dim=0) @ values)
        attended = block.self_attn.o_proj(torch.cat(heads))
        torch.testing.assert_close(fuzzy[layer].attention_output[position], attended, atol=1e-5, rtol=1e-5)
        hidden = hidden + attended
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
    torch.testing.assert_close(fuzzy[4].h[position], hidden, atol=1e-5, rtol=1e-5)


def _projections(block: Any) -> tuple[Any, Any]:
    return block.self_attn.q_proj, block.self_attn.k_proj


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return heads * cos + torch.cat((-heads[:, 4:], heads[:, :4]), dim=-1) * sin


@torch.inference_mode()
def test_staged_mlps_read_the_cumulative_attention_of_their_place(model: Any, token_ids: torch.Tensor) -> None:
    steps = TeacherForcedSteps(model, token_ids)
    states = steps.fuzzy([range(1), range(1, 4), range(4, 8)], MlpPlacement.STAGED)
    entrance = states[1].h
    attended = [entrance + sum(state.attention_output for state in states[1 : 2 + place]) for place in range(3)]
    outputs = [
        model.model.layers[1 + place].mlp(model.model.layers[1 + place].post_attention_layernorm(hidden))
        for place, hidden in enumerate(attended)
    ]
    torch.testing.assert_close(states[4].h, attended[-1] + sum(outputs), atol=1e-5, rtol=1e-5)


def test_larger_groups_stray_further(model: Any, token_ids: torch.Tensor) -> None:
    rows = compare_steps(model, [token_ids], (1, 2, 4), num_positions=4)
    assert [(row.layer_parallel_size, row.mlp) for row in rows] == [
        (size, mlp.value) for size in (1, 2, 4) for mlp in MlpPlacement
    ]
    exact, _, pairs, _, fours, _ = rows
    assert exact.h == pytest.approx(1.0, abs=1e-5)
    assert 1.0 > pairs.h > fours.h
    assert 1.0 > pairs.attention_output > fours.attention_output
    assert pairs.k < 1.0
    assert pairs.v < 1.0


@pytest.mark.parametrize("num_layers", [2, 3, 8, 12, 28, 32])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_grouping_rule_agrees_with_the_drafters(num_layers: int, size: int) -> None:
    plan = paper_plan(num_layers, min(size, num_layers), MlpPlacement.SEQUENTIAL)
    assert tuple(paper_groups(num_layers, min(size, num_layers))) == plan.groups


def test_cosine_table_reads_a_checkpoint(model: Any, tmp_path: Path) -> None:
    words = {f"w{index}": index for index in range(50)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    rows = cosine_table(tmp_path, ["w1 w2 w3 w4 w5 w6", "w7 w8 w9 w1"], (2,), num_positions=2)
    assert [row.mlp for row in rows] == ["sequential", "staged"]
    assert 0.0 < rows[0].h < 1.0
