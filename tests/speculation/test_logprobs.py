from __future__ import annotations

import pytest
import torch

from easyspec.errors import InvalidRequestError
from easyspec.speculation.checks import MAX_PROMPT_LOGPROBS, check_logprobs
from easyspec.speculation.logprobs import row_logprobs, token_logprobs
from tests.fakes.device_looks import pretend_remote

V = 1003


def logits(num_rows: int = 17, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, V, generator=torch.Generator().manual_seed(seed)) * 5


def test_they_are_the_log_softmax_of_the_raw_logits() -> None:
    rows = logits()
    expected = torch.log_softmax(rows.double(), -1)
    token_ids = [(37 * row) % V for row in range(len(rows))]
    for row, entry in enumerate(token_logprobs(rows, token_ids, 20)):
        assert entry.logprob == pytest.approx(float(expected[row, token_ids[row]]), rel=1e-6)
        best = expected[row].topk(20)
        assert [token_id for token_id, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), rel=1e-6)
        assert entry.logprob == torch.tensor(entry.logprob).item()  # float32, as the wire has it


def test_a_row_is_the_same_bits_in_every_batch_and_place() -> None:
    rows = logits(40)
    token_ids = list(range(40))
    together = token_logprobs(rows, token_ids, 7)
    for first, num_rows in ((0, 1), (3, 1), (5, 2), (8, 16), (39, 1), (1, 39)):
        part = slice(first, first + num_rows)
        assert token_logprobs(rows[part], token_ids[part], 7) == together[part]
    assert token_logprobs(rows.flip(0), token_ids[::-1], 7) == together[::-1]


def test_of_equally_likely_tokens_the_lower_id_comes_first() -> None:
    row = torch.zeros(1, V)
    row[0, [900, 30, 500]] = 2.0
    row[0, 40] = 3.0
    (entry,) = token_logprobs(row, [5], 6)
    assert [token_id for token_id, _ in entry.top] == [40, 30, 500, 900, 0, 1]
    assert entry.logprob == entry.top[-1][1]


def test_rows_may_want_different_numbers_of_tokens() -> None:
    rows = logits(3)
    together = row_logprobs(rows, [4, 5, 6], [2, 0, V + 5])
    for row, num_top in enumerate((2, 0, V)):
        assert together[row : row + 1] == token_logprobs(rows[row : row + 1], [4 + row], num_top)
        assert len(together[row].top) == num_top
    assert row_logprobs(rows[:0], [], []) == ()


def test_a_gpu_finds_the_same_without_looking_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (logits(20) / 4).round()  # with many equals
    token_ids = list(range(20))
    expected = token_logprobs(rows, token_ids, 12)
    pretend_remote(monkeypatch)
    assert token_logprobs(rows, token_ids, 12) == expected


def test_without_top_tokens_there_is_the_tokens_own() -> None:
    (entry,) = token_logprobs(logits(1), [3], 0)
    assert entry.top == ()
    assert entry.logprob < 0
    (entry,) = token_logprobs(torch.tensor([[1.0, 2.0]]), [0], 20)
    assert [token_id for token_id, _ in entry.top] == [1, 0]  # no more than there are


def test_extreme_logits_stay_finite() -> None:
    (entry,) = token_logprobs(torch.tensor([[3e38, -3e38, 0.0]]), [0], 3)
    assert entry.logprob == 0.0
    assert entry.top[0] == (0, 0.0)


@pytest.mark.parametrize(
    ("num_top", "has_prompt", "num_prompt_tokens", "field"),
    [
        (None, False, 5, None),
        (0, True, 5, None),
        (20, False, 10**6, None),
        (21, False, 5, "num_top_logprobs"),
        (-1, False, 5, "num_top_logprobs"),
        (None, True, 5, "prompt_logprobs"),
        (20, True, MAX_PROMPT_LOGPROBS // 21 + 1, "prompt_logprobs"),
        (20, True, MAX_PROMPT_LOGPROBS // 21, None),
    ],
)
def test_what_may_be_asked_for(
    num_top: int | None, has_prompt: bool, num_prompt_tokens: int, field: str | None
) -> None:
    if field is None:
        check_logprobs(num_top, has_prompt=has_prompt, num_prompt_tokens=num_prompt_tokens)
        return
    with pytest.raises(InvalidRequestError) as caught:
        check_logprobs(num_top, has_prompt=has_prompt, num_prompt_tokens=num_prompt_tokens)
    assert caught.value.field == field
