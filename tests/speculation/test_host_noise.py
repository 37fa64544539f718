"""Guessers without torch see the verifier's noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from easyspec.speculation.coupling import gumbel_noise, signed_seed
from easyspec.speculation.host_noise import HostNoise


@given(
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**31 - 1),
    token_ids=st.lists(st.integers(0, 2**20), min_size=1, max_size=8),
)
def test_it_is_the_noise_of_coupling(seed: int, position: int, token_ids: list[int]) -> None:
    rows = gumbel_noise(torch.tensor([signed_seed(seed)]), torch.tensor([position]), torch.tensor(token_ids))
    noise = HostNoise(seed).at(position)
    assert torch.tensor([noise(token_id) for token_id in token_ids], dtype=torch.float32).allclose(
        rows[0], rtol=0, atol=1e-6
    )
    assert noise.of(np.array(token_ids)) == pytest.approx([noise(token_id) for token_id in token_ids], abs=1e-9)
